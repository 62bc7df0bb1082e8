"""Quantisers of the DeepSeekFp8 format: float8_e4m3fn codes with float32 scales, value = code x scale.

Activations share a scale per 1x128 (one token, 128 columns), weights per 128x128. One rule for both:
scale = max(largest magnitude / 448, smallest normal float32), code = e4m3(value / scale), to nearest even, saturating.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .problem import SCALE_BLOCK

E4M3_MAX = 448.0
MIN_SCALE = 1.17549435e-38  # smallest normal float32
SMALLEST_NORMAL_E4M3 = 2.0**-6  # below it, codes are 2^-9 apart


def quantize_activations(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Activations in the format that fp8_block_scale_routed_moe takes.

    x: float32, bfloat16 or float16 [num_tokens, hidden_size], hidden_size a multiple of 128.
    Returns (float8_e4m3fn [num_tokens, hidden_size], float32 scale [hidden_size/128, num_tokens]).
    A NaN stays NaN and leaves its block's scale alone; an infinity becomes NaN and the rest of its block 0 with an
    infinite scale. On CPUs the result is the correctly rounded one, bit for bit; on a GPU XLA divides with an error of
    up to 2 ulp, which may move a value that lies on a rounding boundary by one code. XLA takes magnitudes below
    1.18e-38 (denormal numbers) for zeros on CPUs.
    Raises ValueError for another dtype, rank or hidden_size.
    """
    x = _floats("quantize_activations", "x", x)
    if x.ndim != 2 or x.shape[1] % SCALE_BLOCK:
        raise _shape_error("quantize_activations", "x", "[num_tokens, hidden_size]", "hidden_size", x)
    blocks = x.reshape(x.shape[0], x.shape[1] // SCALE_BLOCK, SCALE_BLOCK)
    codes, scale = _quantize_blocks(blocks, (2,))
    return codes.reshape(x.shape), scale[:, :, 0].T


def quantize_weights(w: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Weights in the format that fp8_block_scale_routed_moe takes.

    w: float32, bfloat16 or float16 [..., rows, columns], both multiples of 128; leading dimensions (experts) are free.
    Returns (float8_e4m3fn [..., rows, columns], float32 scale [..., rows/128, columns/128]).
    NaN, infinity and devices: see quantize_activations.
    Raises ValueError for another dtype, rank or size.
    """
    w = _floats("quantize_weights", "w", w)
    if w.ndim < 2 or w.shape[-2] % SCALE_BLOCK or w.shape[-1] % SCALE_BLOCK:
        raise _shape_error("quantize_weights", "w", "[..., rows, columns]", "rows and columns", w)
    *lead, rows, columns = w.shape
    blocks = w.reshape(*lead, rows // SCALE_BLOCK, SCALE_BLOCK, columns // SCALE_BLOCK, SCALE_BLOCK)
    codes, scale = _quantize_blocks(blocks, (-3, -1))
    return codes.reshape(w.shape), scale[..., :, 0, :, 0]


def dequantize_activations(codes: ArrayLike, scale: ArrayLike) -> jax.Array:
    """float8_e4m3fn [num_tokens, hidden_size] and float32 scale [hidden_size/128, num_tokens] -> their float32 values.

    Raises ValueError for other dtypes or shapes.
    """
    codes, scale = _codes("dequantize_activations", codes, scale)
    fits = codes.ndim == 2 and scale.ndim == 2 and codes.shape == (scale.shape[1], scale.shape[0] * SCALE_BLOCK)
    if not fits:
        raise ValueError(
            "dequantize_activations: scale must be [hidden_size/128, num_tokens] of codes [num_tokens, hidden_size], "
            f"got {list(scale.shape)} for {list(codes.shape)}"
        )
    return codes.astype(jnp.float32) * jnp.repeat(scale.T, SCALE_BLOCK, axis=1)


def dequantize_weights(codes: ArrayLike, scale: ArrayLike) -> jax.Array:
    """float8_e4m3fn [..., rows, columns] and float32 scale [..., rows/128, columns/128] -> their float32 values.

    Raises ValueError for other dtypes or shapes.
    """
    codes, scale = _codes("dequantize_weights", codes, scale)
    fits = codes.ndim >= 2 and codes.ndim == scale.ndim and codes.shape[:-2] == scale.shape[:-2]
    if not fits or codes.shape[-2:] != (scale.shape[-2] * SCALE_BLOCK, scale.shape[-1] * SCALE_BLOCK):
        raise ValueError(
            "dequantize_weights: scale must be [..., rows/128, columns/128] of codes [..., rows, columns], "
            f"got {list(scale.shape)} for {list(codes.shape)}"
        )
    return codes.astype(jnp.float32) * jnp.repeat(jnp.repeat(scale, SCALE_BLOCK, axis=-2), SCALE_BLOCK, axis=-1)


def _quantize_blocks(blocks: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Codes of `blocks`, whose `axes` share a scale, and those scales with `axes` kept as 1."""
    blocks = blocks.astype(jnp.float32)
    is_nan = jnp.isnan(blocks)
    amax = jnp.max(jnp.where(is_nan, 0.0, jnp.abs(blocks)), axis=axes, keepdims=True, initial=0.0)
    # NOTE: XLA turns a division by a constant or by a broadcast array into a multiplication with the reciprocal, which
    # rounds twice. A divisor that is chosen per element keeps it a division; neither choice changes a result.
    scale = jnp.maximum(amax / jnp.where(jnp.isinf(amax), 1.0, E4M3_MAX), MIN_SCALE)
    return _to_e4m3(blocks / jnp.where(is_nan, 1.0, scale)), scale


def _to_e4m3(x: jax.Array) -> jax.Array:
    """float32 -> float8_e4m3fn, to nearest even, saturating, NaN stays NaN.

    Rounded before the conversion, so that whatever type a backend converts through cannot round a second time.
    """
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    step = SMALLEST_NORMAL_E4M3 / 8
    subnormal = jax.lax.round(x * (1 / step), jax.lax.RoundingMethod.TO_NEAREST_EVEN) * step
    rounded = jnp.where(jnp.abs(x) < SMALLEST_NORMAL_E4M3, subnormal, normal)
    return jnp.clip(rounded, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def _floats(function: str, argument: str, value: ArrayLike) -> jax.Array:
    dtype = getattr(value, "dtype", None)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"{function}: {argument} must be a float32, bfloat16 or float16 array, got {dtype or type(value).__name__}"
        )
    return jnp.asarray(value)


def _codes(function: str, codes: ArrayLike, scale: ArrayLike) -> tuple[jax.Array, jax.Array]:
    for argument, value, expected in (("codes", codes, jnp.float8_e4m3fn), ("scale", scale, jnp.float32)):
        dtype = getattr(value, "dtype", None)
        if dtype != expected:
            raise ValueError(
                f"{function}: {argument} must be {jnp.dtype(expected).name}, got {dtype or type(value).__name__}"
            )
    return jnp.asarray(codes), jnp.asarray(scale)


def _shape_error(function: str, argument: str, shape: str, sizes: str, value: jax.Array) -> ValueError:
    return ValueError(
        f"{function}: {argument} must be {shape} with {sizes} a multiple of {SCALE_BLOCK} (pad with zeros), "
        f"got {list(value.shape)}"
    )
