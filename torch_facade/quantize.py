"""Quantisers of the MxFp8 format under the names that callers of serving kernels use.

float8_e4m3fn codes with E8M0 scales (byte b is 2^(b-127), 255 is NaN), one per 1x32: the smallest power of two that is
at least largest magnitude / 448.
"""

from __future__ import annotations

from typing import Any

import torch

from jax_moe import layout
from jax_moe.problem import E8M0, MX_SCALE_BLOCK

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALE_DTYPES = (torch.uint8, getattr(torch, E8M0, torch.uint8))
MX_NAN = 255  # the E8M0 byte


def mxfp8_quantize(
    input: torch.Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations or weights in the MxFp8 format.

    Args:
        input: float32, bfloat16 or float16 [..., rows, columns].
        is_sf_swizzled_layout: False gives scales [..., rows, columns/32], as the op wants hidden_states_scale; True
            those padded with zeros to multiples of 128 rows and 4 columns, in the 128x4 order, flat: [..., bytes].
        alignment: a multiple of 32, to a multiple of which columns are padded with zeros.
        enable_pdl: accepted, without effect.

    Returns:
        (float8_e4m3fn [..., rows, padded columns], uint8 scales). Codes are rounded to nearest even. A NaN stays NaN
        and leaves its block's scale alone; an infinity makes its whole block NaN, the scale (255) too; a block of zeros
        has scale 0.

    Raises:
        ValueError: another dtype, rank or alignment.
    """
    if not isinstance(input, torch.Tensor) or input.dtype not in FLOATS or input.dim() < 2:
        expected = "a float32, bfloat16 or float16 tensor [..., rows, columns]"
        raise ValueError(f"mxfp8_quantize: input must be {expected}, got {describe(input)}")
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment % MX_SCALE_BLOCK:
        raise ValueError(f"mxfp8_quantize: alignment must be a multiple of {MX_SCALE_BLOCK}, got {alignment!r}")
    x = torch.nn.functional.pad(input.float(), (0, -input.shape[-1] % alignment))
    blocks = x.unflatten(-1, (x.shape[-1] // MX_SCALE_BLOCK, MX_SCALE_BLOCK))
    amax = blocks.abs().nan_to_num(0.0, float("inf")).amax(dim=-1)
    scale = (mx_exponent(amax) + 127).clamp(min=0)
    inverse = power_of_two(127 - scale).masked_fill(amax.isinf(), float("nan"))
    codes = (blocks * inverse.unsqueeze(-1)).reshape(x.shape).to(torch.float8_e4m3fn)
    scale = scale.masked_fill(amax.isinf(), MX_NAN).to(torch.uint8)
    return codes, _swizzled(scale) if is_sf_swizzled_layout else scale


def mxfp8_dequantize_host(
    input: torch.Tensor, scale_tensor: torch.Tensor, is_sf_swizzled_layout: bool = True
) -> torch.Tensor:
    """The float32 values [..., rows, columns] of codes and scales as `mxfp8_quantize` returns them, on their device.

    Args:
        input: float8_e4m3fn, or their bits in uint8, [..., rows, columns].
        scale_tensor: uint8 or float8_e8m0fnu, of any shape with as many elements.
        is_sf_swizzled_layout: whether the scales are padded and in the 128x4 order.

    Raises:
        ValueError: another dtype, rank or number of scales.
    """
    dtypes = (torch.float8_e4m3fn, torch.uint8)
    if not isinstance(input, torch.Tensor) or input.dtype not in dtypes or input.dim() < 2:
        expected = "a float8_e4m3fn or uint8 tensor [..., rows, columns]"
        raise ValueError(f"mxfp8_dequantize_host: input must be {expected}, got {describe(input)}")
    *lead, rows, columns = input.shape
    blocks = columns // MX_SCALE_BLOCK
    shape = [*lead, rows, blocks]
    if is_sf_swizzled_layout:
        shape = [*lead, _padded(rows, layout.SCALE_ROWS), _padded(blocks, layout.SCALE_COLUMNS)]
    elements = torch.Size(shape).numel()
    is_scale = isinstance(scale_tensor, torch.Tensor) and scale_tensor.dtype in SCALE_DTYPES
    if columns % MX_SCALE_BLOCK or not is_scale or scale_tensor.numel() != elements:
        expected = f"uint8 or {E8M0} of {elements} elements, one for each 1x{MX_SCALE_BLOCK} of {describe(input)}"
        raise ValueError(
            f"mxfp8_dequantize_host: scale_tensor must be {expected}{', padded' if is_sf_swizzled_layout else ''}, "
            f"got {describe(scale_tensor)}"
        )
    scale = scale_tensor.view(torch.uint8).reshape(shape)
    if is_sf_swizzled_layout:
        scale = layout.deinterleave_scales(scale)[..., :rows, :blocks]
    exponent = scale.to(torch.int32) - 127
    half = exponent >> 1  # 2^-127 is no normal float32
    factors = torch.stack([power_of_two(half), power_of_two(exponent - half)]).masked_fill(
        scale == MX_NAN, float("nan")
    )
    low, high = factors.unsqueeze(-1)
    values = input.view(torch.float8_e4m3fn).float().unflatten(-1, (blocks, MX_SCALE_BLOCK))
    return (values * low * high).reshape(input.shape)


def mx_exponent(amax: torch.Tensor) -> torch.Tensor:
    """The smallest e with amax <= 448 x 2^e, for finite normal float32 amax; below -127 for smaller ones. int32."""
    bits = amax.view(torch.int32)
    # amax = 1.m x 2^k, and 448 = 1.75 x 2^8.
    return (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"


def _swizzled(scale: torch.Tensor) -> torch.Tensor:
    rows, columns = scale.shape[-2:]
    padding = (0, -columns % layout.SCALE_COLUMNS, 0, -rows % layout.SCALE_ROWS)
    return layout.interleave_scales(torch.nn.functional.pad(scale, padding)).flatten(-2)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
