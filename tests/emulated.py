"""Compiles the CUDA sources for a CPU (tests/emulation) and calls them in memory whose ends trap."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cases
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_moe.problem import INPUTS, OUTPUTS, Problem

TESTS = Path(__file__).resolve().parent
EMULATION = TESTS / "emulation"
FFI = TESTS.parent / "ffi"
ROUTE, PERMUTE, GEMM1, GEMM2, FINALIZE, ALL_STAGES = 1, 2, 4, 8, 16, 31
STATUS = ("ok", "invalid argument", "unsupported", "internal")
OPTIONS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-U_FORTIFY_SOURCE", "-DJAX_MOE_EMULATION", "-DJAX_MOE_HAS_CUDA=1"),
    *("-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"),
)
# Every ordinary access of memory calls tests/emulation/races.cc; no sanitizer's runtime is linked.
SHOW_ACCESSES = ("-fsanitize=thread", "-fno-threadsafe-statics")
SPARSE_BYTES = 2**30  # guarded_memory.h: kSparseBytes
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "int32": np.int32, "float32": np.float32, "uint8": np.uint8}


def missing_compiler() -> str | None:
    return None if shutil.which("g++") else "g++ is not installed: the CUDA sources cannot be compiled for a CPU"


def build(folder: Path) -> Path:
    """The shared library with the project's CUDA sources, the emulated machine and its own test kernels."""
    sources = [*EMULATION.glob("*.cc"), *FFI.glob("check*.cc"), FFI / "workspace.cc"]
    sources += [*(FFI / "cuda").glob("*.cc"), *(FFI / "cuda").glob("*.cu"), *(FFI / "cuda/kernels").glob("*.cu")]
    include = ["-I", str(EMULATION / "include"), "-I", str(FFI)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.name}.o"
        has_kernels = source.parent.name == "kernels" or source.name.startswith("selftest")
        options = [*OPTIONS, *(SHOW_ACCESSES if has_kernels else ())]
        _run(["g++", *options, *include, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libemulated.so"
    _run(["g++", "-shared", "-o", str(library), *map(str, objects)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


class EmulatedError(RuntimeError):
    """A call ended with another status than ok."""


class Emulator:
    """The loaded library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulated_allocate.restype = ctypes.c_void_p
        self.library.emulated_free.argtypes = [ctypes.c_void_p]
        self.library.emulated_workspace_bytes.restype = ctypes.c_int64

    def forward(
        self, problem: Problem, pointers: list[int], sizes: list[int], stages: int, seed: int, num_sms: int
    ) -> None:
        fields = problem.fields()
        message = ctypes.create_string_buffer(8192)
        status = self.library.emulated_forward(
            (ctypes.c_int64 * len(fields))(*fields),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(sizes))(*sizes),
            stages,
            seed,
            num_sms,
            message,
            len(message),
        )
        if status:
            raise EmulatedError(f"{STATUS[status]}: {message.value.decode()}")

    def launches(self) -> tuple[int, int]:
        """How many kernels the last call launched, and how many of them to overlap the one before."""
        return self.library.emulated_launches(0), self.library.emulated_launches(1)

    def workspace_bytes(self, problem: Problem) -> int:
        fields = problem.fields()
        return self.library.emulated_workspace_bytes((ctypes.c_int64 * len(fields))(*fields))

    def selftest(self, name: str, seed: int = 0) -> str:
        """The error that a kernel of tests/emulation/selftest.cc ends with, empty when it ran through."""
        message = ctypes.create_string_buffer(8192)
        self.library.emulated_selftest(name.encode(), seed, message, len(message))
        return message.value.decode()


class Guarded:
    """`nbytes` of 0xFF between pages that trap; touches the one behind, or with at_start the one before. From 2^30
    bytes on they are 0, and take memory where they are written only."""

    def __init__(self, emulator: Emulator, name: str, nbytes: int, at_start: bool) -> None:
        self.emulator, self.name, self.nbytes = emulator, name, nbytes
        self.pointer = emulator.library.emulated_allocate(ctypes.c_int64(nbytes), int(at_start), name.encode())
        assert self.pointer, f"no memory for {name}"

    def bytes(self) -> NDArray:
        return np.frombuffer((ctypes.c_uint8 * self.nbytes).from_address(self.pointer), np.uint8)

    def free(self) -> bool:
        return bool(self.emulator.library.emulated_free(self.pointer))


def run(
    emulator: Emulator,
    case: cases.Case,
    given: Mapping[str, NDArray | None],
    *,
    seed: int = 0,
    num_sms: int = 3,
    stages: int = ALL_STAGES,
    offset_on_device: bool = False,
    **changes: Any,
) -> dict[str, NDArray]:
    """The outputs of a call by name; some fields of its problem may change. Outputs and workspace start as 0xFF, and
    inputs must be left as they were.
    """
    problem = dataclasses.replace(cases.problem(case, given, offset_on_device), **changes)
    arrays: dict[str, NDArray] = {name: array for name, array in given.items() if array is not None}
    if offset_on_device:
        arrays["local_expert_offset"] = np.array(case.offset, np.int32)
    buffers: dict[str, Guarded] = {}
    at_start = bool(seed % 2)
    try:
        written = {name: _memory_of(array) for name, array in arrays.items()}
        for name, data in written.items():
            buffers[name] = Guarded(emulator, name, data.size, at_start)
            _copy(buffers[name].bytes(), data)
        shapes = {name: expected for name, expected in problem.outputs().items() if expected is not None}
        for name, expected in shapes.items():
            nbytes = int(np.prod(expected.shape)) * np.dtype(DTYPES[expected.dtype]).itemsize
            buffers[name] = Guarded(emulator, name, nbytes, at_start)
        buffers["workspace"] = Guarded(emulator, "workspace", emulator.workspace_bytes(problem), at_start)
        order = [buffers.get(name) for name in (*INPUTS, *OUTPUTS)]
        pointers = [block.pointer if block and block.nbytes else 0 for block in order]
        emulator.forward(problem, pointers, [block.nbytes if block else 0 for block in order], stages, seed, num_sms)
        for name, data in written.items():
            assert _equal(buffers[name].bytes(), data), f"input {name} was changed"
        return {
            name: _copy(np.zeros(buffers[name].nbytes, np.uint8), buffers[name].bytes())
            .view(DTYPES[expected.dtype])
            .reshape(expected.shape)
            for name, expected in shapes.items()
        }
    finally:
        damaged = [name for name, block in buffers.items() if not block.free()]
        assert not damaged, f"bytes beside {damaged} were changed"


def _chunks(nbytes: int) -> list[slice]:
    return [slice(first, first + (1 << 24)) for first in range(0, nbytes, 1 << 24)]


def _copy(to: NDArray, data: NDArray) -> NDArray:
    """Large ones are zeros on both sides but for some chunks: the others are left alone, they take no memory."""
    for chunk in _chunks(data.size):
        if data.size < SPARSE_BYTES or np.any(data[chunk]):
            to[chunk] = data[chunk]
    return to


def _equal(a: NDArray, b: NDArray) -> bool:
    return all(np.array_equal(a[chunk], b[chunk]) for chunk in _chunks(b.size))


def _memory_of(array: NDArray) -> NDArray:
    """The bytes of an array from its first element to its last, gaps of a strided one as zeros."""
    if array.flags.c_contiguous:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    memory = np.zeros(last // array.itemsize + 1, array.dtype)
    np.lib.stride_tricks.as_strided(memory, array.shape, array.strides)[...] = array
    return memory.view(np.uint8)
