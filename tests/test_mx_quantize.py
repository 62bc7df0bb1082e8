"""mxfp8_quantize and its inverse, in JAX and in torch: the bits of the rule, which the reference states anew."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import jax_moe
from jax_moe import layout, reference

try:
    import torch
    import torch_calls

    import torch_facade
except ImportError:
    torch = None  # JAX is tested alone

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)


def of_jax(x: NDArray, swizzled: bool = False) -> tuple[NDArray, NDArray]:
    codes, scale = jax.jit(jax_moe.mxfp8_quantize, static_argnums=1)(x, swizzled)
    return np.asarray(codes), np.asarray(scale)


def of_torch(x: NDArray, swizzled: bool = False) -> tuple[NDArray, NDArray]:
    codes, scale = torch_facade.mxfp8_quantize(torch_calls.tensor(x), swizzled)
    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scale.numpy()


needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
both = pytest.mark.parametrize("quantize", [of_jax, pytest.param(of_torch, marks=needs_torch)])


def blocks(name: str) -> NDArray:
    """float32 [rows, 32] of a kind that goes wrong easily."""
    rng = np.random.default_rng(0)
    if name == "normal":
        x = rng.standard_normal((1024, 32)) * np.exp2(rng.uniform(-60, 60, (1024, 1)))
    elif name == "edges":  # largest values at and beside 448 times a power of two
        edge = np.float32(448) * np.exp2(np.arange(-120, 110, dtype=np.float32))
        largest = np.stack([np.nextafter(edge, 0), edge, np.nextafter(edge, np.float32(np.inf))]).reshape(-1, 1)
        x = np.concatenate([largest, largest * rng.uniform(-1, 1, (len(largest), 31))], axis=1)
    elif name == "ties":  # under a scale of one: every tie between two codes, and its neighbours
        values = np.unique(np.abs(E4M3.astype(np.float32)[~np.isnan(E4M3.astype(np.float32))]))
        ties = (values[1:] + values[:-1]) / 2
        every = np.concatenate([values, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(500))])
        every = np.resize(np.concatenate([every, -every]), (40, 31))
        x = np.concatenate([np.full((40, 1), 448), every], axis=1)
    elif name == "tiny":  # scales at the lower end, normal numbers only: XLA takes others for zeros
        x = np.ldexp(rng.uniform(1, 2, (256, 32)), rng.integers(-126, -115, (256, 32))) * rng.choice((1, -1), (256, 32))
    else:
        x = rng.standard_normal((64, 32))
        special = itertools.cycle((np.nan, np.inf, -np.inf, 0.0, -0.0, np.finfo(np.float32).max))
        for row in range(64):
            x[row, rng.integers(0, 32, 1 + row % 3)] = next(special)
        x[7], x[8], x[9] = 0, np.nan, np.inf
    return x.astype(np.float32)


def assert_same(found: tuple[NDArray, NDArray], expected: tuple[NDArray, NDArray]) -> None:
    """Bit for bit; a NaN may have either sign."""
    codes, scale = found
    assert (codes.dtype, scale.dtype) == (ml_dtypes.float8_e4m3fn, np.uint8)
    np.testing.assert_array_equal(scale, expected[1])
    nan = np.isnan(expected[0].astype(np.float32))
    np.testing.assert_array_equal(np.isnan(codes.astype(np.float32)), nan)
    np.testing.assert_array_equal(codes.view(np.uint8)[~nan], expected[0].view(np.uint8)[~nan])


@both
@pytest.mark.parametrize("name", ["normal", "edges", "ties", "tiny", "special"])
def test_the_rule_bit_for_bit(quantize: Any, name: str) -> None:
    x = blocks(name)
    x = x[: len(x) // 4 * 4].reshape(-1, 128)
    assert_same(quantize(x), reference.quantize_1x32(x))


@both
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_values_are_their_float32_values(quantize: Any, dtype: Any) -> None:
    x = np.random.default_rng(1).standard_normal((37, 96)).astype(dtype)
    if dtype == np.float16 and quantize is of_torch:
        codes, scale = torch_facade.mxfp8_quantize(torch.from_numpy(x), False)
        found = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scale.numpy()
    else:
        found = quantize(x)
    assert_same(found, reference.quantize_1x32(x.astype(np.float32)))


@both
@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 2, 5, 96), (0, 64), (130, 32)], ids=str)
def test_swizzled_scales_are_padded_and_interleaved(quantize: Any, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    _, plain = quantize(x)
    assert plain.shape == (*shape[:-1], shape[-1] // 32)
    rows, columns = plain.shape[-2:]
    padding = [(0, 0)] * (len(shape) - 2) + [(0, -rows % 128), (0, -columns % 4)]
    expected = layout.interleave_scales(np.pad(plain, padding))
    _, swizzled = quantize(x, True)
    np.testing.assert_array_equal(swizzled, expected.reshape(*shape[:-2], expected.shape[-2] * expected.shape[-1]))


def dequantized(codes: NDArray, scale: NDArray, swizzled: bool) -> list[NDArray]:
    """By JAX, and by torch where it is."""
    found = [np.asarray(jax_moe.mxfp8_dequantize(codes, scale, swizzled))]
    if torch is not None:
        tensors = torch_calls.tensor(codes), torch_calls.tensor(scale)
        found.append(torch_facade.mxfp8_dequantize_host(*tensors, swizzled).numpy())
    return found


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("shape", [(37, 96), (2, 5, 128)], ids=str)
def test_values_are_codes_times_powers_of_two(shape: tuple[int, ...], swizzled: bool) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(shape) * np.exp2(rng.integers(-40, 40, (*shape[:-1], 1)))).astype(np.float32)
    codes, scale = of_jax(x, swizzled)
    _, plain = of_jax(x, False)
    expected = codes.astype(np.float32) * np.repeat(np.exp2(plain.astype(np.float64) - 127), 32, axis=-1)
    for found in dequantized(codes, scale, swizzled):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, x, rtol=2**-4, atol=np.abs(x).max() * 2**-15)


def test_values_at_both_ends_of_the_scale() -> None:
    codes = np.resize(E4M3[1:0x7F], (4, 32))
    scale = np.array([[0], [120], [246], [255]], np.uint8)
    for found in dequantized(codes, scale, False):
        for row, byte in enumerate(scale[:3, 0]):
            expected = np.ldexp(codes[row].astype(np.float32), int(byte) - 127)
            normal = np.abs(expected) >= np.finfo(np.float32).tiny  # XLA may take others for zeros
            np.testing.assert_array_equal(found[row][normal], expected[normal])
        assert np.isnan(found[3]).all()


def test_a_grid_scales_32_rows() -> None:
    codes = np.resize(E4M3[:0x7F], (64, 96))
    grid = np.random.default_rng(4).integers(100, 150, (2, 3), np.uint8)
    found = jax_moe.mxfp8_dequantize(codes, grid.view(ml_dtypes.float8_e8m0fnu), False)
    expected = jax_moe.mxfp8_dequantize(codes, grid.repeat(32, axis=0), False)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@needs_torch
def test_columns_are_padded_to_the_alignment() -> None:
    x = torch.randn(3, 40)
    codes, scale = torch_facade.mxfp8_quantize(x, False, alignment=64)
    assert codes.shape == (3, 64) and scale.shape == (3, 2)
    expected = torch_facade.mxfp8_quantize(torch.nn.functional.pad(x, (0, 24)), False)
    for found, wanted in zip((codes, scale), expected, strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@needs_torch
def test_torch_codes_may_come_as_bytes_and_scales_in_any_shape() -> None:
    codes, scale = torch_facade.mxfp8_quantize(torch.randn(3, 64), False)
    expected = torch_facade.mxfp8_dequantize_host(codes, scale, False)
    for given in (scale.flatten(), scale.view(torch.float8_e8m0fnu)):
        assert torch.equal(torch_facade.mxfp8_dequantize_host(codes.view(torch.uint8), given, False), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jax_moe.mxfp8_quantize(np.zeros((3, 40), "f")), "mxfp8_quantize: x must be .* a multiple of 32"),
        (lambda: jax_moe.mxfp8_quantize(np.zeros(32, "f")), r"mxfp8_quantize: x must be \[..., rows, columns\]"),
        (lambda: jax_moe.mxfp8_quantize(np.zeros((3, 32))), "mxfp8_quantize: x must be a float32, bfloat16 or float16"),
        (
            lambda: jax_moe.mxfp8_dequantize(np.zeros((3, 32), "f"), np.zeros((3, 1), np.uint8)),
            "mxfp8_dequantize: codes must be float8_e4m3fn, got float32",
        ),
        (
            lambda: jax_moe.mxfp8_dequantize(E4M3.reshape(8, 32), np.zeros((8, 1), "f"), False),
            "mxfp8_dequantize: scale must be uint8 or float8_e8m0fnu, got float32",
        ),
        (
            lambda: jax_moe.mxfp8_dequantize(E4M3.reshape(8, 32), np.zeros((8, 1), np.uint8)),
            r"mxfp8_dequantize: scale must be \[512\] for codes \[8, 32\] .* got \[8, 1\]",
        ),
        (
            lambda: jax_moe.mxfp8_dequantize(E4M3.reshape(8, 32), np.zeros((4, 1), np.uint8), False),
            r"mxfp8_dequantize: scale must be \[8, 1\] for codes \[8, 32\]",
        ),
        (
            lambda: jax_moe.mxfp8_dequantize(np.resize(E4M3, (64, 32)), np.zeros((4, 1), np.uint8), False),
            r"mxfp8_dequantize: scale must be \[64, 1\] or \[2, 1\] for codes",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        call()


@needs_torch
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: torch_facade.mxfp8_quantize(torch.zeros(3)), "mxfp8_quantize: input must be .* got float32"),
        (lambda: torch_facade.mxfp8_quantize([1.0]), "mxfp8_quantize: input must be .* got list"),
        (
            lambda: torch_facade.mxfp8_quantize(torch.zeros(3, 32), False, 48),
            "mxfp8_quantize: alignment must be a multiple of 32, got 48",
        ),
        (
            lambda: torch_facade.mxfp8_dequantize_host(torch.zeros(3, 32), torch.zeros(3, dtype=torch.uint8)),
            "mxfp8_dequantize_host: input must be a float8_e4m3fn or uint8 tensor",
        ),
        (
            lambda: torch_facade.mxfp8_dequantize_host(torch.zeros(3, 32).byte(), torch.zeros(3).byte()),
            "mxfp8_dequantize_host: scale_tensor must be uint8 .* of 512 elements, .*, padded, got uint8",
        ),
        (
            lambda: torch_facade.mxfp8_dequantize_host(torch.zeros(3, 32).byte(), torch.zeros(3), False),
            "mxfp8_dequantize_host: scale_tensor must be uint8 .* of 3 elements, .* got float32",
        ),
    ],
)
def test_wrong_tensors_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        call()
