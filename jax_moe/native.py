"""The compiled module jax_moe._native: loading it, and calling it with plain pointers.

Imports neither jax nor torch; both the JAX functions and the torch facade stand on it. Raw pointers are not checked
against Python objects here: callers hold their arrays alive until the call (CPU) or the stream (GPU) is done.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from . import finalize_problem, routing_problem
from . import problem as contract

TARGET = "jax_moe.fp8_block_scale_routed_moe.v1"  # of the XLA custom call, on every platform
ROUTE_LOGITS_TARGET = "jax_moe.route_logits.v1"
FINALIZE_TARGET = "jax_moe.finalize.v1"
TARGETS = (TARGET, ROUTE_LOGITS_TARGET, FINALIZE_TARGET)

ROUTE, PERMUTE, GEMM1, GEMM2, FINALIZE = 1, 2, 4, 8, 16  # stages of a call; ffi/moe.h: Stage
ALL_STAGES = ROUTE | PERMUTE | GEMM1 | GEMM2 | FINALIZE

ON_CPU = -1  # the compiled functions' word for device None; ffi/backends.h

_EXTENSION = f"{__package__}._native"


@functools.cache
def load() -> ModuleType:
    """The compiled module. Raises ImportError when it is missing or was built from other sources than these."""
    extension = _import_extension()
    check_abi(extension.abi_text())
    check_abi(extension.routing_abi_text(), routing_problem.abi_text())
    check_abi(extension.finalize_abi_text(), finalize_problem.abi_text())
    return extension


def check_abi(compiled: str, expected: str | None = None) -> None:
    """Raises ImportError unless `compiled`, the contract a library was built with, is `expected`: problem.py's."""
    expected = contract.abi_text() if expected is None else expected
    if compiled == expected:
        return
    lines = zip(compiled.splitlines(), expected.splitlines(), strict=False)
    ours, theirs = next(((b, a) for a, b in lines if a != b), (expected, compiled))
    raise ImportError(
        "jax_moe: the compiled library does not belong to these Python files; reinstall with `pip install .` "
        f"(the files say '{ours}', the library says '{theirs}')"
    )


def _import_extension() -> ModuleType:
    try:
        return importlib.import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            raise
    # These may be the files of a source folder, standing before the installed package on sys.path: take its library.
    path = _installed_extension()
    spec = path and importlib.util.spec_from_file_location(_EXTENSION, path)
    if not spec or not spec.loader:
        raise ImportError(
            "jax_moe: the compiled library is missing; build it with `pip install .` in the source folder"
        )
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules[_EXTENSION] = extension
    return extension


def _installed_extension() -> str | None:
    """Path of _native in the installed distribution, None when there is none for this Python."""
    try:
        files = importlib.metadata.files("jax-moe") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if str(file).startswith("jax_moe/_native."):
            return str(file.locate())
    return None


def check_ffi_version(runtime: tuple[int, int]) -> None:
    """Raises ImportError unless an XLA runtime of that FFI API version, (major, minor), takes our handlers.

    A runtime takes handlers built against its own version or an older one; a newer one would break its start.
    """
    major, minor = load().ffi_api_version()
    if runtime[0] != major or runtime[1] < minor:
        raise ImportError(
            f"jax_moe: the compiled library needs XLA FFI API {major}.{minor} or newer, this jaxlib has "
            f"{runtime[0]}.{runtime[1]}; upgrade jax and jaxlib, or reinstall jax-moe beside them with "
            "`pip install --no-build-isolation .`"
        )


@functools.lru_cache(maxsize=4096)
def handle(problem: contract.Problem) -> Any:
    """The C++ Problem of `problem`."""
    return load().Problem(problem.fields())


def workspace_bytes(problem: contract.Problem) -> Any:
    """Bytes of workspace that a call needs. Of a symbolic num_tokens, an affine function that suffices for all."""
    known = problem.num_tokens if isinstance(problem.num_tokens, int) else 0
    sizes = dataclasses.replace(
        problem, num_tokens=known, hidden_states_scale_block_stride=0, hidden_states_scale_token_stride=0
    )
    constant, per_token = _workspace_size(sizes)
    return constant + per_token * problem.num_tokens


