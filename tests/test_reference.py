"""The reference means what the contract says: it is compared with float64 sums written out, and has its properties."""

from __future__ import annotations

import dataclasses
import itertools
import math

import cases
import compare
import ml_dtypes
import numpy as np
import pairwise
import pytest
import results
import routings

from jax_moe import reference
from jax_moe.enums import ActivationType, WeightLayout
from jax_moe.shapes import SHAPES

FLOAT8, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def exact(case, given, requantize):
    """The op element by element in float64, one slot after the other, on dequantised operands of plain layout."""
    block = 128
    x = given["hidden_states"].astype(np.float64)
    if given["hidden_states_scale"] is not None:
        x *= np.repeat(given["hidden_states_scale"].T, block, axis=1)
    w1, w2 = (
        given[name].astype(np.float64) * given[f"{name}_scale"].repeat(block, axis=1).repeat(block, axis=2)
        for name in ("gemm1_weights", "gemm2_weights")
    )
    result = np.zeros(x.shape)
    for (token, slot), word in np.ndenumerate(given["topk_ids"]):
        if "topk_weights" in given:
            expert, weight = int(word), float(given["topk_weights"][token, slot])
        else:
            bits = int(word) & 0xFFFFFFFF
            expert = bits >> 16 if bits < 2**31 else (bits >> 16) - 65536
            weight = float(np.array(bits & 0xFFFF, np.uint16).view(BFLOAT16))
        local = expert - case.offset
        if not (0 <= expert < case.experts and 0 <= local < case.local):
            continue
        g = w1[local] @ x[token]
        if "gemm1_lora_delta" in given:
            g += given["gemm1_lora_delta"][token, slot].astype(np.float64)
        parameters = {name.removeprefix("gemm1_"): float(given[name][local]) for name in case.per_expert}
        a = exact_activation(case.activation, g, **parameters)
        if requantize:
            for start in range(0, case.inter, block):
                part = a[start : start + block]
                scale = max(np.float32(np.abs(part).max()) / np.float32(448), np.float32(1.17549435e-38))
                part[:] = (part.astype(np.float32) / scale).astype(FLOAT8).astype(np.float64) * scale
        y = w2[local] @ a
        result[token] += weight * (y.astype(BFLOAT16).astype(np.float64) if requantize else y)
    return result


def exact_activation(activation, g, alpha=1.0, beta=0.0, clamp_limit=math.inf):
    """One value at a time, from the formulas as they are written down."""
    half = len(g) // 2
    a = []
    for up, gate in zip(g[:half], g[half:], strict=True):
        if activation is ActivationType.Geglu:
            a.append(up * gate * (1 + math.erf(gate / math.sqrt(2))) / 2)
        if activation is ActivationType.Swiglu:
            gate, up = min(gate, clamp_limit), max(-clamp_limit, min(up, clamp_limit))
            a.append(gate / (1 + math.exp(-alpha * gate)) * (up + beta))
    if activation is ActivationType.Relu2:
        a = [max(x, 0) ** 2 for x in g]
    if activation is ActivationType.Identity:
        a = list(g)
    return np.array(a, np.float64)


@pytest.mark.parametrize("routing", ["uniform", "duplicates", "invalid", "garbage", "padding"])
@pytest.mark.parametrize("window", [None, (1, 2)])
def test_equals_float64_sums_without_requantization(routing, window):
    case = cases.Case("", 5, 384, 256, 4, 3, window, routing, weights="signed")
    given = cases.arrays(case)
    actual = cases.expected(case, given, requantize=False).output
    compare.assert_close(actual, exact(case, given, False), "output", compare.Tolerance(1e-5, 1e-4))


PLAIN_OPTIONS = {
    name: option for name, option in cases.OPTIONS.items() if not option.keys() & {"shuffled", "weight_layout"}
}


@pytest.mark.parametrize("option", PLAIN_OPTIONS.values(), ids=list(PLAIN_OPTIONS))
def test_options_equal_float64_sums(option):
    case = cases.Case("", 5, 384, 256, 6, 3, (1, 4), "mixed", weights="signed", **option)
    given = cases.arrays(case)
    actual = cases.expected(case, given, requantize=False).output
    compare.assert_close(actual, exact(case, given, False), "output", compare.Tolerance(1e-5, 1e-4))
    compare.assert_close(cases.expected(case, given).output, exact(case, given, True), "output")


