"""Buffers for tests of the native functions: poisoned, between guard bytes, at any alignment, on the host or a GPU.

Everything is bytes. A guard holds one value on both sides of a buffer; `Block.read` fails when it is touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GUARD_BYTES = 512
INPUT_GUARD = 0xFF  # NaN in float8, bfloat16 and float32: what is read beside an input shows in the result
OUTPUT_GUARD = 0xA5
POISON = 0xFF


class Host:
    """Numpy memory, for the CPU backend."""

    device: int | None = None

    def allocate(self, nbytes: int) -> tuple[Any, int]:
        """Bytes that take slices and slice assignment, and their address."""
        raw = np.empty(nbytes, np.uint8)
        return raw, raw.ctypes.data

    def write(self, view: Any, data: NDArray) -> None:
        view[:] = data

    def read(self, view: Any) -> NDArray:
        return view.copy()


class Cuda:
    """Memory of one GPU, allocated by torch."""

    def __init__(self, device: int = 0) -> None:
        self.device: int | None = device

    def allocate(self, nbytes: int) -> tuple[Any, int]:
        import torch

        raw = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{self.device}")
        return raw, raw.data_ptr()

    def write(self, view: Any, data: NDArray) -> None:
        import torch

        view.copy_(torch.from_numpy(data if data.flags.writeable else data.copy()))

    def read(self, view: Any) -> NDArray:
        return view.cpu().numpy()


class Block:
    """`nbytes` bytes that start `shift` bytes after a multiple of 256, between two guards.

    guard None is an allocation of just `nbytes` that nothing was written to, for tools that watch allocations.
    """

    def __init__(self, memory: Host | Cuda, nbytes: int, shift: int, guard: int | None) -> None:
        self.memory, self.nbytes, self.guard = memory, nbytes, guard
        if guard is None:
            self.raw, self.pointer = memory.allocate(nbytes)
            self.start = 0
            return
        raw, address = memory.allocate(nbytes + 2 * GUARD_BYTES + 256)
        start = -(-(address + GUARD_BYTES) // 256) * 256 - address + shift % 256
        raw[:] = guard
        self.raw, self.start, self.pointer = raw, start, address + start

    @property
    def view(self) -> Any:
        return self.raw[self.start : self.start + self.nbytes]

    def fill(self, byte: int) -> None:
        self.view[:] = byte

    def write(self, data: NDArray) -> None:
        """`data` is uint8 [nbytes]."""
        self.memory.write(self.view, data)

    def read(self, dtype: Any, shape: tuple[int, ...], name: str) -> NDArray:
        """A copy of the contents, after a look at the guards."""
        self.check_guards(name)
        return self.memory.read(self.view).view(dtype).reshape(shape)

    def check_guards(self, name: str) -> None:
        if self.guard is None:
            return
        end = self.start + self.nbytes
        for side, view in (("before", self.raw[: self.start]), ("after", self.raw[end:])):
            touched = np.flatnonzero(self.memory.read(view) != self.guard)
            if touched.size:
                first = int(touched[0] - self.start if side == "before" else touched[0])
                raise AssertionError(f"{name}: {touched.size} bytes {side} it were written, the first at {first}")


def flat_bytes(array: NDArray) -> NDArray:
    """The memory of an array from its first element to its last, gaps between its elements included."""
    if array.size == 0:
        return np.zeros(0, np.uint8)
    if array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8)
    strides = (stride // array.itemsize for stride in array.strides)
    last = sum((size - 1) * stride for size, stride in zip(array.shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(array, (last + 1,), (array.itemsize,)).view(np.uint8)
