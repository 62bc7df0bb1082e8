"""Finalising apart by the CUDA sources on the emulated machine, in memory whose ends trap."""

from __future__ import annotations

import ctypes

import emulated
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_moe.finalize_problem import BUFFERS, FinalizeProblem


def finalize(
    emulator: emulated.Emulator, problem: FinalizeProblem, given: tuple[NDArray, NDArray, NDArray], seed: int = 0
) -> NDArray:
    """The output. It starts as 0xFF, and inputs must be left as they were."""
    inputs = dict(zip(BUFFERS, given, strict=False))
    shape = problem.output().shape
    nbytes = {name: array.nbytes for name, array in inputs.items()} | {"output": 2 * shape[0] * shape[1]}
    blocks: dict[str, emulated.Guarded] = {}
    try:
        for name, size in nbytes.items():
            blocks[name] = emulated.Guarded(emulator, name, size, at_start=bool(seed % 2))
        for name, array in inputs.items():
            blocks[name].bytes()[:] = array.reshape(-1).view(np.uint8)
        _call(emulator, problem, [blocks[name] for name in BUFFERS], seed)
        for name, array in inputs.items():
            assert np.array_equal(blocks[name].bytes(), array.reshape(-1).view(np.uint8)), f"{name} was changed"
        return blocks["output"].bytes().view(ml_dtypes.bfloat16).reshape(shape).copy()
    finally:
        damaged = [name for name, block in blocks.items() if not block.free()]
        assert not damaged, f"bytes beside {damaged} were changed"


def _call(emulator: emulated.Emulator, problem: FinalizeProblem, order: list[emulated.Guarded], seed: int) -> None:
    fields = problem.fields()
    message = ctypes.create_string_buffer(8192)
    status = emulator.library.emulated_finalize(
        (ctypes.c_int64 * len(fields))(*fields),
        (ctypes.c_void_p * len(order))(*(block.pointer for block in order)),
        (ctypes.c_int64 * len(order))(*(block.nbytes for block in order)),
        seed,
        message,
        len(message),
    )
    if status:
        raise emulated.EmulatedError(f"{emulated.STATUS[status]}: {message.value.decode()}")