@pytest.mark.parametrize("option", PLAIN_OPTIONS.values(), ids=list(PLAIN_OPTIONS))
def test_an_option_changes_the_output_by_more_than_the_tolerance(option):
    """What ignores an option fails the comparison with the reference; ids apart are other integers."""
    case = cases.Case("", 19, 256, 256, 8, 3, **option)
    plain = cases.Case("", 19, 256, 256, 8, 3)
    if case.topk_weights != "packed":
        return
    actual = cases.expected(plain, cases.arrays(plain)).output
    with pytest.raises(AssertionError, match="relative L2"):
        compare.assert_close(actual, cases.expected(case, cases.arrays(case)).output, "output")


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("layout", [WeightLayout.MajorK, WeightLayout.BlockMajorK])
@pytest.mark.parametrize("name", ["t7", "relu2", "lora"])
def test_a_layout_is_another_order_of_the_same_weights(name, layout, shuffled):
    """The same result to the bit; and weights in another order than said give another result."""
    plain = cases.CASES[name]
    case = dataclasses.replace(plain, weight_layout=layout, shuffled=shuffled)
    given = cases.arrays(case)
    expected = cases.expected(plain, cases.arrays(plain))
    for name, actual in cases.expected(case, given)._asdict().items():
        compare.assert_same_bits(actual, getattr(expected, name), name)
    mistaken = dataclasses.replace(case, shuffled=not shuffled)
    with pytest.raises(AssertionError, match="relative L2"):
        compare.assert_close(cases.expected(mistaken, given).output, expected.output, "output")


def test_activations_at_chosen_points():
    """Columns of up, then of gate."""
    up, gate = [1.0, -3.0, 2.0, 1.0, np.nan, 1.0], [0.0, 2.0, -6.0, 5.0, 1.0, np.nan]
    g = np.array([up + gate], np.float32)
    swiglu = reference.activate(g, ActivationType.Swiglu)[0]
    expected = [0, -6 / (1 + np.exp(-2)), -12 / (1 + np.exp(6)), 5 / (1 + np.exp(-5))]
    np.testing.assert_allclose(swiglu[:4], expected, 1e-6)
    geglu = reference.activate(g, ActivationType.Geglu)[0]
    expected = [0, -6 * 0.977249868, -12 * 9.86587645e-10, 5 * 0.999999713]
    np.testing.assert_allclose(geglu[:4], expected, 1e-6)
    clamped = reference.activate(g, ActivationType.Swiglu, *np.array([2, 0.5, 1.5], np.float32))[0]
    expected = [0, -1.5 / (1 + np.exp(-3)), -12 / (1 + np.exp(12)), 1.5 * 1.5 / (1 + np.exp(-3))]
    np.testing.assert_allclose(clamped[:4], expected, 1e-6)
    for gated in (swiglu, geglu, clamped):
        assert np.isnan(gated[4:]).all()
    x = np.array([[-2, -0.0, 3, np.nan, -np.inf, np.inf]], np.float32)
    np.testing.assert_array_equal(reference.activate(x, ActivationType.Relu2)[0], [0, 0, 9, np.nan, 0, np.inf])
    np.testing.assert_array_equal(reference.activate(x, ActivationType.Identity), x)


@pytest.mark.parametrize(
    ("limit", "up", "gate"),
    [(0.0, 0.0, -1.0), (-0.5, -0.5, -1.0), (np.inf, 3.0, -1.0), (np.nan, 3.0, -1.0), (2.0, 2.0, -1.0)],
)
def test_odd_clamp_limits(limit, up, gate):
    """A negative limit is what everything becomes that is clamped to it; NaN clamps nothing."""
    g = np.array([[3.0, -1.0]], np.float32)
    actual = reference.activate(g, ActivationType.Swiglu, limit=np.float32(limit))[0, 0]
    np.testing.assert_allclose(actual, up * gate / (1 + np.exp(-gate)), 1e-6)


