"""Checks of one tensor that every function of the facade makes, and how a tensor is described.

A tensor is known by its layout: a plain tuple (shape, dtype, device, stride), so that what follows from the layouts of
a call can be cached by them.
"""

from __future__ import annotations

from typing import Any

import torch

from jax_moe.options import invalid

Layout = tuple[Any, torch.dtype, torch.device, Any]


def layout(tensor: torch.Tensor) -> Layout:
    return (tensor.shape, tensor.dtype, tensor.device, tensor.stride())


def is_contiguous(tensor: Layout) -> bool:
    # The strides are compared first: with contiguous tensors no question is asked about a symbolic number of tokens.
    expected = 1
    for size, stride in zip(reversed(tensor[0]), reversed(tensor[3]), strict=True):
        if stride != expected and size != 1:
            return 0 in tensor[0]
        expected = expected * size
    return True


def check_tensor(function: str, name: str, tensor: Any) -> None:
    """Refuses what is no tensor, and what a backward would be wanted of."""
    if not isinstance(tensor, torch.Tensor):
        raise invalid(function, name, "a torch.Tensor", type(tensor).__name__)
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise NotImplementedError(
            f"{function}: {name} must not require grad, got requires_grad=True: inference only, there is no backward; "
            "call under torch.no_grad() or torch.inference_mode(), or detach() it"
        )


def check_device(function: str, name: str, tensor: torch.Tensor) -> None:
    if not (tensor.is_cpu or tensor.is_cuda or tensor.is_meta):  # meta tensors get meta results, without a computation
        raise NotImplementedError(f"{function}: {name} must be on a cpu or cuda device, got {tensor.device}")


def increment_version(output: torch.Tensor) -> None:
    """Tells autograd that the kernel wrote `output`."""
    if not output.is_inference():
        torch.autograd.graph.increment_version(output)
