"""Runs a call of the compiled library where a tensor is: on the CPU, or on its GPU's current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def launch(
    call: Callable[..., None], at: torch.Tensor, problem: Any, pointers: Sequence[int], sizes: Sequence[int]
) -> None:
    """call(problem, pointers, sizes), with the device and the stream of `at` when that is a CUDA tensor."""
    if not at.is_cuda:
        call(problem, pointers, sizes)
        return
    index = at.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.current_device() == index:
        call(problem, pointers, sizes, device=index, stream=stream)
    else:  # torch restores the device before without making a context on one that had none
        with torch.cuda.device(index):
            call(problem, pointers, sizes, device=index, stream=stream)