def test_activation_codes_and_scales_are_those_of_the_second_gemm():
    """gemm2_output is made of them, row by row of the map."""
    case = cases.CASES["lora_unfinalized"]
    given = cases.arrays(case)
    result = cases.expected(case, given)
    experts = reference.local_expert(given["topk_ids"] >> 16, case.experts, case.offset, case.local).reshape(-1)
    for slot, row in enumerate(result.expanded_idx_to_permuted_idx):
        if row >= 0:
            w, w_scale = given["gemm2_weights"][experts[slot]], given["gemm2_weights_scale"][experts[slot]]
            codes, scale = result.gemm1_activation_output[row], result.gemm1_activation_scale[:, row]
            y = reference.block_scaled_matmul(codes[None], scale[None], w, w_scale)
            compare.assert_close(result.gemm2_output[row][None], y, "gemm2_output")


@pytest.mark.parametrize("x_dtype", ["float8_e4m3fn", "bfloat16"])
def test_equals_float64_sums_with_requantization(x_dtype):
    case = cases.Case("", 5, 384, 256, 4, 3, routing="mixed", weights="signed", x_dtype=x_dtype)
    given = cases.arrays(case)
    actual = cases.expected(case, given).output
    if x_dtype == "bfloat16":
        x, scale = reference.quantize_1x128(given["hidden_states"])
        given |= {"hidden_states": x, "hidden_states_scale": scale.T}
    compare.assert_close(actual, exact(case, given, True), "output")


@pytest.mark.parametrize("case", [case for case in cases.SMALL if case.extreme == "none"], ids=lambda case: case.name)
def test_requantization_costs_what_the_format_costs(case):
    given = cases.arrays(case)
    exact_result, rounded = (cases.expected(case, given, requantize=requantize) for requantize in (False, True))
    compare.assert_close(rounded.output, exact_result.output, "output", results.unquantized(case))
    rows = rounded.expanded_idx_to_permuted_idx.max(initial=-1) + 1
    if rows:
        error = rounded.gemm2_output[:rows].astype(np.float32) - exact_result.gemm2_output[:rows]
        assert np.linalg.norm(error) > 1e-3 * np.linalg.norm(exact_result.gemm2_output), "nothing was rounded"


@pytest.mark.parametrize(
    ("packed", "expert", "weight"),
    [
        (0x00003F80, 0, 1.0),
        (0x00053F00, 5, 0.5),
        (0x00FF3E00, 255, 0.125),
        (0x0003BE80, 3, -0.25),
        (0xFFFF0000, -1, 0.0),
        (0x80004000, -32768, 2.0),
        (0x7FFF3F80, 32767, 1.0),
    ],
)
def test_packed_ids_have_a_signed_id_above_the_bits_of_the_weight(packed, expert, weight):
    ids, weights = reference.unpack_topk_ids(np.array([[packed]], np.uint32).view(np.int32))
    assert (ids[0, 0], weights[0, 0]) == (expert, weight)
    again = routings.pack(np.array([[expert]]), np.array([[weight]]))
    assert again.view(np.uint32)[0, 0] == packed


def test_quantization_reaches_the_largest_code_and_keeps_zero_blocks():
    x = np.zeros((3, 256), np.float32)
    x[0, 5], x[0, 6], x[1, 200], x[1, 3], x[1, 4] = -7, 3.5, 1e-44, np.nan, 1
    q, scale = reference.quantize_1x128(x)
    assert np.isnan(q[1, 3].astype(np.float32)) and (q[1, 4], scale[1, 0]) == (448, np.float32(1) / 448)
    assert (q[0, 5], q[0, 6], scale[0, 0]) == (-448, 224, np.float32(7) / 448)
    assert scale[1, 1] == np.finfo(np.float32).tiny and not np.any(q[2].astype(np.float32))


def test_quantization_rounds_to_nearest_even_and_saturates():
    x = np.full((1, 128), 448, np.float32)
    x[0, :6] = [17, 19, 21, -17, 447.99, 0.0009]
    q, _ = reference.quantize_1x128(x)
    assert q[0, :6].astype(np.float32).tolist() == [16, 20, 20, -16, 448, 0]
    assert np.all(np.isfinite(q.astype(np.float32)))


