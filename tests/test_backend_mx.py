"""MxFp8 on the CPU backend: products exact in their scales, one quantiser, and no bit that a layout changes."""

from __future__ import annotations

import dataclasses

import cases
import compare
import ml_dtypes
import numpy as np
import pytest
from call import Call
from cases import CASES, MX, Case
from results import assert_same_results

from jax_moe import reference
from jax_moe.enums import ActivationType

WEIGHT_SCALES = ("gemm1_weights_scale", "gemm2_weights_scale")


@pytest.mark.parametrize("name", ["mx", "mx_relu2", "mx_lora_unfinalized", "mx_garbage_window"])
def test_a_layout_of_mxfp8_changes_no_bit(name):
    """Weights shuffled or not, scales in every order and dtype, and a grid as the rows that it stands for."""
    plain = CASES[name]
    expected = Call(plain).run()
    scales = [{}, {"scale_order": "padded"}, {"scale_order": "block_major"}, {"scale_dtype": "float8_e8m0fnu"}]
    for change in (change | {"shuffled": shuffled} for change in scales for shuffled in (False, True)):
        assert_same_results(Call(dataclasses.replace(plain, **change)).run(), expected)
    grid = dataclasses.replace(plain, scale_rows=32)
    expected = Call(grid).run()
    assert_same_results(Call(dataclasses.replace(grid, shuffled=True)).run(), expected)
    given = cases.arrays(grid)
    rows = {name: given[name].repeat(32, axis=1) for name in WEIGHT_SCALES}
    assert_same_results(Call(plain, given | rows).run(), expected)


@pytest.mark.parametrize("shift", [1, 31, 110, -1, -31, -100])
@pytest.mark.parametrize("name", ["mx_t8", "mx_relu2", "mx_grid", "mx_lora"])
def test_powers_of_two_that_move_from_weights_to_tokens_change_no_bit(name, shift):
    """Though the values of one side leave float32: only the product of two scales counts."""
    call = Call(CASES[name])
    given = dict(call.given)
    for array, sign in (("hidden_states_scale", 1), ("gemm1_weights_scale", -1)):
        moved = given[array].astype(np.int32)
        moved[..., 1::2] += sign * shift
        assert moved.min() >= 0 and moved.max() <= 254
        given[array] = moved.astype(np.uint8)
    assert_same_results(Call(CASES[name], given).run(), call.run())


def test_the_far_ends_of_both_scales_meet():
    """2^127 times 2^-127 is one, in either role."""
    case = Case("", 3, 128, 128, 1, 1, routing="one_expert", activation=ActivationType.Identity, **MX)
    given = cases.arrays(case)
    given["gemm2_weights_scale"] = np.full_like(given["gemm2_weights_scale"], 127)
    outputs = []
    for x_byte, w_byte in ((127, 127), (254, 0), (0, 254)):
        given["hidden_states_scale"] = np.full_like(given["hidden_states_scale"], x_byte)
        given["gemm1_weights_scale"] = np.full_like(given["gemm1_weights_scale"], w_byte)
        outputs.append(Call(case, given).run()["output"])
    assert np.all(np.isfinite(outputs[0].astype(np.float32))) and np.any(outputs[0])
    for output in outputs[1:]:
        compare.assert_same_bits(output, outputs[0], "output")


def test_zeros_under_the_largest_scales_are_zeros():
    case = Case("", 3, 128, 128, 1, 1, routing="one_expert", **MX)
    given = cases.arrays(case)
    given["hidden_states"] = np.zeros_like(given["hidden_states"])
    for name in ("hidden_states_scale", *WEIGHT_SCALES):
        given[name] = np.full_like(given[name], 254)
    assert not np.any(Call(case, given).run()["output"])


def odd_activations(rng):
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


def test_activations_are_quantised_by_the_rule_bit_for_bit():
    """Through an identity layer whose first product is zero, so that the activation is the delta."""
    x = odd_activations(np.random.default_rng(0))
    option = {"activation": ActivationType.Identity, "lora": True}
    case = Case("", len(x), 128, 256, 1, 1, routing="one_expert", **option, **MX)
    given = cases.arrays(case)
    given["hidden_states"] = np.zeros_like(given["hidden_states"])
    given["gemm1_lora_delta"] = x[:, None]
    results = Call(case, given).run()
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


def test_tokens_are_quantised_by_the_same_rule():
    """bfloat16 hidden states mean what their codes and scales mean, given from outside."""
    x = odd_activations(np.random.default_rng(1))
    inside = Case("", len(x), 256, 128, 2, 2, x_dtype="bfloat16", do_finalize=False, **MX)
    outside = dataclasses.replace(inside, x_dtype="float8_e4m3fn")
    given = cases.arrays(inside) | {"hidden_states": x}
    codes, scale = reference.quantize_1x32(x)
    codes = np.where(np.isnan(codes.astype(np.float32)), np.array(np.nan, codes.dtype), codes)
    quantised = given | {"hidden_states": codes, "hidden_states_scale": scale}
    for name, found in Call(inside, given).run().items():
        expected = Call(outside, quantised).run()[name]
        assert np.array_equal(np.isnan(found.astype(np.float32)), np.isnan(expected.astype(np.float32)))
        number = ~np.isnan(expected.astype(np.float32))
        assert np.array_equal(found[number], expected[number]), name
