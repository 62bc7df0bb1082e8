"""quantize_activations and quantize_weights: the bits of the rule, which numpy states here anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_same_bits
from numpy.typing import NDArray

from jax_moe import quantize

TINY = np.finfo(np.float32).tiny
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
NAMES = ("normal", "any bits", "few bits", "ties", "near ties", "tiny", "special")  # of rows()


def expected_blocks(blocks: NDArray) -> tuple[NDArray, NDArray]:
    """Codes and scales of [number of blocks, elements]; NaN elements do not count for the scale."""
    with np.errstate(all="ignore"):
        magnitude = np.where(np.isnan(blocks), 0, np.abs(blocks))
        scale = np.maximum(magnitude.max(axis=1) / np.float32(448), TINY)
        return (blocks / scale[:, None]).astype(ml_dtypes.float8_e4m3fn), scale


def midpoints() -> NDArray:
    """Every tie between two neighbouring codes, and its float32 neighbours."""
    values = np.unique(np.abs(E4M3[~np.isnan(E4M3.astype(np.float32))].astype(np.float32)))
    ties = (values[1:] + values[:-1]) / 2
    every = np.concatenate([values, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(500))])
    return np.concatenate([every, -every]).astype(np.float32)


def rows(name: str) -> NDArray:
    """float32 [rows, 128] of a kind that rounding goes wrong with."""
    rng = np.random.default_rng(0)
    if name == "normal":
        return rng.standard_normal((1024, 128)).astype(np.float32) * np.exp2(rng.uniform(-20, 20, (1024, 1))).astype(
            "f"
        )
    if name == "any bits":
        return rng.integers(0, 2**32, (1024, 128), np.uint32).view(np.float32)
    if name == "few bits":  # quotients that fall on ties
        return (rng.integers(-64, 65, (1024, 128)) * np.exp2(rng.integers(-8, 9, (1024, 128)))).astype(np.float32)
    if name == "ties":  # the scale is a power of two: a maximum of 448 times it
        every = midpoints()
        every = np.pad(every, (0, -len(every) % 127)).reshape(-1, 127)
        block = np.concatenate([np.full((len(every), 1), 448, np.float32), every], axis=1)
        return np.concatenate([block * np.float32(2.0**power) for power in (0, -3, 10, -100)])
    if name == "near ties":  # under a scale of 24 bits, where a reciprocal rounds to the other side
        every = np.resize(midpoints(), (1024, 127))
        block = np.concatenate([np.full((1024, 1), 448, np.float32), every], axis=1)
        return block * rng.uniform(1, 2, (1024, 1)).astype(np.float32)
    if name == "tiny":  # quotients by 448 below the smallest normal; XLA takes denormal elements for zeros
        exponent = rng.integers(-126, -110, (256, 128))
        return np.ldexp(rng.uniform(1, 2, (256, 128)), exponent).astype(np.float32) * rng.choice(
            (1, -1), (256, 128)
        ).astype("f")
    block = rng.standard_normal((64, 128)).astype(np.float32)
    special = itertools.cycle((np.nan, np.inf, -np.inf, 0.0, -0.0, np.finfo(np.float32).max))
    for row in range(64):
        block[row, rng.integers(0, 128, 1 + row % 3)] = next(special)
    block[7] = 0
    block[8] = np.nan
    return block


def assert_same_codes(actual: Any, expected: NDArray, what: str) -> None:
    """Bit for bit; a NaN may have either sign."""
    actual = np.asarray(actual)
    both_nan = np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    assert_same_bits(np.where(both_nan, expected, actual), expected, what)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", (jax.jit, lambda f: f), ids=("jit", "eager"))
def test_activations_follow_the_rule_bit_for_bit(name: str, compiled: Callable) -> None:
    x = rows(name)
    x = x[: len(x) // 4 * 4].reshape(-1, 4 * 128)
    codes, scale = compiled(quantize.quantize_activations)(x)
    expected_codes, expected_scale = expected_blocks(x.reshape(-1, 128))
    assert codes.shape == x.shape and scale.shape == (4, len(x))
    assert_same_bits(np.asarray(scale), np.ascontiguousarray(expected_scale.reshape(-1, 4).T), f"{name}: scale")
    assert_same_codes(codes, expected_codes.reshape(x.shape), f"{name}: codes")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ulps", (-40, -2, 1, 2, 40))
def test_no_bit_depends_on_how_exactly_xla_divides(name: str, ulps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_divide", lambda x, y: (x / y) * jnp.float32(1 + ulps * 2.0**-23))
    x = rows(name)
    codes, scale = jax.jit(lambda x: quantize.quantize_activations(x))(x)
    expected_codes, expected_scale = expected_blocks(x)
    assert_same_bits(np.asarray(scale)[0], expected_scale, f"{name}: scale")
    assert_same_codes(codes, expected_codes, f"{name}: codes")


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16))
def test_narrow_activations_are_their_float32_values(dtype: Any) -> None:
    x = np.random.default_rng(1).standard_normal((37, 256)).astype(dtype)
    narrow, wide = (jax.jit(quantize.quantize_activations)(v) for v in (x, x.astype(np.float32)))
    for actual, expected in zip(narrow, wide, strict=True):
        assert_same_bits(np.asarray(actual), np.asarray(expected), str(dtype))


@pytest.mark.parametrize("lead", ((), (3,), (2, 2)))
def test_weights_follow_the_rule_bit_for_bit(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((*lead, 384, 256)).astype(np.float32)
    w.reshape(-1)[rng.integers(0, w.size, 5)] = (np.nan, np.inf, -np.inf, 1e30, 0)
    codes, scale = jax.jit(quantize.quantize_weights)(w)
    assert codes.shape == w.shape and scale.shape == (*lead, 3, 2)
    blocks = np.moveaxis(w.reshape(-1, 3, 128, 2, 128), 3, 2)
    expected_codes, expected_scale = expected_blocks(blocks.reshape(-1, 128 * 128))
    assert_same_bits(np.asarray(scale), expected_scale.reshape(scale.shape), "scale")
    assert_same_codes(codes, np.moveaxis(expected_codes.reshape(blocks.shape), 2, 3).reshape(w.shape), "codes")


def test_every_code_survives_a_round_trip() -> None:
    codes = np.resize(E4M3[~np.isnan(E4M3.astype(np.float32))], (128, 256))
    codes[:, ::128] = 448  # so that the scale comes out as it went in
    scale = np.exp2(np.random.default_rng(3).integers(-100, 100, (2, 128))).astype(np.float32)
    again, same_scale = quantize.quantize_activations(quantize.dequantize_activations(codes, scale))
    assert_same_bits(np.asarray(again), codes, "codes")
    assert_same_bits(np.asarray(same_scale), scale, "scale")
    tiles, grid = np.stack([codes, codes]), scale[:, :2].reshape(2, 1, 2)
    again, same_scale = quantize.quantize_weights(quantize.dequantize_weights(tiles, grid))
    assert_same_bits(np.asarray(again), tiles, "weight codes")
    assert_same_bits(np.asarray(same_scale), grid, "weight scale")


def test_nothing_is_quantised_to_nothing() -> None:
    codes, scale = quantize.quantize_activations(np.zeros((0, 256), np.float32))
    assert codes.shape == (0, 256) and scale.shape == (2, 0)


def test_wrong_arrays_are_refused() -> None:
    words = (
        r"x must be \[num_tokens, hidden_size\] with hidden_size a multiple of 128 \(pad with zeros\), got \[3, 100\]"
    )
    with pytest.raises(ValueError, match=rf"^quantize_activations: {words}"):
        quantize.quantize_activations(np.zeros((3, 100), np.float32))
    with pytest.raises(ValueError, match=r"^quantize_activations: x must be a float32, bfloat16 or float16 array"):
        quantize.quantize_activations(np.zeros((3, 128)))
    with pytest.raises(
        ValueError, match=r"^quantize_weights: w .* rows and columns a multiple of 128 .*, got \[2, 130, 128\]"
    ):
        quantize.quantize_weights(jnp.zeros((2, 130, 128)))
    codes = jnp.zeros((3, 256), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^dequantize_activations: scale must be .* got \[3, 2\] for \[3, 256\]"):
        quantize.dequantize_activations(codes, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"^dequantize_weights: codes must be float8_e4m3fn, got float32"):
        quantize.dequantize_weights(jnp.zeros((128, 128)), jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"^dequantize_weights: scale must be"):
        quantize.dequantize_weights(jnp.zeros((2, 128, 128), jnp.float8_e4m3fn), jnp.zeros((1, 1)))
