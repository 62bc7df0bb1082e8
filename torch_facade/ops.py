"""The torch.library ops `jax_moe::*`: schemas, kernels and fakes, one op per kind of result.

Kernels hand raw pointers to the compiled library on the current stream. Results and workspace come from torch's caching
allocator, so that a call can be captured in a CUDA graph. plan.py validates, in the kernels and in the fakes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from jax_moe import native

from .arguments import increment_version, layout
from .eager import Calls
from .launch import launch
from .plan import HIDDEN_STATES, OPTIONAL, TENSORS, Plan, checked_problem, plan, repeatable, results_of

# The tensors of plan.TENSORS and the integers of plan.OPTIONS, by position; tensors of plan.OPTIONAL by name; output.
Run = Callable[[Sequence[Any], Mapping[str, torch.Tensor], "torch.Tensor | None"], list[torch.Tensor]]

TENSORS_AND_OPTIONS = (
    "Tensor topk_ids, Tensor hidden_states, Tensor? hidden_states_scale, Tensor gemm1_weights, "
    "Tensor gemm1_weights_scale, Tensor gemm2_weights, Tensor gemm2_weights_scale, int[] options"
)
# What most calls leave out comes last with a default: the dispatcher then spends little time on it.
BY_NAME = ", ".join(f"Tensor? {name}=None" for name in OPTIONAL)
LIBRARY = torch.library.Library("jax_moe", "DEF")
# torch.compile must hand over tensors with the strides that were checked when it traced.
CALLS = Calls()
GIVEN = (*TENSORS, *OPTIONAL, "output")  # the tensors of those calls
TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))


def _kernel(
    arguments: Sequence[Any], optional: Mapping[str, torch.Tensor], output: torch.Tensor | None
) -> list[torch.Tensor]:
    """What plan.results_of says; a given `output` is written and not returned."""
    *tensors, options = arguments
    given, options = (*tensors, *[optional.get(name) for name in OPTIONAL], output), tuple(options)
    results = CALLS.run(given, options)
    if results is not None:
        return results
    call = planned(given, options)
    x = tensors[HIDDEN_STATES]
    allocated = [x.new_empty(shape, dtype=dtype) for shape, dtype in call.allocated]
    tensors += optional.values()
    tensors += allocated if output is None else [output, *allocated]
    pointers = call.in_order([0, *[0 if tensor is None else tensor.data_ptr() for tensor in tensors]])
    launch(native.forward, x, call.problem, pointers, call.sizes)
    CALLS.keep(given, options, lambda: repeatable(call, dict(zip(GIVEN, given, strict=True))))
    return allocated[: call.num_results]


def planned(given: Sequence[torch.Tensor | None], options: tuple[int, ...]) -> Plan:
    """The checked plan of a call on tensors in the order of GIVEN."""
    optional = {name: t for name, t in zip(OPTIONAL, given[len(TENSORS) : -1], strict=True) if t is not None}
    output = given[-1]
    layouts = _layouts([*given[: len(TENSORS)], *optional.values()])
    return plan(layouts, tuple(optional), options, None if output is None else layout(output))


def _fake(
    arguments: Sequence[Any], optional: Mapping[str, torch.Tensor], output: torch.Tensor | None
) -> list[torch.Tensor]:
    *tensors, options = arguments
    x = tensors[HIDDEN_STATES]
    tensors += optional.values()
    given = None if output is None else layout(output)
    problem = checked_problem(_layouts(tensors), tuple(optional), tuple(options), given)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in results_of(problem, given)]


def _layouts(tensors: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    return tuple([t if t is None else (t.shape, t.dtype, t.device, t.stride()) for t in tensors])


def _one(run: Run) -> Callable[..., torch.Tensor]:
    def call(*arguments: Any, **optional: torch.Tensor) -> torch.Tensor:
        [result] = run(arguments, optional, None)
        return result

    return call


def _listed(run: Run) -> Callable[..., list[torch.Tensor]]:
    return lambda *arguments, **optional: run(arguments, optional, None)


def _written(run: Run) -> Callable[..., None]:
    def call(*arguments: Any, **optional: torch.Tensor) -> None:
        *others, output = arguments
        run(others, optional, output)
        increment_version(output)

    return call


def _written_with_lora(run: Run) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def call(*arguments: Any, **optional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *others, output = arguments
        expanded_idx_to_permuted_idx, gemm1_activation_output = run(others, optional, output)
        increment_version(output)
        return expanded_idx_to_permuted_idx, gemm1_activation_output

    return call


def _define(name: str, arguments: str, result: str, form: Callable[[Run], Callable[..., Any]]) -> Callable[..., Any]:
    LIBRARY.define(f"{name}({arguments}) -> {result}", tags=TAGS)
    LIBRARY.impl(name, form(_kernel), "CPU")
    LIBRARY.impl(name, form(_kernel), "CUDA")
    torch.library.register_fake(f"jax_moe::{name}", form(_fake), lib=LIBRARY)
    return getattr(torch.ops.jax_moe, name).default


# No op returns a tensor that it was given: what a caller's list holds of those, moe.py puts there.
ARGUMENTS = f"{TENSORS_AND_OPTIONS}, *, {BY_NAME}"
OUT_ARGUMENTS = f"{TENSORS_AND_OPTIONS}, Tensor(a!) output, *, {BY_NAME}"
finalized = _define("fp8_block_scale_routed_moe", ARGUMENTS, "Tensor", _one)
finalized_out = _define("fp8_block_scale_routed_moe_out", OUT_ARGUMENTS, "()", _written)
listed = _define("fp8_block_scale_routed_moe_list", ARGUMENTS, "Tensor[]", _listed)
lora_out = _define("fp8_block_scale_routed_moe_lora_out", OUT_ARGUMENTS, "(Tensor, Tensor)", _written_with_lora)
