"""prepare_mxfp8_weights, in JAX and in torch: folded as written down here anew, reported, refused; and then run."""

from __future__ import annotations

from typing import Any

import cases
import compare
import jax
import jax_calls
import ml_dtypes
import numpy as np
import pytest
from cases import MX, Case
from numpy.typing import NDArray

import jax_moe
from jax_moe import reference
from jax_moe.enums import ActivationType, Fp8QuantizationType

try:
    import torch
    import torch_calls

    import torch_facade
except ImportError:
    torch = None  # JAX is tested alone

NAMES = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
CASE = Case("prepare", 7, 256, 128, 3, 2, **MX)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grid": {"scale_rows": 32},
    "shuffled": {"shuffled": True},
    "shuffled_grid": {"scale_rows": 32, "shuffled": True},
    "shuffled_relu2": {"shuffled": True, "activation": ActivationType.Relu2},
    "e8m0": {"scale_dtype": "float8_e8m0fnu", "shuffled": True},
}


def of_jax(given: list[NDArray], **options: Any) -> tuple[list[NDArray], Any]:
    *arrays, report = jax_moe.prepare_mxfp8_weights(*given, **options)
    return [np.asarray(array) for array in arrays], report


def of_torch(given: list[NDArray], **options: Any) -> tuple[list[NDArray], Any]:
    *tensors, report = torch_facade.prepare_mxfp8_weights(*map(torch_calls.tensor, given), **options)
    codes = [tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) for tensor in tensors[::2]]
    return [codes[0], tensors[1].numpy(), codes[1], tensors[3].numpy()], report


needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
both = pytest.mark.parametrize("prepare", [of_jax, pytest.param(of_torch, marks=needs_torch)])


def weights_of(case: Case) -> list[NDArray]:
    arrays = cases.arrays(case)
    return [np.array(arrays[name]) for name in NAMES]


def options_of(case: Case) -> dict[str, Any]:
    return {"use_shuffled_weight": case.shuffled, "activation_type": case.activation}


def values(codes: NDArray, scale: NDArray) -> NDArray:
    """float64 values under E8M0 bytes for 1x32, or float32 scales for 128x128."""
    if scale.dtype == np.uint8:
        power = np.where(scale == 255, np.nan, np.exp2(scale.astype(np.float64) - 127))
        return codes.astype(np.float64) * np.repeat(power, 32, axis=-1)
    return codes.astype(np.float64) * scale.astype(np.float64).repeat(128, axis=-2).repeat(128, axis=-1)


