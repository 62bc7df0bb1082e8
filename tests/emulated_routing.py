"""Routing from logits by the CUDA sources on the emulated machine, in memory whose ends trap."""

from __future__ import annotations

import ctypes

import emulated
import numpy as np
from numpy.typing import NDArray

from jax_moe.routing_problem import BUFFERS, RoutingProblem


def route(
    emulator: emulated.Emulator, problem: RoutingProblem, given: dict[str, NDArray | None], seed: int = 0
) -> tuple[NDArray, NDArray]:
    """ids and weights. They start as 0xFF, and inputs must be left as they were."""
    shape = problem.outputs()["topk_ids"].shape
    inputs = {name: array for name, array in given.items() if array is not None}
    nbytes = {name: array.nbytes for name, array in inputs.items()}
    nbytes |= dict.fromkeys(("topk_ids", "topk_weights"), 4 * shape[0] * shape[1])
    blocks: dict[str, emulated.Guarded] = {}
    try:
        for name, size in nbytes.items():
            blocks[name] = emulated.Guarded(emulator, name, size, at_start=bool(seed % 2))
        for name, array in inputs.items():
            blocks[name].bytes()[:] = array.reshape(-1).view(np.uint8)
        _call(emulator, problem, blocks, seed)
        for name, array in inputs.items():
            assert np.array_equal(blocks[name].bytes(), array.reshape(-1).view(np.uint8)), f"{name} was changed"
        ids = blocks["topk_ids"].bytes().view(np.int32).reshape(shape).copy()
        return ids, blocks["topk_weights"].bytes().view(np.float32).reshape(shape).copy()
    finally:
        damaged = [name for name, block in blocks.items() if not block.free()]
        assert not damaged, f"bytes beside {damaged} were changed"


def _call(emulator: emulated.Emulator, problem: RoutingProblem, blocks: dict[str, emulated.Guarded], seed: int) -> None:
    fields = problem.fields()
    order = [blocks.get(name) for name in BUFFERS]
    message = ctypes.create_string_buffer(8192)
    status = emulator.library.emulated_route_logits(
        (ctypes.c_int64 * len(fields))(*fields),
        ctypes.c_double(problem.routed_scaling_factor),
        (ctypes.c_void_p * len(order))(*(block.pointer if block else 0 for block in order)),
        (ctypes.c_int64 * len(order))(*(block.nbytes if block else 0 for block in order)),
        seed,
        message,
        len(message),
    )
    if status:
        raise emulated.EmulatedError(f"{emulated.STATUS[status]}: {message.value.decode()}")
