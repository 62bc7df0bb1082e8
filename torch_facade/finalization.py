"""Finalising apart: the weighted sum of the rows that a call with do_finalize=False returned, as ops of their own."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from jax_moe import native
from jax_moe.finalize_problem import FinalizeProblem
from jax_moe.options import invalid
from jax_moe.problem import Array

from .arguments import Layout, check_device, check_tensor, increment_version, is_contiguous, layout
from .eager import Calls, plan_of
from .launch import launch
from .ops import LIBRARY, TAGS

FUNCTION = "finalize"
CALLS = Calls()  # of the function and of its ops, which are all the same
NAMES = ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx", "output")


def finalize(
    gemm2_output: torch.Tensor,
    expert_weights: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `trtllm_fp8_block_scale_routed_moe` does last, for callers that stopped before it with do_finalize=False.

    out[t] = sum over k in slot order of expert_weights[t,k] * gemm2_output[row of slot t*K + k], in float32, rounded to
    bfloat16 once: the bits that do_finalize=True gives. A token without rows gets zeros.

    Args:
        gemm2_output: bfloat16 [R, H], H a multiple of 128: the rows to sum, any number of them.
        expert_weights: bfloat16 or float32 [T, K], K at most 32.
        expanded_idx_to_permuted_idx: int32 [T*K], the row of each slot. A slot whose row is not in [0, R), -1 for one,
            is skipped: every bit pattern is safe.
        output: None, or bfloat16 [T, H]: written in place and returned.

    All are contiguous and live on one device, cpu or cuda (Hopper).

    Returns:
        bfloat16 [T, H].

    Raises:
        ValueError: an argument is not what is written above; the message names it, the expected and the given.
        NotImplementedError: what this build or device does not have, and tensors that require grad while grad mode is
            on: there is no backward.
    """
    given = (gemm2_output, expert_weights, expanded_idx_to_permuted_idx, output)
    if torch.compiler.is_compiling():
        return _call(given)
    result = CALLS.run(given, ())
    if result is None:
        result = _call(given)
        CALLS.keep(given, (), lambda: _plan(given))
    elif output is not None:
        increment_version(output)
    return result


def _call(given: tuple[Any, ...]) -> Any:
    """The function through an op."""
    *tensors, output = given
    for name, tensor in zip(NAMES, tensors if output is None else given, strict=False):
        check_tensor(FUNCTION, name, tensor)
    check_device(FUNCTION, "gemm2_output", tensors[0])
    if output is None:
        return finalized(*tensors)
    finalized_out(*tensors, output)
    return output


def _plan(given: tuple[Any, ...]) -> Any:
    """The plan of calls like this one, which was checked."""
    *tensors, output = given
    problem = _known_problem(*map(layout, tensors))
    shape = problem.output().shape
    sizes = (*(tensor.nbytes for tensor in tensors), math.prod(shape) * torch.bfloat16.itemsize)
    return plan_of(
        native.plan_finalize,
        problem,
        dict(zip(NAMES, sizes, strict=True)),
        dict(zip(NAMES, given, strict=True)),
        {"output": (shape, torch.bfloat16)} if output is None else {},
        ("output",),
        returns_list=False,
    )


def _checked_problem(*layouts: Layout) -> FinalizeProblem:
    """The problem of the layouts of NAMES, where the output may be missing."""
    arrays = []
    for name, tensor in zip(NAMES, layouts, strict=False):
        if tensor[2] != layouts[0][2]:
            raise invalid(FUNCTION, name, f"on {layouts[0][2]} like gemm2_output", tensor[2])
        arrays.append(_array(tensor))
    problem = FinalizeProblem.create(FUNCTION, *arrays[:3])
    for array in arrays[3:]:
        if array != problem.output():
            raise invalid(FUNCTION, "output", str(problem.output()), array)
    for name, tensor in zip(NAMES, layouts, strict=False):
        if not is_contiguous(tensor):
            next_step = "" if name == "output" else " (call .contiguous())"
            raise invalid(FUNCTION, name, f"contiguous{next_step}", f"strides {list(tensor[3])}")
    return problem


_known_problem = functools.lru_cache(maxsize=4096)(_checked_problem)  # eager calls repeat the same ones


def _array(tensor: Layout) -> Array:
    """As jax_moe sees it. Sizes other than the first become plain integers."""
    shape = tuple(size if i == 0 else int(size) for i, size in enumerate(tensor[0]))
    return Array(shape, str(tensor[1]).removeprefix("torch."))


def _result(problem: FinalizeProblem, rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(problem.output().shape)


def _kernel(rows: torch.Tensor, weights: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
    given = (rows, weights, row_of, None)
    result = CALLS.run(given, ())
    if result is not None:
        return result
    output = _result(_known_problem(layout(rows), layout(weights), layout(row_of)), rows)
    _write(rows, weights, row_of, output)
    CALLS.keep(given, (), lambda: _plan(given))
    return output


def _write(rows: torch.Tensor, weights: torch.Tensor, row_of: torch.Tensor, output: torch.Tensor) -> None:
    tensors = (rows, weights, row_of, output)
    problem = _known_problem(*map(layout, tensors))
    pointers, sizes = [tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]
    launch(native.finalize, rows, problem, pointers, sizes)


def _kernel_out(rows: torch.Tensor, weights: torch.Tensor, row_of: torch.Tensor, output: torch.Tensor) -> None:
    given = (rows, weights, row_of, output)
    if CALLS.run(given, ()) is None:
        _write(*given)
        CALLS.keep(given, (), lambda: _plan(given))
    increment_version(output)


def _fake(rows: torch.Tensor, weights: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
    return _result(_checked_problem(layout(rows), layout(weights), layout(row_of)), rows)


def _fake_out(rows: torch.Tensor, weights: torch.Tensor, row_of: torch.Tensor, output: torch.Tensor) -> None:
    _checked_problem(*map(layout, (rows, weights, row_of, output)))
    increment_version(output)


TENSORS = "Tensor gemm2_output, Tensor expert_weights, Tensor expanded_idx_to_permuted_idx"
LIBRARY.define(f"finalize({TENSORS}) -> Tensor", tags=TAGS)
LIBRARY.define(f"finalize_out({TENSORS}, Tensor(a!) output) -> ()", tags=TAGS)
for device in ("CPU", "CUDA"):
    LIBRARY.impl("finalize", _kernel, device)
    LIBRARY.impl("finalize_out", _kernel_out, device)
torch.library.register_fake("jax_moe::finalize", _fake, lib=LIBRARY)
torch.library.register_fake("jax_moe::finalize_out", _fake_out, lib=LIBRARY)
finalized = torch.ops.jax_moe.finalize.default
finalized_out = torch.ops.jax_moe.finalize_out.default
