"""The reference means what the contract says: it is compared with float64 sums written out, and has its properties."""

from __future__ import annotations

import cases
import compare
import ml_dtypes
import numpy as np
import pytest
import routings

from jax_moe import reference
from jax_moe.shapes import SHAPES

FLOAT8, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def exact(case, given, requantize):
    """The op element by element in float64, one slot after the other, on dequantised operands."""
    block = 128
    x = given["hidden_states"].astype(np.float64)
    if given["hidden_states_scale"] is not None:
        x *= np.repeat(given["hidden_states_scale"].T, block, axis=1)
    w1, w2 = (
        given[name].astype(np.float64) * given[f"{name}_scale"].repeat(block, axis=1).repeat(block, axis=2)
        for name in ("gemm1_weights", "gemm2_weights")
    )
    result = np.zeros(x.shape)
    for (token, _), packed in np.ndenumerate(given["topk_ids"]):
        bits = int(packed) & 0xFFFFFFFF
        expert = bits >> 16 if bits < 2**31 else (bits >> 16) - 65536
        weight = float(np.array(bits & 0xFFFF, np.uint16).view(BFLOAT16))
        local = expert - case.offset
        if not (0 <= expert < case.experts and 0 <= local < case.local):
            continue
        up, gate = np.split(w1[local] @ x[token], 2)
        a = up * gate / (1 + np.exp(-gate))
        if requantize:
            for start in range(0, case.inter, block):
                part = a[start : start + block]
                scale = max(np.float32(np.abs(part).max()) / np.float32(448), np.float32(1.17549435e-38))
                part[:] = (part.astype(np.float32) / scale).astype(FLOAT8).astype(np.float64) * scale
        y = w2[local] @ a
        result[token] += weight * (y.astype(BFLOAT16).astype(np.float64) if requantize else y)
    return result


@pytest.mark.parametrize("routing", ["uniform", "duplicates", "invalid", "garbage", "padding"])
@pytest.mark.parametrize("window", [None, (1, 2)])
def test_equals_float64_sums_without_requantization(routing, window):
    case = cases.Case("", 5, 384, 256, 4, 3, window, routing, weights="signed")
    given = cases.arrays(case)
    actual = cases.expected(case, given, requantize=False).output
    compare.assert_close(actual, exact(case, given, False), "output", compare.Tolerance(1e-5, 1e-4))


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
    compare.assert_close(rounded.output, exact_result.output, "output", compare.UNQUANTIZED)
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
    x[0, 5], x[0, 6], x[1, 200] = -7, 3.5, 1e-44
    q, scale = reference.quantize_1x128(x)
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
    plain = cases.Case("", 33, 256, 256, 8, 3)
    clean = cases.expected(plain, cases.arrays(plain)).output.astype(np.float32)
    ids = reference.unpack_topk_ids(cases.arrays(plain)["topk_ids"])[0]
    for extreme, touched in (
        ("nan_x_scale", np.arange(33) == 3),
        ("nan_x", np.arange(33) == 2),
        ("nan_routing_weight", np.arange(33) == 3),
        ("nan_gemm1_scale", (ids == 2).any(axis=1)),
        ("nan_gemm1_code", (ids == 1).any(axis=1)),
    ):
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
    assert len(cases.CASES) == len(cases.SMALL) + len(cases.LARGE) == len(cases._small_cases() + cases._large_cases())
