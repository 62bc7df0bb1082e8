"""The ceilings of a GPU, measured through torch: memory read and copy, dense FP8 and bf16 matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .cost import Ceilings
from .cuda import quantize_blocks
from .timing import CudaGraph, measure

READ_BYTES = 4 << 30
SIZE = 8192  # of the square matrix products
CALLS = 4  # a graph

_scaled_mm = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]


def measure_ceilings(device: torch.device, repeats: int) -> Ceilings:
    """In bursts after a pause, and for FP8 also under sustained load. The roofline takes the burst rates."""
    read_rate, copy_rate = _memory_rates(device, repeats)
    measured = {"read TB/s": read_rate / 1e12, "copy TB/s": copy_rate / 1e12}
    flops = 2 * SIZE**3
    a = torch.randn((SIZE, SIZE), device=device).to(torch.bfloat16)
    b = torch.randn((SIZE, SIZE), device=device).to(torch.bfloat16)
    dense = _block_scaled(a, b)
    name = "FP8 block-scaled" if dense else "FP8 per tensor"
    dense = dense or _per_tensor(a, b)
    graph = CudaGraph([dense] * CALLS)
    burst = flops / measure(graph, "cool", repeats).median
    measured[f"{name} TFLOP/s"] = burst / 1e12
    measured[f"{name} TFLOP/s, sustained"] = flops / measure(graph, "sustained", repeats).median / 1e12
    measured["FP8 per tensor, fast accumulation TFLOP/s"] = flops / _seconds(_per_tensor(a, b), repeats) / 1e12
    measured["bf16 TFLOP/s"] = flops / _seconds(lambda: a @ b.t(), repeats) / 1e12
    return Ceilings(read_rate, burst, measured)


def _memory_rates(device: torch.device, repeats: int) -> tuple[float, float]:
    """Bytes a second: read, and copied (read and written)."""
    source = torch.empty(READ_BYTES // 4, dtype=torch.int32, device=device).random_()
    half = source[: len(source) // 2]
    target = torch.empty_like(half)
    copy = READ_BYTES / _seconds(lambda: target.copy_(half), repeats)
    read = READ_BYTES / _seconds(_triton_read(source) or source.view(torch.float32).amax, repeats)
    return max(read, copy), copy


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    return measure(CudaGraph([call] * CALLS), "cool", repeats).median


def _triton_read(source: torch.Tensor) -> Callable[[], Any] | None:
    """A kernel that reads and hardly writes; None where Triton does not work."""
    try:
        from .triton_read import read

        sink = read(source)
        torch.cuda.synchronize()
    except Exception:  # Triton needs a host compiler and may raise anything; the other reads remain
        return None
    return lambda: read(source, sink)


def _quantize(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 codes of [R, C] and one scale for each `rows` x 128 block, [R / rows, C / 128]."""
    blocks = x.float().view(x.shape[0] // rows, rows, x.shape[1] // 128, 128)
    codes, scale = quantize_blocks(blocks, (1, 3))
    return codes.view(x.shape), scale[:, 0, :, 0]


def _block_scaled(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any] | None:
    """a b^T with 1x128 and 128x128 scales; None where this torch does not have it."""
    a_codes, a_scale = _quantize(a, 1)
    b_codes, b_scale = _quantize(b, 128)
    a_scale = a_scale.t().contiguous().t()  # the order that cuBLASLt takes
    call = functools.partial(_scaled_mm, a_codes, b_codes.t(), scale_a=a_scale, scale_b=b_scale.t())
    try:
        call()
    except (RuntimeError, ValueError):
        return None
    return call


def _per_tensor(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any]:
    one = torch.ones((), device=a.device)
    codes = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    return functools.partial(_scaled_mm, *codes, scale_a=one, scale_b=one, use_fast_accum=True)
