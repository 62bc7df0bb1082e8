"""From the tensors of a call to its Problem: validation, and the plan that eager calls keep.

Kernels ask for `plan` (cached by the layouts), fakes for `checked_problem`, whose number of tokens may be symbolic.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from jax_moe import native
from jax_moe.problem import INPUTS, OUTPUTS, PER_EXPERT, Array, Options, Problem

from .arguments import Layout, is_contiguous
from .eager import plan_of

FUNCTION = "trtllm_fp8_block_scale_routed_moe"

# The arguments of an op: tensors by position, then the integers, then the tensors that most calls leave out, by name.
# The offset of the local experts is an integer here.
OPTIONAL = ("topk_weights", "gemm1_lora_delta", *PER_EXPERT)
TENSORS = tuple(name for name in INPUTS if name not in (*OPTIONAL, "local_expert_offset"))
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
    "batch_invariant",
    "enable_pdl",
)
DECLARED = ("top_k", "intermediate_size", "local_num_experts")
HIDDEN_STATES = TENSORS.index("hidden_states")
# Dimensions that may be the number of tokens: of the scale either one is, as its format and its caller want it.
TOKENS_DIMENSIONS = {"hidden_states_scale": (0, 1)} | dict.fromkeys(
    ("topk_ids", "topk_weights", "hidden_states", "gemm1_lora_delta", "output"), (0,)
)

Allocation = tuple[tuple[Any, ...], torch.dtype]


class Plan(NamedTuple):
    """What the layouts and options of a call determine."""

    problem: Problem
    sizes: tuple[int, ...]  # bytes of INPUTS, then of OUTPUTS
    allocated: tuple[Allocation, ...]  # what the call has to allocate: the results, then what nobody gets to see
    names: tuple[str, ...]  # of `allocated`
    num_results: int  # of `allocated`
    # From the pointers (0, those of the given tensors in the order of `layouts`, output, those of `allocated`) to those
    # of INPUTS and OUTPUTS.
    in_order: Callable[[Sequence[int]], tuple[int, ...]]


@functools.lru_cache(maxsize=4096)
def plan(
    layouts: tuple[Layout | None, ...], optional: tuple[str, ...], options: tuple[int, ...], output: Layout | None
) -> Plan:
    """The plan of a call: `layouts` of TENSORS and of those of OPTIONAL that `optional` names, OPTIONS, and output."""
    problem = checked_problem(layouts, optional, options, output)
    outputs = {name: array for name, array in problem.outputs().items() if array is not None}
    allocated = {name: _allocation(array) for name, array in outputs.items() if name != "output" or output is None}
    allocated["workspace"] = ((native.workspace_bytes(problem),), torch.uint8)
    given = dict(zip((*TENSORS, *optional), layouts, strict=True))
    sizes = {name: _bytes(tensor) for name, tensor in given.items()}
    sizes |= {name: _contiguous_bytes(_allocation(array)) for name, array in outputs.items()}
    sizes["workspace"] = _contiguous_bytes(allocated["workspace"])
    buffers = (None, *given, *(() if output is None else ("output",)), *allocated)
    return Plan(
        problem,
        tuple(sizes.get(name, 0) for name in (*INPUTS, *OUTPUTS)),
        tuple(allocated.values()),
        tuple(allocated),
        len(results_of(problem, output)),
        operator.itemgetter(*(buffers.index(name) if name in buffers else 0 for name in (*INPUTS, *OUTPUTS))),
    )


def repeatable(call: Plan, given: Mapping[str, torch.Tensor | None], returned: Sequence[str] | None = None) -> Any:
    """The library's plan of calls like `call` on the tensors `given`, in their order.

    returned: names of the results, which come as a list but for one alone; None: a list of the op's results.
    """
    return plan_of(
        native.plan_forward,
        call.problem,
        dict(zip((*INPUTS, *OUTPUTS), call.sizes, strict=True)),
        given,
        dict(zip(call.names, call.allocated, strict=True)),
        call.names[: call.num_results] if returned is None else returned,
        returned is None or len(returned) != 1,
    )


def results_of(problem: Problem, output: Layout | None) -> tuple[Allocation, ...]:
    """Shape and dtype of each result that an op returns: none that is an argument, as a given `output` is."""
    outputs = problem.outputs()
    names = [name for name in problem.returned() if name != "output" or output is None]
    return tuple(_allocation(array) for name in names if (array := outputs[name]) is not None)


def checked_problem(
    layouts: tuple[Layout | None, ...], optional: tuple[str, ...], options: tuple[int, ...], output: Layout | None
) -> Problem:
    """Checks every tensor and option. Raises ValueError or NotImplementedError in the words of jax_moe.problem."""
    given = dict(zip((*TENSORS, *optional), layouts, strict=True))
    option = dict(zip(OPTIONS, options, strict=True))
    sizes = {name: option.pop(name) for name in ("num_experts", "local_expert_offset", *DECLARED)}
    parsed = Options.parse(FUNCTION, **option)
    _check_devices(given, output)
    scale = given["hidden_states_scale"]
    problem = Problem.create(
        FUNCTION,
        {name: _array(name, tensor) for name, tensor in given.items()},
        parsed,
        num_experts=sizes["num_experts"],
        local_expert_offset=sizes["local_expert_offset"],
        scale_is_token_major=None,  # its shape says so
        scale_strides=tuple(scale[3]) if scale is not None and len(scale[3]) == 2 else None,
        declared={name: sizes[name] for name in DECLARED},
    )
    for name, tensor in given.items():
        if name != "hidden_states_scale":
            _check_contiguous(name, tensor)
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


def _check_contiguous(name: str, tensor: Layout | None, next_step: str = "; call .contiguous()") -> None:
    if tensor is not None and not is_contiguous(tensor):
        raise ValueError(
            f"{FUNCTION}: {name} must be contiguous, got shape {_list(tensor[0])} with strides {_list(tensor[3])}"
            f"{next_step}"
        )


def _check_output(output: Layout, problem: Problem) -> None:
    expected, given = problem.outputs()["output"], _array("output", output)
    assert expected is not None and given is not None
    if given.dtype != expected.dtype or tuple(given.shape) != tuple(expected.shape):
        raise ValueError(f"{FUNCTION}: output must be {expected}, got {given}")
    _check_contiguous("output", output, next_step="")  # a contiguous copy would be written in its stead


def _array(name: str, tensor: Layout | None) -> Array | None:
    """As jax_moe.problem sees it. Sizes other than the number of tokens become plain integers."""
    if tensor is None:
        return None
    tokens_dimensions = TOKENS_DIMENSIONS.get(name, ())
    shape = tuple(size if i in tokens_dimensions else int(size) for i, size in enumerate(tensor[0]))
    return Array(shape, str(tensor[1]).removeprefix("torch."))


def _bytes(tensor: Layout | None) -> int:
    """From the first to the last element, strides included."""
    if tensor is None or 0 in tensor[0]:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor[0], tensor[3], strict=True))
    return (last + 1) * tensor[1].itemsize


def _allocation(array: Array) -> Allocation:
    return array.shape, getattr(torch, array.dtype)


def _contiguous_bytes(allocation: Allocation) -> int:
    shape, dtype = allocation
    return math.prod(shape) * dtype.itemsize


def _list(values: Any) -> str:
    return f"[{', '.join(map(str, values))}]"