def test_permutation_sorts_by_expert_then_by_expanded_index():
    expanded_to_permuted, permuted_to_expanded = reference.permutation(np.array([2, -1, 0, 2, -1, 0, 1]))
    assert permuted_to_expanded.tolist() == [2, 5, 6, 0, 3]
    assert expanded_to_permuted.tolist() == [3, -1, 0, 4, -1, 1, 2]


def test_duplicate_slots_are_all_summed():
    case = cases.Case("", 4, 128, 128, 4, 3)
    given = cases.arrays(case)
    given["topk_ids"] = routings.pack(np.full((4, 3), 2), np.array([[0.5, 0.25, 0.125]] * 4))
    once = given | {"topk_ids": routings.pack(np.tile([2, -1, -1], (4, 1)), np.array([[0.875, 1, 1]] * 4))}
    several = cases.expected(case, given, requantize=False).output
    compare.assert_close(
        several, cases.expected(case, once, requantize=False).output, "output", compare.Tolerance(1e-6, 1e-5)
    )


def test_windows_that_cover_all_experts_sum_to_the_whole():
    whole = cases.Case("", 19, 128, 128, 4, 3, routing="mixed")
    given = cases.arrays(whole)
    parts = np.zeros((19, 128), np.float32)
    for offset, count in ((0, 1), (1, 2), (3, 1)):
        local = {name: given[name][offset : offset + count] for name in given if name.startswith("gemm")}
        case = cases.Case("", 19, 128, 128, 4, 3, (offset, count))
        parts += cases.expected(case, given | local, requantize=False).output
    expected = cases.expected(whole, given, requantize=False).output
    compare.assert_close(parts, expected, "sum over windows", compare.Tolerance(1e-6, 1e-5))


def test_extremes_reach_only_what_depends_on_them():
    """The token or expert that holds NaN has it in its output, and no other output changes."""
    for extreme, options, tokens, expert in (
        ("nan_x_scale", {}, [3], None),
        ("nan_x", {}, [2], None),
        ("nan_routing_weight", {}, [3], None),
        ("nan_apart_f32", cases.OPTIONS["apart_f32"], [3], None),
        ("nan_lora", cases.OPTIONS["lora"], [5], None),
        ("nan_gemm1_scale", {}, [], 2),
        ("nan_gemm1_code", {}, [], 1),
        ("nan_alpha", cases.OPTIONS["alpha"], [], 2),
        ("nan_beta", cases.OPTIONS["beta"], [], 2),
    ):
        plain = cases.Case("", 33, 256, 256, 8, 3, **options)
        given = cases.arrays(plain)
        clean = cases.expected(plain, given).output.astype(np.float32)
        ids = given["topk_ids"] if "topk_weights" in given else given["topk_ids"] >> 16
        touched = np.isin(np.arange(33), tokens) | (ids == expert).any(axis=1)
        case = cases.CASES[f"extreme_{extreme}"]
        output = cases.expected(case, cases.arrays(case)).output.astype(np.float32)
        assert np.array_equal(np.isnan(output).all(axis=1), touched), extreme
        assert np.array_equal(output[~touched], clean[~touched]), extreme


def test_layer_shapes_are_valid_problems():
    for name, shape in SHAPES.items():
        assert name == shape.name
        assert shape.hidden_size % 128 == 0 and shape.intermediate_size % 128 == 0
        assert 0 <= shape.local_expert_offset <= shape.num_experts - shape.local_num_experts
        assert 1 <= shape.top_k <= shape.num_experts


def test_case_names_are_unique():
    assert len(cases.CASES) == len(cases.SMALL) + len(cases.LARGE) == len(cases.ALL)


def test_every_two_choices_meet_in_a_case():
    """Of each two factors, each two choices: the rows of the table are not many more than the largest two need."""
    sizes = [len(factor) for factor in cases.FACTORS]
    rows = pairwise.rows(sizes)
    for (f, g), (i, j) in (
        (factors, choice)
        for factors in itertools.combinations(range(len(sizes)), 2)
        for choice in itertools.product(*(range(sizes[factor]) for factor in factors))
    ):
        assert any(row[f] == i and row[g] == j for row in rows), (f, i, g, j)
    assert len(rows) <= 1.5 * math.prod(sorted(sizes)[-2:])
