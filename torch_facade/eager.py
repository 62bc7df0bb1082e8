"""The short way of calls that repeat: their plans are kept by layouts and options, and run by the compiled library
without torch's dispatcher and without a check in Python.

It needs DLPack's C exchange table, which torch has since 2.10. Without it every call goes the long way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from jax_moe import native

Tensors = tuple["torch.Tensor | None", ...]
# torch's own table: other packages give one to torch.Tensor where torch has none.
EXCHANGE_TABLE = torch._C._dlpack_exchange_api() if hasattr(torch._C, "_dlpack_exchange_api") else None
TYPES = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may mean something else by its memory
# What may override, transform, record or trace the calls of torch functions: a call goes the long way while one does.
WATCHERS = (
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_functorch.peek_interpreter_stack",
    "_get_tracing_state",
    "_autograd._profiler_enabled",
)


class Calls:
    """The plans of one function's calls."""

    # (tensors, options) -> the result of a call like one that was kept, None where there is none. Not while compiling.
    run: Callable[[Tensors, tuple[Any, ...]], Any]

    def __init__(self) -> None:
        self.run = _nothing
        self._plans = None

    def keep(self, tensors: Tensors, options: tuple[Any, ...], plan: Callable[[], Any]) -> None:
        """Keeps what `plan` makes for calls of these layouts and options, which were checked."""
        if not all(tensor is None or type(tensor) in TYPES for tensor in tensors):
            return
        if self._plans is None:  # not in __init__: importing the facade does not load the library
            self._plans = _planned_calls()
            self.run = getattr(self._plans, "run", _nothing)
        if self._plans:
            self._plans.keep(tensors, options, plan)


def _nothing(tensors: Tensors, options: tuple[Any, ...]) -> None:
    return None


def _planned_calls() -> Any:
    """The library's PlannedCalls; False where this torch has not all that it takes."""
    try:
        watchers = [functools.reduce(getattr, name.split("."), torch._C) for name in WATCHERS]
    except AttributeError:
        return False
    if EXCHANGE_TABLE is None:
        return False
    current_gpu = getattr(torch._C, "_cuda_getDevice", None)  # absent in builds for CPUs
    return native.load().PlannedCalls(EXCHANGE_TABLE, TYPES, watchers, torch.is_grad_enabled, current_gpu)


def plan_of(
    make: Callable[..., Any],
    problem: Any,
    buffers: Mapping[Any, int],
    given: Mapping[Any, torch.Tensor | None],
    allocated: Mapping[Any, tuple[tuple[int, ...], torch.dtype]],
    returned: Sequence[str],
    returns_list: bool = True,
) -> Any:
    """The library's plan of calls like this one, by one of native's functions for that.

    buffers: bytes of each of the contract, by name. given: all tensors of the call, in order. allocated: what the call
    makes. returned: names of the given and allocated ones that are the result.
    """
    present = {name: index for index, (name, tensor) in enumerate(given.items()) if tensor is not None}
    arrays = present | {name: len(given) + index for index, name in enumerate(allocated)}
    device = next(tensor.device for tensor in given.values() if tensor is not None)
    return make(
        problem,
        list(buffers.values()),
        [arrays.get(name, -1) for name in buffers],
        [_allocation(shape, dtype, device) for shape, dtype in allocated.values()],
        [arrays[name] for name in returned],
        returns_list,
    )


def _allocation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """Makes a contiguous tensor, in the way that takes the host the least."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return functools.partial(torch.empty_strided, shape, tuple(reversed(strides)), dtype=dtype, device=device)
