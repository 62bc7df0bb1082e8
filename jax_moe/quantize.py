"""Quantisers: float8_e4m3fn codes under scales, value = code x scale, codes to nearest even, saturating.

DeepSeekFp8: scales are float32, one per 1x128 (one token, 128 columns) of activations and per 128x128 of weights,
max(largest magnitude / 448, smallest normal float32). MxFp8: scales are powers of two as E8M0 bytes, one per 1x32, the
smallest that is at least largest magnitude / 448.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from . import layout
from .problem import E8M0, MX_SCALE_BLOCK, SCALE_BLOCK

E4M3_MAX = 448.0
MIN_SCALE = 1.17549435e-38  # smallest normal float32
SMALLEST_NORMAL_E4M3 = 2.0**-6  # below it, codes are 2^-9 apart
SMALL = 2.0**-64  # float32 below it is scaled up before its remainders are taken
MX_NAN = 255  # the E8M0 byte


def quantize_activations(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Activations in the format that fp8_block_scale_routed_moe takes.

    x: float32, bfloat16 or float16 [num_tokens, hidden_size], hidden_size a multiple of 128.
    Returns (float8_e4m3fn [num_tokens, hidden_size], float32 scale [hidden_size/128, num_tokens]).
    A NaN stays NaN and leaves its block's scale alone; an infinity becomes NaN and the rest of its block 0 with an
    infinite scale. The result is the correctly rounded one, bit for bit, the same as inside the call, also where XLA
    divides approximately. XLA takes magnitudes below 1.18e-38 (denormal numbers) for zeros on CPUs.
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


def mxfp8_quantize(x: ArrayLike, is_sf_swizzled_layout: bool = True) -> tuple[jax.Array, jax.Array]:
    """Activations or weights in the MxFp8 format.

    x: float32, bfloat16 or float16 [..., rows, columns], columns a multiple of 32.
    Returns (float8_e4m3fn [..., rows, columns], uint8 scale), E8M0 bytes b for 2^(b-127). The scale is
    [..., rows, columns/32], or with is_sf_swizzled_layout that padded with zeros to multiples of 128 rows and 4
    columns, in the 128x4 order, flat: [..., bytes]. The function of the op takes the plain one of hidden_states, and of
    weights the plain one or what `shuffle_matrix_sf_a` makes of it.
    A NaN stays NaN and leaves its block's scale alone; an infinity makes its whole block NaN, the scale (255) too; a
    block of zeros has scale 0. XLA takes magnitudes below 1.18e-38 (denormal numbers) for zeros on CPUs.
    Raises ValueError for another dtype, rank or number of columns.
    """
    x = _floats("mxfp8_quantize", "x", x)
    if x.ndim < 2 or x.shape[-1] % MX_SCALE_BLOCK:
        raise ValueError(
            f"mxfp8_quantize: x must be [..., rows, columns] with columns a multiple of {MX_SCALE_BLOCK} (pad with "
            f"zeros), got {list(x.shape)}"
        )
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // MX_SCALE_BLOCK, MX_SCALE_BLOCK)
    amax = jnp.max(jnp.where(jnp.isnan(blocks), 0.0, jnp.abs(blocks)), axis=-1, initial=0.0)
    scale = jnp.where(jnp.isinf(amax), MX_NAN, jnp.maximum(mx_exponent(amax) + 127, 0))
    inverse = jnp.where(scale == MX_NAN, jnp.nan, power_of_two(127 - scale))
    codes = to_e4m3(blocks * inverse[..., None]).reshape(x.shape)
    scale = scale.astype(jnp.uint8)
    return codes, _swizzled(scale) if is_sf_swizzled_layout else scale


def mxfp8_dequantize(codes: ArrayLike, scale: ArrayLike, is_sf_swizzled_layout: bool = True) -> jax.Array:
    """float8_e4m3fn [..., rows, columns] and E8M0 scale (uint8 or float8_e8m0fnu) -> their float32 values.

    The scale is as `mxfp8_quantize` returns it; the plain one may also be [..., rows/32, columns/32], one for 32x32.
    Raises ValueError for other dtypes or shapes.
    """
    codes, scale = _mx_codes("mxfp8_dequantize", codes, scale)
    *lead, rows, columns = codes.shape if codes.ndim >= 2 else (0, 0)
    blocks = columns // MX_SCALE_BLOCK
    shapes = [(*lead, rows, blocks)]
    if rows % MX_SCALE_BLOCK == 0:
        shapes.append((*lead, rows // MX_SCALE_BLOCK, blocks))
    if is_sf_swizzled_layout:
        shapes = [(*lead, _padded(rows, layout.SCALE_ROWS) * _padded(blocks, layout.SCALE_COLUMNS))]
    if codes.ndim < 2 or columns % MX_SCALE_BLOCK or scale.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"mxfp8_dequantize: scale must be {expected} for codes {list(codes.shape)} (columns a multiple of "
            f"{MX_SCALE_BLOCK}), got {list(scale.shape)}"
        )
    if is_sf_swizzled_layout:
        tiles = (*lead, _padded(rows, layout.SCALE_ROWS), _padded(blocks, layout.SCALE_COLUMNS))
        scale = layout.deinterleave_scales(scale.reshape(tiles))[..., :rows, :blocks]
    elif scale.shape != shapes[0]:
        scale = jnp.repeat(scale, MX_SCALE_BLOCK, axis=-2)
    exponent = jnp.repeat(scale.astype(jnp.int32) - 127, MX_SCALE_BLOCK, axis=-1)
    half = exponent >> 1  # NOTE: 2^-127 at once is denormal, a zero for XLA on CPUs
    values = codes.astype(jnp.float32) * power_of_two(half) * power_of_two(exponent - half)
    return jnp.where(exponent == MX_NAN - 127, jnp.nan, values)


def mx_exponent(amax: jax.Array) -> jax.Array:
    """The smallest e with amax <= 448 x 2^e, for finite normal float32 amax; of zero it is below -127. int32."""
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    # amax = 1.m x 2^k, and 448 = 1.75 x 2^8.
    return (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent in float32, for int32 exponents from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _swizzled(scale: jax.Array) -> jax.Array:
    """[..., rows, columns] padded and in the 128x4 order, flat."""
    *lead, rows, columns = scale.shape
    more = (_padded(rows, layout.SCALE_ROWS) - rows, _padded(columns, layout.SCALE_COLUMNS) - columns)
    padded = jnp.pad(scale, [*((0, 0) for _ in lead), (0, more[0]), (0, more[1])])
    return layout.interleave_scales(padded).reshape(*lead, padded.shape[-2] * padded.shape[-1])


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _quantize_blocks(blocks: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Codes of `blocks`, whose `axes` share a scale, and those scales with `axes` kept as 1."""
    blocks = blocks.astype(jnp.float32)
    amax = jnp.max(jnp.where(jnp.isnan(blocks), 0.0, jnp.abs(blocks)), axis=axes, keepdims=True, initial=0.0)
    scale = jnp.maximum(_divided_by_448(amax), MIN_SCALE)
    return to_e4m3(_quotient_between_codes(blocks, scale)), scale


