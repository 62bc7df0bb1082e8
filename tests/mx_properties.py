"""What must hold of MxFp8 bit for bit, on every backend: no layout changes a bit, only the product of two scales
counts, and one quantiser.

Each takes `run`: what calls a backend with a case and its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cases
import compare
import ml_dtypes
import numpy as np
from cases import CASES, MX, Case
from numpy.typing import NDArray
from results import assert_same_results

from jax_moe import reference
from jax_moe.enums import ActivationType

Run = Callable[[Case, cases.Arrays], dict[str, NDArray]]
Check = Callable[[Run], None]
WEIGHT_SCALES = ("gemm1_weights_scale", "gemm2_weights_scale")
LAYOUTS = ("mx", "mx_relu2", "mx_lora_unfinalized", "mx_garbage_window")
SHIFTS = (1, 31, 110, -1, -31, -100)
MOVED = ("mx_t8", "mx_relu2", "mx_grid", "mx_lora")


def a_layout_changes_no_bit(run: Run, name: str) -> None:
    """Weights shuffled or not, scales in every order and dtype, and a grid as the rows that it stands for."""
    plain = CASES[name]
    expected = run(plain, cases.arrays(plain))
    scales = [{}, {"scale_order": "padded"}, {"scale_order": "block_major"}, {"scale_dtype": "float8_e8m0fnu"}]
    for change in (change | {"shuffled": shuffled} for change in scales for shuffled in (False, True)):
        case = dataclasses.replace(plain, **change)
        assert_same_results(run(case, cases.arrays(case)), expected)
    grid = dataclasses.replace(plain, scale_rows=32)
    given = cases.arrays(grid)
    expected = run(grid, given)
    shuffled = dataclasses.replace(grid, shuffled=True)
    assert_same_results(run(shuffled, cases.arrays(shuffled)), expected)
    rows = {name: given[name].repeat(32, axis=1) for name in WEIGHT_SCALES}
    assert_same_results(run(plain, given | rows), expected)


def powers_of_two_may_move_from_weights_to_tokens(run: Run, name: str, shift: int) -> None:
    """Though the values of one side leave float32: only the product of two scales counts."""
    case = CASES[name]
    given = cases.arrays(case)
    expected = run(case, given)
    for array, sign in (("hidden_states_scale", 1), ("gemm1_weights_scale", -1)):
        moved = given[array].astype(np.int32)
        moved[..., 1::2] += sign * shift
        assert moved.min() >= 0 and moved.max() <= 254
        given[array] = moved.astype(np.uint8)
    assert_same_results(run(case, given), expected)


def the_far_ends_of_both_scales_meet(run: Run) -> None:
    """2^127 times 2^-127 is one, in either role."""
    case = Case("", 3, 128, 128, 1, 1, routing="one_expert", activation=ActivationType.Identity, **MX)
    given = cases.arrays(case)
    given["gemm2_weights_scale"] = np.full_like(given["gemm2_weights_scale"], 127)
    outputs = []
    for x_byte, w_byte in ((127, 127), (254, 0), (0, 254)):
        given["hidden_states_scale"] = np.full_like(given["hidden_states_scale"], x_byte)
        given["gemm1_weights_scale"] = np.full_like(given["gemm1_weights_scale"], w_byte)
        outputs.append(run(case, given)["output"])
    assert np.all(np.isfinite(outputs[0].astype(np.float32))) and np.any(outputs[0])
    for output in outputs[1:]:
        compare.assert_same_bits(output, outputs[0], "output")


def zeros_under_the_largest_scales_are_zeros(run: Run) -> None:
    case = Case("", 3, 128, 128, 1, 1, routing="one_expert", **MX)
    given = cases.arrays(case)
    given["hidden_states"] = np.zeros_like(given["hidden_states"])
    for name in ("hidden_states_scale", *WEIGHT_SCALES):
        given[name] = np.full_like(given[name], 254)
    assert not np.any(run(case, given)["output"])


def odd_activations(rng: np.random.Generator) -> NDArray:
    """bfloat16 [rows, 256]: largest values at and beside 448 times a power of two, and what is not ordinary."""
    edges = np.float32(448) * np.exp2(np.arange(-140, 110, dtype=np.float32))
    beside = edges.astype(ml_dtypes.bfloat16).view(np.int16)[:, None] + np.array([-1, 0, 1], np.int16)
    largest = beside.reshape(-1, 1).view(ml_dtypes.bfloat16).astype(np.float32)
    blocks = np.concatenate([largest, largest * rng.uniform(-1, 1, (len(largest), 31))], axis=1)
    odd = rng.standard_normal((18, 32)).astype(np.float32)
    for row, value in enumerate((np.nan, np.inf, -np.inf, 0, 2.0**-133, -(2.0**-130), 3e38)):
        odd[row, : 1 + 5 * row] = value
    odd[7], odd[8], odd[9] = 0, np.nan, np.inf
    odd[10:12] *= np.float32(2.0**-131)
    return np.concatenate([blocks, odd]).astype(ml_dtypes.bfloat16).reshape(-1, 256)


def activations_are_quantised_by_the_rule(run: Run) -> None:
    """Through an identity layer whose first product is zero, so that the activation is the delta."""
    x = odd_activations(np.random.default_rng(0))
    option = {"activation": ActivationType.Identity, "lora": True}
    case = Case("", len(x), 128, 256, 1, 1, routing="one_expert", **option, **MX)
    given = cases.arrays(case)
    given["hidden_states"] = np.zeros_like(given["hidden_states"])
    given["gemm1_lora_delta"] = x[:, None]
    results = run(case, given)
    assert np.array_equal(results["expanded_idx_to_permuted_idx"], np.arange(len(x)))
    codes, scale = reference.quantize_1x32(x.astype(np.float32) + np.float32(0))  # -0 plus a product of 0 is 0
    np.testing.assert_array_equal(
        results["gemm1_activation_scale"].swapaxes(0, 1)[: len(x)].reshape(scale.shape), scale
    )
    assert np.isin([0, 1, 120, 230, 247, 255], scale).all()
    nan = np.isnan(codes.astype(np.float32))
    found = results["gemm1_activation_output"]
    assert np.array_equal(np.isnan(found.view(ml_dtypes.float8_e4m3fn).astype(np.float32)), nan)
    np.testing.assert_array_equal(found[~nan], codes.view(np.uint8)[~nan])


def tokens_are_quantised_by_the_rule(run: Run) -> None:
    """bfloat16 hidden states mean what their codes and scales mean, given from outside."""
    x = odd_activations(np.random.default_rng(1))
    inside = Case("", len(x), 256, 128, 2, 2, x_dtype="bfloat16", do_finalize=False, **MX)
    outside = dataclasses.replace(inside, x_dtype="float8_e4m3fn")
    given = cases.arrays(inside) | {"hidden_states": x}
    codes, scale = reference.quantize_1x32(x)
    codes = np.where(np.isnan(codes.astype(np.float32)), np.array(np.nan, codes.dtype), codes)
    quantised = given | {"hidden_states": codes, "hidden_states_scale": scale}
    wanted = run(outside, quantised)
    for name, found in run(inside, given).items():
        expected = wanted[name]
        assert np.array_equal(np.isnan(found.astype(np.float32)), np.isnan(expected.astype(np.float32)))
        number = ~np.isnan(expected.astype(np.float32))
        assert np.array_equal(found[number], expected[number]), name


CHECKS = (
    the_far_ends_of_both_scales_meet,
    zeros_under_the_largest_scales_are_zeros,
    activations_are_quantised_by_the_rule,
    tokens_are_quantised_by_the_rule,
)
