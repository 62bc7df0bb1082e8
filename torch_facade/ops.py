"""The torch.library ops `jax_moe::*`: schemas, kernels and fakes, one op per form of the result.

Kernels hand raw pointers to the compiled library on the current stream. Results and workspace come from torch's caching
allocator, so that a call can be captured in a CUDA graph. plan.py validates, in the kernels and in the fakes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jax_moe import native

from .plan import HIDDEN_STATES, checked_problem, layout, plan, results_of

Tensors = Sequence[torch.Tensor | None]  # in the order of plan.TENSORS
Run = Callable[[Tensors, Sequence[int], bool, torch.Tensor | None], list[torch.Tensor]]

# `options` are the integers of plan.OPTIONS without the last, do_finalize: the op's name says that.
ARGUMENTS = (
    "Tensor topk_ids, Tensor hidden_states, Tensor? hidden_states_scale, Tensor gemm1_weights, "
    "Tensor gemm1_weights_scale, Tensor gemm2_weights, Tensor gemm2_weights_scale, Tensor? routing_bias, int[] options"
)
LIBRARY = torch.library.Library("jax_moe", "DEF")
# torch.compile must hand over tensors with the strides that were checked when it traced.
TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))


def _kernel(
    tensors: Tensors, options: Sequence[int], do_finalize: bool, output: torch.Tensor | None
) -> list[torch.Tensor]:
    """The results in the order of Problem.returned(); `output`, where given, is the only one."""
    call = plan(_layouts(tensors), (*options, do_finalize), None if output is None else layout(output))
    x = tensors[HIDDEN_STATES]
    assert x is not None
    results = [x.new_empty(shape, dtype=dtype) for shape, dtype in call.results] if output is None else [output]
    workspace = x.new_empty(call.workspace_bytes, dtype=torch.uint8)
    # In the order of INPUTS, whose last, local_expert_offset, is a field of the problem here; then that of OUTPUTS.
    inputs = [0 if tensor is None else tensor.data_ptr() for tensor in tensors[:-1]]
    written = [result.data_ptr() for result in results]
    pointers = [*inputs, 0, *(written + [0, 0, 0] if do_finalize else [0] + written), workspace.data_ptr()]
    if x.is_cuda:
        index = x.get_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        native.forward(call.problem, pointers, call.sizes, device=index, stream=stream)
    else:
        native.forward(call.problem, pointers, call.sizes)
    return results


def _fake(
    tensors: Tensors, options: Sequence[int], do_finalize: bool, output: torch.Tensor | None
) -> list[torch.Tensor]:
    problem = checked_problem(_layouts(tensors), (*options, do_finalize), None if output is None else layout(output))
    x = tensors[HIDDEN_STATES]
    assert x is not None
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in results_of(problem)]


def _layouts(tensors: Tensors) -> tuple[Any, ...]:
    return tuple([None if tensor is None else layout(tensor) for tensor in tensors])


def _finalized(run: Run) -> Callable[..., torch.Tensor]:
    return lambda *arguments: run(arguments[:-1], arguments[-1], True, None)[0]


def _finalized_out(run: Run) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        *tensors, options, output = arguments
        run(tensors, options, True, output)
        if not output.is_inference():
            torch.autograd.graph.increment_version(output)

    return call


def _unfinalized(run: Run) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda *arguments: tuple(run(arguments[:-1], arguments[-1], False, None))


def _define(name: str, arguments: str, result: str, form: Callable[[Run], Callable[..., Any]]) -> Callable[..., Any]:
    LIBRARY.define(f"{name}({arguments}) -> {result}", tags=TAGS)
    LIBRARY.impl(name, form(_kernel), "CPU")
    LIBRARY.impl(name, form(_kernel), "CUDA")
    torch.library.register_fake(f"jax_moe::{name}", form(_fake), lib=LIBRARY)
    return getattr(torch.ops.jax_moe, name).default


finalized = _define("fp8_block_scale_routed_moe", ARGUMENTS, "Tensor", _finalized)
finalized_out = _define("fp8_block_scale_routed_moe_out", f"{ARGUMENTS}, Tensor(a!) output", "()", _finalized_out)
unfinalized = _define("fp8_block_scale_routed_moe_unfinalized", ARGUMENTS, "(Tensor, Tensor, Tensor)", _unfinalized)