def blocks_of(w: NDArray) -> NDArray:
    """[L, R, C] -> [number of 128x128 blocks, 128, 128]."""
    experts, rows, columns = w.shape
    return w.reshape(experts, rows // 128, 128, columns // 128, 128).swapaxes(2, 3).reshape(-1, 128, 128)


def folded(codes: NDArray, scale: NDArray) -> tuple[NDArray, NDArray]:
    """The rule in float64: codes and exponent of each 128x128 block."""
    old = blocks_of(values(codes, scale))
    largest = np.nan_to_num(np.abs(old), nan=0.0).max(axis=(1, 2))
    mantissa, exponent = np.frexp(largest / 448)
    exponent = np.where(largest > 0, np.clip(exponent - (mantissa == 0.5), -126, 127), 0)
    with np.errstate(all="ignore"):
        return np.ldexp(old, -exponent[:, None, None]).astype(np.float32).astype(ml_dtypes.float8_e4m3fn), exponent


def assert_folded(found: list[NDArray], given: list[NDArray]) -> None:
    for i in (0, 2):
        codes, exponent = folded(given[i], given[i + 1])
        np.testing.assert_array_equal(found[i + 1].reshape(-1), np.exp2(exponent.astype(np.float32)))
        new = blocks_of(found[i])
        nan = np.isnan(codes.astype(np.float32))
        assert np.array_equal(np.isnan(new.astype(np.float32)), nan)
        np.testing.assert_array_equal(new.view(np.uint8)[~nan], codes.view(np.uint8)[~nan])


def expected_report(found: list[NDArray], given: list[NDArray]) -> tuple[float, int, float]:
    """Share of values that changed, largest spread, largest change relative to the 32 of a scale."""
    changed, count, spread, relative = 0, 0, 0, 0.0
    for i in (0, 2):
        old, new = values(given[i], given[i + 1]), values(found[i], found[i + 1])
        change = np.nan_to_num(np.abs(new - old), nan=0.0)
        changed, count = changed + np.count_nonzero(change), count + change.size
        largest = np.nan_to_num(np.abs(old), nan=0.0).reshape(-1, 32).max(axis=1)
        live = largest > 0
        relative = max(relative, float((change.reshape(-1, 32).max(axis=1)[live] / largest[live]).max(initial=0)))
        exponents = blocks_of(np.where(live, given[i + 1].reshape(-1), np.nan).repeat(32).reshape(old.shape))
        known = exponents[~np.isnan(exponents).all(axis=(1, 2))]
        if len(known):
            spread = max(spread, int((np.nanmax(known, axis=(1, 2)) - np.nanmin(known, axis=(1, 2))).max()))
    return changed / count, spread, relative


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_every_layout_are_folded_by_the_rule(prepare: Any, layout: str) -> None:
    case = cases.dataclasses.replace(CASE, **LAYOUTS[layout])
    plain = weights_of(cases.dataclasses.replace(case, shuffled=False, scale_dtype="uint8"))
    if case.scale_rows == 32:
        plain = [array.repeat(32, axis=1) if i % 2 else array for i, array in enumerate(plain)]
    found, report = prepare(weights_of(case), **options_of(case))
    assert_folded(found, plain)
    share, spread, relative = expected_report(found, plain)
    assert (report.changed_share, report.max_exponent_spread) == (share, spread)
    assert report.max_relative_change == pytest.approx(relative, rel=1e-6)
    assert 0 < share < 0.01 and spread == 4 and 0 < relative < 2.0**-10


@both
def test_odd_scales_are_folded_by_the_rule(prepare: Any) -> None:
    given = weights_of(CASE)
    given[0][0, :128, :128] = 0  # a block of zeros
    given[0][1, 5, 7] = np.nan
    given[0][2, 3, :32], given[1][2, 3, 0] = 0, 250  # zeros under a large scale do not count
    given[1][1, 200, 1] = 255
    given[1][0, 130:, :] = 0  # the smallest scale
    given[1][1, :128, 4:] += 130  # the largest that fit
    given[2][0] = given[2][0].astype(np.float32) / 64  # codes that leave room in their block
    found, report = prepare(given, max_exponent_spread=300)
    assert_folded(found, given)
    assert found[1][0, 0, 0] == 1
    share, spread, relative = expected_report(found, given)
    assert (report.changed_share, report.max_exponent_spread) == (share, spread)
    assert report.max_relative_change == pytest.approx(relative, rel=1e-6)


@both
def test_codes_that_fit_are_folded_exactly(prepare: Any) -> None:
    """Codes from 8 on keep all their bits over 8 exponents."""
    given = weights_of(CASE)
    for i in (0, 2):
        given[i] = np.where(np.abs(given[i].astype(np.float32)) < 8, np.array(8, given[i].dtype), given[i])
        given[i + 1] = np.random.default_rng(i).integers(110, 119, given[i + 1].shape, np.uint8)
    found, report = prepare(given, max_exponent_spread=0)  # which is about codes that lose bits
    assert report == (0.0, 8, 0.0)
    for i in (0, 2):
        np.testing.assert_array_equal(values(found[i], found[i + 1]), values(given[i], given[i + 1]))


@both
def test_exponents_that_lie_too_far_apart_are_refused(prepare: Any) -> None:
    given = weights_of(CASE)
    given[3][1, 5, 2] = given[3].max() + 7
    words = (
        "prepare_mxfp8_weights: gemm2_weights_scale must be of exponents at most 8 apart within each 128x128 where "
        "codes lose bits, got 11 apart; call with MxFp8 and the weights as they are, or allow more with max_exponent_"
    )
    with pytest.raises(ValueError, match=f"^{words}"):
        prepare(given)
    found, report = prepare(given, max_exponent_spread=11)
    assert report.max_exponent_spread == 11
    assert_folded(found, given)


@needs_torch
def test_jax_and_torch_fold_to_the_same_bits() -> None:
    given = weights_of(CASE)
    (ours, our_report), (theirs, their_report) = of_jax(given), of_torch(given)
    assert our_report == their_report
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        compare.assert_same_bits(a, b, name)


@pytest.mark.parametrize("x_dtype", ["float8_e4m3fn", "bfloat16"])
def test_a_layer_on_prepared_weights_is_the_layer(x_dtype: str) -> None:
    """DeepSeekFp8 on them is what the reference makes of the MxFp8 weights, but for its own rounding."""
    case = Case("", 19, 384, 256, 8, 3, (2, 5), x_dtype=x_dtype, **MX)
    given = cases.arrays(case)
    exact = cases.expected(case, given, requantize=False).output
    x = given["hidden_states"]
    if x_dtype != "bfloat16":
        x = np.asarray(jax_moe.mxfp8_dequantize(x, given["hidden_states_scale"], False)).astype(ml_dtypes.bfloat16)
    prepared, _ = of_jax([given[name] for name in NAMES])
    changes = {"hidden_states": x, "hidden_states_scale": None} | dict(zip(NAMES, prepared, strict=True))
    option = {"fp8_quantization_type": Fp8QuantizationType.DeepSeekFp8}
    found = np.asarray(jax_calls.call(case, given | changes, **option))
    compare.assert_close(found, exact, "output", compare.UNQUANTIZED_MX)
    options = {name: value for name, value in case.options.items() if name != "do_finalize"} | option
    expected = reference.fp8_block_scale_routed_moe(
        **(given | changes), **options, num_experts=case.experts, local_expert_offset=case.offset
    )
    compare.assert_close(found, expected.output, "output")


W = weights_of(CASE)
REFUSED: list[tuple[dict[int, Any], dict[str, Any], str]] = [
    ({0: W[0].view(np.uint8)}, {}, "gemm1_weights must be float8_e4m3fn .experts, rows, columns., .* got uint8"),
    ({0: W[0][0]}, {}, "gemm1_weights must be float8_e4m3fn .experts"),
    ({2: W[2][:, :100]}, {}, "gemm2_weights must be .* multiples of 128, got float8_e4m3fn.3,100,128."),
    (
        {1: W[1][:, :8]},
        {},
        "gemm1_weights_scale must be uint8.3,256,8. or uint8.3,8,8. .or as float8_e8m0fnu., got .*8.$",
    ),
    ({3: W[3].astype(np.float32)}, {}, "gemm2_weights_scale must be uint8.* got float32.3,256,4."),
    ({3: W[3][:, :, :2]}, {}, "gemm2_weights_scale must be uint8.* got uint8.3,256,2."),
    ({}, {"activation_type": 5}, "activation_type must be one of ActivationType"),
    ({}, {"max_exponent_spread": -1}, "max_exponent_spread must be a non-negative integer, got -1"),
    ({}, {"max_exponent_spread": True}, "max_exponent_spread must be a non-negative integer, got True"),
    ({}, {"max_exponent_spread": 2.0}, "max_exponent_spread must be a non-negative integer, got 2.0"),
]


@both
@pytest.mark.parametrize(("changes", "options", "words"), REFUSED, ids=[words[:40] for _, _, words in REFUSED])
def test_what_does_not_fit_is_refused(
    prepare: Any, changes: dict[int, Any], options: dict[str, Any], words: str
) -> None:
    given = [changes.get(i, array) for i, array in enumerate(W)]
    if words.startswith("gemm1_weights_scale"):
        given[1] = given[1][:, :5]
    with pytest.raises(ValueError, match=f"^prepare_mxfp8_weights: {words}"):
        prepare(given, **options)


def test_kinds_of_arrays_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^prepare_mxfp8_weights: gemm1_weights must be an array, got list"):
        jax_moe.prepare_mxfp8_weights([1.0], *W[1:])
    with pytest.raises(
        ValueError, match="gemm1_weights must be a concrete array, got a traced one; prepare weights out"
    ):
        jax.jit(jax_moe.prepare_mxfp8_weights)(*W)


@needs_torch
def test_kinds_of_tensors_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^prepare_mxfp8_weights: gemm1_weights must be a torch.Tensor, got ndarray"):
        torch_facade.prepare_mxfp8_weights(*W)
