"""From the tensors of a call to its Problem: validation, and the plan that eager calls keep.

A tensor is known here by its layout only: a plain tuple (shape, dtype, device, stride), so that a plan can be cached by
them. Kernels ask for `plan` (cached), fakes for `checked_problem`, whose number of tokens may be symbolic.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from jax_moe import native
from jax_moe.problem import INPUTS, Array, Options, Problem

FUNCTION = "trtllm_fp8_block_scale_routed_moe"

# The tensors and the integers of an op, in its order. The offset of the local experts is an integer here.
TENSORS = (*(name for name in INPUTS if name != "local_expert_offset"), "routing_bias")
OPTIONS = (
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routing_method_type",
    "use_shuffled_weight",
    "weight_layout",
    "fp8_quantization_type",
    "activation_type",
    "do_finalize",
)
DECLARED = ("top_k", "intermediate_size", "local_num_experts")
HIDDEN_STATES = TENSORS.index("hidden_states")

Layout = tuple[Any, torch.dtype, torch.device, Any]


class Plan(NamedTuple):
    """What the layouts and options of a call determine."""

    problem: Problem
    sizes: tuple[int, ...]  # bytes of INPUTS, then of OUTPUTS
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape and dtype of what is returned
    workspace_bytes: int


def layout(tensor: torch.Tensor) -> Layout:
    return (tensor.shape, tensor.dtype, tensor.device, tensor.stride())


@functools.lru_cache(maxsize=4096)
def plan(layouts: tuple[Layout | None, ...], options: tuple[int, ...], output: Layout | None) -> Plan:
    """The plan of a call with tensors of `layouts` (in the order of TENSORS) and `options` (in that of OPTIONS)."""
    problem = checked_problem(layouts, options, output)
    given = dict(zip(TENSORS, layouts, strict=True))
    workspace_bytes = native.workspace_bytes(problem)
    sizes = [_bytes(given.get(name)) for name in INPUTS]
    sizes += [0 if result is None else _contiguous_bytes(result) for result in problem.outputs().values()]
    return Plan(problem, (*sizes, workspace_bytes), results_of(problem), workspace_bytes)


def results_of(problem: Problem) -> tuple[tuple[tuple[Any, ...], torch.dtype], ...]:
    """Shape and dtype of each result that the caller gets."""
    arrays = [array for array in problem.outputs().values() if array is not None]
    return tuple((array.shape, getattr(torch, array.dtype)) for array in arrays)


def checked_problem(
    layouts: tuple[Layout | None, ...], options: tuple[int, ...], output: Layout | None = None
) -> Problem:
    """Checks every tensor and option. Raises ValueError or NotImplementedError in the words of jax_moe.problem."""
    given = dict(zip(TENSORS, layouts, strict=True))
    option = dict(zip(OPTIONS, options, strict=True))
    sizes = {name: option.pop(name) for name in ("num_experts", "local_expert_offset", *DECLARED)}
    parsed = Options.parse(FUNCTION, **option)
    _check_devices(given, output)
    bias = given.pop("routing_bias")
    scale = given["hidden_states_scale"]
    problem = Problem.create(
        FUNCTION,
        {name: _array(name, tensor) for name, tensor in given.items()},
        parsed,
        num_experts=sizes["num_experts"],
        local_expert_offset=sizes["local_expert_offset"],
        scale_strides=tuple(scale[3]) if scale is not None and len(scale[3]) == 2 else None,
        declared={name: sizes[name] for name in DECLARED},
    )
    for name, tensor in given.items():
        if name != "hidden_states_scale":
            _check_contiguous(name, tensor)
    if bias is not None:
        _check_bias(bias, problem.num_experts)
    if output is not None:
        _check_output(output, problem)
    return problem


def _check_devices(given: dict[str, Layout | None], output: Layout | None) -> None:
    reference = given["hidden_states"]
    assert reference is not None
    device = reference[2]
    for name, tensor in (*given.items(), ("output", output)):
        if tensor is not None and tensor[2] != device:
            raise ValueError(f"{FUNCTION}: {name} must be on {device} like hidden_states, got {tensor[2]}")


def _check_contiguous(name: str, tensor: Layout | None) -> None:
    if tensor is not None and not _is_contiguous(tensor):
        raise ValueError(
            f"{FUNCTION}: {name} must be contiguous, got shape {_list(tensor[0])} with strides {_list(tensor[3])}; "
            "call .contiguous()"
        )


def _check_bias(bias: Layout, num_experts: int) -> None:
    if bias[1] not in (torch.bfloat16, torch.float32) or tuple(bias[0]) != (num_experts,):
        raise ValueError(
            f"{FUNCTION}: routing_bias must be None, bfloat16 or float32 [num_experts] = [{num_experts}], "
            f"got {_array('routing_bias', bias)}"
        )


def _check_output(output: Layout, problem: Problem) -> None:
    expected, given = problem.outputs()["output"], _array("output", output)
    assert expected is not None and given is not None
    if given.dtype != expected.dtype or tuple(given.shape) != tuple(expected.shape):
        raise ValueError(f"{FUNCTION}: output must be {expected}, got {given}")
    _check_contiguous("output", output)


def _is_contiguous(tensor: Layout) -> bool:
    # The strides are compared first: with contiguous tensors no question is asked about a symbolic number of tokens.
    expected = 1
    for size, stride in zip(reversed(tensor[0]), reversed(tensor[3]), strict=True):
        if stride != expected and size != 1:
            return 0 in tensor[0]
        expected = expected * size
    return True


def _array(name: str, tensor: Layout | None) -> Array | None:
    """As jax_moe.problem sees it. Sizes other than the number of tokens become plain integers."""
    if tensor is None:
        return None
    tokens_dimension = {"topk_ids": 0, "hidden_states": 0, "hidden_states_scale": 1, "output": 0}.get(name)
    shape = tuple(size if i == tokens_dimension else int(size) for i, size in enumerate(tensor[0]))
    return Array(shape, str(tensor[1]).removeprefix("torch."))


def _bytes(tensor: Layout | None) -> int:
    """From the first to the last element, strides included."""
    if tensor is None or 0 in tensor[0]:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor[0], tensor[3], strict=True))
    return (last + 1) * tensor[1].itemsize


def _contiguous_bytes(array: Array) -> int:
    return math.prod(array.shape) * getattr(torch, array.dtype).itemsize


def _list(values: Any) -> str:
    return f"[{', '.join(map(str, values))}]"
