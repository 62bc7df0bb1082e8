"""The CPU as a device of the benchmark: data in numpy arrays, wall clock, ceilings measured through numpy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import native
from ..problem import SCALE_BLOCK, Problem
from ..reference import E4M3_MAX, MIN_SCALE, quantize_1x128
from ..shapes import LayerShape
from .cost import Ceilings
from .timing import Program, WallClock
from .workload import Cell

COPY_BYTES = 128 << 20
MATMUL_SIZE = 1536
CACHE_BYTES = 64 << 20  # weights are copied until they do not fit in a cache of this size


class Cpu:
    kind = "cpu"
    states: tuple[str, ...] = ("steady",)

    def random_weights(self, shape: LayerShape, seed: int) -> Iterator[int | dict[str, NDArray]]:
        rng = np.random.default_rng(seed)
        hidden, inter, local = shape.hidden_size, shape.intermediate_size, shape.local_num_experts
        arrays = {}
        for name, rows, columns in (("gemm1_weights", 2 * inter, hidden), ("gemm2_weights", hidden, inter)):
            blocks = rows // SCALE_BLOCK, columns // SCALE_BLOCK
            arrays[name] = np.empty((local, rows, columns), ml_dtypes.float8_e4m3fn)
            arrays[f"{name}_scale"] = np.empty((local, *blocks), np.float32)
        for expert in range(local):
            for name in ("gemm1_weights", "gemm2_weights"):
                codes, scale = _quantized_normal(rng, *arrays[name].shape[1:])
                arrays[name][expert], arrays[f"{name}_scale"][expert] = codes, scale
            yield expert + 1
        yield arrays

    def weight_copies(self, weights: dict[str, NDArray]) -> list[dict[str, NDArray]]:
        total = sum(array.nbytes for array in weights.values())
        copies = min(8, -(-2 * CACHE_BYTES // total))
        return [weights] + [{name: array.copy() for name, array in weights.items()} for _ in range(copies - 1)]

    def random_tokens(self, cell: Cell, seed: int) -> dict[str, NDArray]:
        x = np.random.default_rng(seed).standard_normal((cell.tokens, cell.shape.hidden_size), np.float32)
        x = x.astype(ml_dtypes.bfloat16)
        if cell.bf16_input:
            return {"hidden_states": x}
        codes, scale = quantize_1x128(x)
        return {"hidden_states": codes, "hidden_states_scale": np.ascontiguousarray(scale.T)}

    def put(self, array: NDArray) -> NDArray:
        return array

    def empty(self, nbytes: int) -> NDArray:
        return np.empty(nbytes, np.uint8)

    def native_call(
        self,
        problem: Problem,
        buffers: Sequence[NDArray | None],
        stages: int,
        extension: ModuleType | None = None,
    ) -> Callable[[], None]:
        def call() -> None:
            pointers = [0 if array is None else array.ctypes.data for array in buffers]
            sizes = [0 if array is None else array.nbytes for array in buffers]
            native.forward(problem, pointers, sizes, stages=stages, extension=extension)

        return call

    def stages(self, problem: Problem) -> int:
        return native.ALL_STAGES

    def program(self, calls: Sequence[Callable[[], Any]]) -> Program:
        return WallClock(calls)

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass

    def ceilings(self, repeats: int = 5) -> Ceilings:
        """Memory copy (bytes read and bytes written) and float32 matrix product, the best of `repeats`."""
        source, target = np.ones(COPY_BYTES // 4, np.float32), np.zeros(COPY_BYTES // 4, np.float32)
        copy = 2 * COPY_BYTES / _fastest(lambda: np.copyto(target, source), repeats)
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((MATMUL_SIZE, MATMUL_SIZE), np.float32) for _ in range(2))
        matmul = 2 * MATMUL_SIZE**3 / _fastest(lambda: a @ b, repeats)
        return Ceilings(copy, matmul, {"numpy copy GB/s": copy / 1e9, "numpy float32 matmul GFLOP/s": matmul / 1e9})


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _quantized_normal(rng: np.random.Generator, rows: int, columns: int) -> tuple[NDArray, NDArray]:
    """Normal weights, of another magnitude in each 128x128 block, in the format of the op."""
    row_blocks, column_blocks = rows // SCALE_BLOCK, columns // SCALE_BLOCK
    w = rng.standard_normal((row_blocks, SCALE_BLOCK, column_blocks, SCALE_BLOCK), np.float32)
    magnitude = np.exp(0.5 * rng.standard_normal((row_blocks, column_blocks), np.float32)) / np.sqrt(
        np.float32(columns)
    )
    scale = np.maximum(np.abs(w).max(axis=(1, 3)) * magnitude / E4M3_MAX, MIN_SCALE)
    w *= (magnitude / scale)[:, None, :, None]
    codes = np.clip(w, -E4M3_MAX, E4M3_MAX, out=w).astype(ml_dtypes.float8_e4m3fn)
    return codes.reshape(rows, columns), scale
