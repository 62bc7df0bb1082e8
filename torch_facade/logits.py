"""The function that serving frameworks call with the router's logits, and the op that routes.

Routing is one functional op, `jax_moe::route_logits`; everything behind it is the routed function.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from jax_moe import native
from jax_moe.enums import Fp8QuantizationType, RoutingMethodType
from jax_moe.options import invalid
from jax_moe.problem import Array
from jax_moe.routing_problem import BUFFERS, RoutingProblem

from .arguments import Layout, check_tensor, layout
from .eager import Calls, plan_of
from .launch import launch
from .moe import trtllm_fp8_block_scale_routed_moe
from .ops import LIBRARY, TAGS

FUNCTION = "trtllm_fp8_block_scale_moe"
CALLS, OP_CALLS = Calls(), Calls()  # of the function and of the op
OPTIONS = ("num_experts", "top_k", "n_group", "topk_group", "routing_method_type", "norm_topk_prob", "enable_pdl")
FLAGS = {"norm_topk_prob": "True or False", "enable_pdl": "None, True or False"}  # of OPTIONS


def trtllm_fp8_block_scale_moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    tune_max_num_tokens: int = 8192,
    fp8_quantization_type: Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8,
    activation_type: int = 3,
    norm_topk_prob: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    *,
    gemm1_alpha: torch.Tensor | None = None,
    gemm1_beta: torch.Tensor | None = None,
    gemm1_clamp_limit: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """A mixture-of-experts layer in FP8 with block scales, from the router's logits.

    Chooses K = top_k of E = num_experts for each of T tokens, all in float32, then does what
    `trtllm_fp8_block_scale_routed_moe` does with these ids and float32 weights. Experts are chosen in descending order
    of a key; of equal keys the smaller id comes first, and NaN comes after everything.

    Args (those not named here are the routed function's):
        routing_logits: float32 or bfloat16 [T, E], contiguous.
        routing_bias: None, or bfloat16 or float32 [E]; added to the keys of DeepSeekV3 and MiniMax2, unused elsewhere.
        num_experts: E, at most 2048.
        top_k: K, at most min(E, 32); 1 with Llama4.
        n_group: number of expert groups with routing_method_type DeepSeekV3, a divisor of E; else None, 0 or 1.
        topk_group: number of groups to choose from, those whose two greatest keys have the greatest sums.
        routed_scaling_factor: factor of the weights of DeepSeekV3 and MiniMax2, None is 1; unused elsewhere.
        routing_method_type: RoutingMethodType, key -> weight: Default: softmax over E -> that. Renormalize: logit ->
            softmax over the chosen. DeepSeekV3, MiniMax2: sigmoid + bias -> sigmoid * routed_scaling_factor / (sum over
            the chosen + 1e-20). Llama4: logit -> sigmoid. RenormalizeNaive: softmax over E -> that / sum over the
            chosen. TopK: logit -> logit. SigmoidRenorm: sigmoid -> that / sum over the chosen. Sigmoid: sigmoid ->
            that.
        norm_topk_prob: False leaves out the division of SigmoidRenorm; unused elsewhere.
        routing_replay_out: None, or int16 [T or more, K] on the same device: rows 0..T-1 receive the chosen ids.

    Returns:
        What the routed function returns; without do_finalize its expert_weights are float32 [T, K].

    Raises:
        ValueError: an argument is not what is written above; the message names it, the expected and the given.
        NotImplementedError: what this version, build or device does not have, and tensors that require grad while grad
            mode is on: there is no backward.
    """
    given = (routing_logits, routing_bias, hidden_states)
    options = (
        num_experts,
        top_k,
        n_group,
        topk_group,
        routing_method_type,
        norm_topk_prob,
        enable_pdl,
        routed_scaling_factor,
    )
    ids, weights = _route(given, options)
    if routing_replay_out is not None:
        _check_replay(routing_replay_out, ids)
        routing_replay_out[: ids.shape[0]].copy_(ids)
    return trtllm_fp8_block_scale_routed_moe(
        (ids, weights),
        None,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        num_experts,
        top_k,
        n_group,
        topk_group,
        intermediate_size,
        local_expert_offset,
        local_num_experts,
        routed_scaling_factor,
        routing_method_type=routing_method_type,
        use_shuffled_weight=use_shuffled_weight,
        weight_layout=weight_layout,
        do_finalize=do_finalize,
        enable_pdl=enable_pdl,
        output=output,
        tune_max_num_tokens=tune_max_num_tokens,
        fp8_quantization_type=fp8_quantization_type,
        activation_type=activation_type,
        gemm1_alpha=gemm1_alpha,
        gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
        batch_invariant=batch_invariant,
    )


def _route(given: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """ids and weights. hidden_states are given for their device."""
    if torch.compiler.is_compiling():
        return _call(given, options)
    pair = CALLS.run(given, options)
    if pair is None:
        pair = _call(given, options)
        CALLS.keep(given, options, lambda: _plan(given, _integers(options[:-1]), options[-1]))
    return pair


def _call(given: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """The same through the op."""
    logits, bias, hidden_states = given
    *integers, routed_scaling_factor = options
    _check_tensor("routing_logits", logits, hidden_states)
    if bias is not None:
        _check_tensor("routing_bias", bias, hidden_states)
    if not (routed_scaling_factor is None or isinstance(routed_scaling_factor, (int, float))):
        raise invalid(FUNCTION, "routed_scaling_factor", "None or a finite number", repr(routed_scaling_factor))
    return route_logits(logits, bias, _integers(integers), routed_scaling_factor)


def _plan(given: tuple[Any, ...], integers: Sequence[int], routed_scaling_factor: float | None) -> Any:
    """The plan of calls like this one, which was checked; given are the logits, the bias, and others."""
    logits, bias = given[:2]
    problem = _problem(logits, bias, integers, routed_scaling_factor)
    bias_bytes = bias.nbytes if problem.reads_bias else 0
    allocated = {name: (array.shape, getattr(torch, array.dtype)) for name, array in problem.outputs().items()}
    result_bytes = [math.prod(shape) * dtype.itemsize for shape, dtype in allocated.values()]
    buffers = dict(zip(BUFFERS, (logits.nbytes, bias_bytes, *result_bytes), strict=True))
    names = ("routing_logits", "routing_bias" if problem.reads_bias else "unread bias", "hidden_states")
    by_name = dict(zip(names, given, strict=False))
    return plan_of(native.plan_route_logits, problem, buffers, by_name, allocated, tuple(allocated))


def _check_tensor(name: str, tensor: Any, hidden_states: Any) -> None:
    check_tensor(FUNCTION, name, tensor)
    if isinstance(hidden_states, torch.Tensor) and tensor.device != hidden_states.device:
        raise invalid(FUNCTION, name, f"on {hidden_states.device} like hidden_states", tensor.device)


def _check_replay(replay: Any, ids: torch.Tensor) -> None:
    expected = f"int16 [num_tokens or more, top_k] = [{ids.shape[0]} or more, {ids.shape[1]}] on {ids.device}"
    if not isinstance(replay, torch.Tensor):
        raise invalid(FUNCTION, "routing_replay_out", expected, type(replay).__name__)
    fits = replay.dim() == 2 and replay.shape[0] >= ids.shape[0] and replay.shape[1] == ids.shape[1]
    if replay.dtype != torch.int16 or not fits or replay.device != ids.device:
        raise invalid(FUNCTION, "routing_replay_out", expected, f"{_array(layout(replay))} on {replay.device}")


def _integers(values: Sequence[Any]) -> list[int]:
    """The integers of the op; what they may be is checked there."""
    integers = []
    for name, value in zip(OPTIONS, values, strict=True):
        if isinstance(value, enum.Enum):  # by name: other libraries number their members otherwise
            value = getattr(RoutingMethodType, value.name, value) if name == "routing_method_type" else value
        elif value is None and name in ("n_group", "topk_group"):
            value = 0
        elif value is None and name == "enable_pdl":
            value = True
        expected = FLAGS.get(name)
        if not isinstance(value, (int, torch.SymInt)) or (isinstance(value, bool) and not expected):
            raise invalid(FUNCTION, name, expected or "an integer", repr(value))
        integers.append(int(value))
    return integers


def _checked_problem(
    logits: Layout, bias: Layout | None, options: tuple[int, ...], routed_scaling_factor: float | None
) -> RoutingProblem:
    given = dict(zip(OPTIONS, options, strict=True))
    num_experts = given.pop("num_experts")
    if len(logits[0]) == 2 and logits[0][1] != num_experts:
        raise invalid(FUNCTION, "num_experts", f"{logits[0][1]}, the number of logits of a token", num_experts)
    return RoutingProblem.create(
        FUNCTION, _array(logits), bias and _array(bias), routed_scaling_factor=routed_scaling_factor, **given
    )


_known_problem = functools.lru_cache(maxsize=4096)(_checked_problem)  # eager calls repeat the same ones


def _array(tensor: Layout) -> Array:
    """As jax_moe.problem sees it. Sizes other than the number of tokens become plain integers."""
    shape = tuple(size if i == 0 and len(tensor[0]) == 2 else int(size) for i, size in enumerate(tensor[0]))
    return Array(shape, str(tensor[1]).removeprefix("torch."))


def _results(problem: RoutingProblem, logits: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor]:
    """Memory for ids and weights."""
    for name, tensor in (("routing_logits", logits), ("routing_bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            raise invalid(FUNCTION, name, "contiguous (call .contiguous())", f"strides {list(tensor.stride())}")
    return [logits.new_empty(x.shape, dtype=getattr(torch, x.dtype)) for x in problem.outputs().values()]


def _problem(
    logits: torch.Tensor, bias: torch.Tensor | None, options: Sequence[int], routed_scaling_factor: float | None
) -> RoutingProblem:
    bias_layout = None if bias is None else layout(bias)
    return _known_problem(layout(logits), bias_layout, tuple(options), routed_scaling_factor)


def _kernel(
    logits: torch.Tensor, bias: torch.Tensor | None, options: Sequence[int], routed_scaling_factor: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    given, key = (logits, bias), (*options, routed_scaling_factor)
    pair = OP_CALLS.run(given, key)
    if pair is not None:
        return tuple(pair)
    problem = _problem(logits, bias, options, routed_scaling_factor)
    ids, weights = _results(problem, logits, bias)
    tensors = (logits, bias if problem.reads_bias else None, ids, weights)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = [0 if tensor is None else tensor.nbytes for tensor in tensors]
    launch(native.route_logits, logits, problem, pointers, sizes)
    OP_CALLS.keep(given, key, lambda: _plan(given, options, routed_scaling_factor))
    return ids, weights


def _fake(
    logits: torch.Tensor, bias: torch.Tensor | None, options: Sequence[int], routed_scaling_factor: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bias_layout = None if bias is None else layout(bias)
    problem = _checked_problem(layout(logits), bias_layout, tuple(options), routed_scaling_factor)
    ids, weights = _results(problem, logits, bias)
    return ids, weights


LIBRARY.define(
    "route_logits(Tensor routing_logits, Tensor? routing_bias, int[] options, float? routed_scaling_factor) "
    "-> (Tensor topk_ids, Tensor topk_weights)",
    tags=TAGS,
)
LIBRARY.impl("route_logits", _kernel, "CPU")
LIBRARY.impl("route_logits", _kernel, "CUDA")
torch.library.register_fake("jax_moe::route_logits", _fake, lib=LIBRARY)
route_logits = torch.ops.jax_moe.route_logits.default