@functools.lru_cache(maxsize=1024)
def _workspace_size(problem: contract.Problem) -> tuple[int, int]:
    return load().workspace_size(handle(problem))


def forward(
    problem: contract.Problem,
    pointers: Sequence[int],
    sizes: Sequence[int],
    *,
    device: int | None = None,
    stream: int = 0,
    stages: int = ALL_STAGES,
    extension: ModuleType | None = None,
) -> None:
    """Runs a call on the arrays at `pointers`, of `sizes` bytes: problem.INPUTS then OUTPUTS, 0 and 0 where absent.

    device None is the CPU, and returns when the outputs are written; a number is a CUDA device, and returns when the
    work is on `stream` (a cudaStream_t of that device). Raises ValueError for sizes or alignment that do not fit the
    problem, NotImplementedError for what this build or device cannot do, RuntimeError for a failed launch.
    `extension`: another build's module that runs it instead, for comparisons; of the same ABI.
    """
    where = ON_CPU if device is None else device
    (extension or load()).forward_stages(handle(problem), pointers, sizes, where, stream, stages)


@functools.lru_cache(maxsize=4096)
def routing_handle(problem: routing_problem.RoutingProblem) -> Any:
    """The C++ RoutingProblem of `problem`."""
    result = load().RoutingProblem(problem.fields())
    result.routed_scaling_factor = problem.routed_scaling_factor
    return result


def route_logits(
    problem: routing_problem.RoutingProblem,
    pointers: Sequence[int],
    sizes: Sequence[int],
    *,
    device: int | None = None,
    stream: int = 0,
) -> None:
    """Routes from logits on the arrays at `pointers`, of `sizes` bytes: routing_problem.BUFFERS, 0 and 0 where absent.

    device, stream and errors are those of `forward`.
    """
    load().route_logits(routing_handle(problem), pointers, sizes, ON_CPU if device is None else device, stream)


@functools.lru_cache(maxsize=4096)
def finalize_handle(problem: finalize_problem.FinalizeProblem) -> Any:
    """The C++ FinalizeProblem of `problem`."""
    return load().FinalizeProblem(problem.fields())


def finalize(
    problem: finalize_problem.FinalizeProblem,
    pointers: Sequence[int],
    sizes: Sequence[int],
    *,
    device: int | None = None,
    stream: int = 0,
) -> None:
    """Finalises apart on the arrays at `pointers`, of `sizes` bytes: finalize_problem.BUFFERS, 0 and 0 where empty.

    device, stream and errors are those of `forward`.
    """
    load().finalize(finalize_handle(problem), pointers, sizes, ON_CPU if device is None else device, stream)


def plan_forward(
    problem: contract.Problem,
    sizes: Sequence[int],
    arrays_of_buffers: Sequence[int],
    allocate: Sequence[Callable[[], Any]],
    returned: Sequence[int],
    returns_list: bool,
) -> Any:
    """What a call of `problem` does, for the library's PlannedCalls.

    Arrays are numbered: the given ones, then those that `allocate` makes. arrays_of_buffers has that of each buffer of
    INPUTS then OUTPUTS, of `sizes` bytes, -1 where absent. The arrays `returned` are the result: as a list, or the one.
    """
    return load().plan_forward(handle(problem), sizes, arrays_of_buffers, allocate, returned, returns_list)


def plan_route_logits(problem: routing_problem.RoutingProblem, *rest: Any) -> Any:
    """`plan_forward` for routing from logits: the buffers are routing_problem.BUFFERS."""
    return load().plan_route_logits(routing_handle(problem), *rest)


def plan_finalize(problem: finalize_problem.FinalizeProblem, *rest: Any) -> Any:
    """`plan_forward` for finalising apart: the buffers are finalize_problem.BUFFERS."""
    return load().plan_finalize(finalize_handle(problem), *rest)


def explain(problem: contract.Problem, num_sms: int = 132) -> str:
    """The kernels and tiles that a GPU with `num_sms` multiprocessors would run for `problem`, as text."""
    return load().explain(handle(problem), num_sms)


def launched_stages(problem: contract.Problem, num_sms: int = 132) -> int:
    """The stages, a mask, that launch kernels on a GPU with `num_sms` multiprocessors."""
    return load().launched_stages(handle(problem), num_sms)