# NOTE: XLA's quotient is not the correctly rounded one: it multiplies with reciprocals, and divides approximately on a
# GPU. The two functions below take any quotient that is right to some bits and repair it by its exact remainder.
def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, within a few ulp."""
    return x / y


def _divided_by_448(x: jax.Array) -> jax.Array:
    """x / 448 rounded once, for x >= 0, if that is a normal number. No quotient by 7 x 2^6 lies near a tie."""
    normal = jnp.where(x < SMALL, 1 / SMALL, 1.0)  # where remainders would be denormal
    quotient = _divide(x * normal, E4M3_MAX)
    repaired = quotient + _divide(_remainder(x * normal, quotient, E4M3_MAX), E4M3_MAX)
    return jnp.where(jnp.isinf(x), x, repaired / normal)


def _quotient_between_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """What e4m3 rounds as it does x / scale rounded to float32: a number on the same side of every tie of two codes.

    In each interval of neighbouring codes, the quotient is the tie in the middle where it rounds to that in float32,
    else one of the two ends.
    """
    normal = jnp.where(scale < SMALL, 1 / SMALL, 1.0)
    dividend, divisor = jnp.abs(x) * normal, scale * normal
    quotient = _divide(dividend, divisor)
    is_subnormal = quotient < SMALLEST_NORMAL_E4M3
    step = jnp.where(is_subnormal, SMALLEST_NORMAL_E4M3 / 8, _keep_bits(quotient, 0) / 8)
    below = jnp.where(is_subnormal, jnp.floor(quotient * (8 / SMALLEST_NORMAL_E4M3)) * step, _keep_bits(quotient, 3))
    tie = below + step / 2
    remainder = _remainder(dividend, divisor, tie)
    half_ulp = _keep_bits(tie, 0) * 2.0**-24 * divisor
    side = jnp.where(remainder > 0, below + step, below)
    magnitude = jnp.where(jnp.abs(remainder) <= half_ulp, tie, side)
    is_finite = jnp.isfinite(x) & jnp.isfinite(scale)
    return jnp.where(is_finite, jnp.copysign(magnitude, x), _divide(x, scale))


def _remainder(x: jax.Array, long: jax.Array, short: jax.Array | float) -> jax.Array:
    """x - long * short without an error where that is small, for a `short` of at most 8 significant bits."""
    high = _keep_bits(long, 15)
    return (x - high * short) - (long - high) * short


def _keep_bits(x: jax.Array, count: int) -> jax.Array:
    """x >= 0 cut off after `count` bits of its fraction; with 0 the power of two in it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFFFFF << (23 - count) & 0xFFFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def to_e4m3(x: jax.Array) -> jax.Array:
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


def _mx_codes(function: str, codes: ArrayLike, scale: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both as arrays, the scale as uint8."""
    dtype = getattr(codes, "dtype", None)
    if dtype != jnp.float8_e4m3fn:
        raise ValueError(f"{function}: codes must be float8_e4m3fn, got {dtype or type(codes).__name__}")
    dtype = getattr(scale, "dtype", None)
    if dtype not in (jnp.uint8, jnp.float8_e8m0fnu):
        raise ValueError(f"{function}: scale must be uint8 or {E8M0}, got {dtype or type(scale).__name__}")
    return jnp.asarray(codes), jax.lax.bitcast_convert_type(jnp.asarray(scale), jnp.uint8)


def _shape_error(function: str, argument: str, shape: str, sizes: str, value: jax.Array) -> ValueError:
    return ValueError(
        f"{function}: {argument} must be {shape} with {sizes} a multiple of {SCALE_BLOCK} (pad with zeros), "
        f"got {list(value.shape)}"
    )
