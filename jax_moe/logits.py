"""Routing from logits in JAX: expert ids and weights, alone or with the mixture of experts behind them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import native
from .enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout
from .moe import fp8_block_scale_routed_moe
from .problem import Array
from .routing_problem import RoutingProblem
from .xla_call import vary, varying_axes


def route(
    routing_logits: ArrayLike,
    routing_bias: ArrayLike | None = None,
    *,
    top_k: int,
    routing_method_type: int | RoutingMethodType,
    n_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float | None = None,
    norm_topk_prob: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights, from a router's logits.

    routing_logits: float32 or bfloat16 [T, E], T tokens and E experts, E at most 2048.
    routing_bias: None, or float32 or bfloat16 [E]; added to the keys of DeepSeekV3 and MiniMax2, unused elsewhere.
    top_k: experts of a token, K in [1, min(E, 32)].
    routing_method_type: what experts are ordered by (the key) and the weight of those chosen, all in float32:
      Default (0)            softmax over E                   that probability
      Renormalize (1)        the logit                        softmax over the chosen
      DeepSeekV3 (2)         sigmoid + bias, in groups        sigmoid x routed_scaling_factor / (their sum + 1e-20)
      Llama4 (3), K = 1      the logit                        sigmoid
      RenormalizeNaive (4)   softmax over E                   that probability / sum over the chosen
      TopK (5)               the logit                        the logit
      SigmoidRenorm (6)      sigmoid                          sigmoid / sum over the chosen
      MiniMax2 (7)           sigmoid + bias                   as DeepSeekV3
      Sigmoid (8)            sigmoid                          sigmoid
    n_group, topk_group: with DeepSeekV3, experts are chosen from the topk_group groups (of n_group equal ones) whose
      two greatest keys have the greatest sums; None, 0 or 1 elsewhere.
    routed_scaling_factor: of DeepSeekV3 and MiniMax2, None is 1; unused elsewhere.
    norm_topk_prob: False leaves out the division of SigmoidRenorm; unused elsewhere.

    Returns (ids int32 [T, K], weights float32 [T, K]) in descending order of the key; of equal keys the smaller id
    comes first, and NaN comes after everything. The pair is the `topk_ids` of `fp8_block_scale_routed_moe`.

    Works under jit, vmap, scan, shard_map (over tokens) and export with a symbolic T. Inference only.

    Raises, while tracing, ValueError for arguments that do not fit each other and NotImplementedError for
    differentiation and for a symbolic E.
    """
    return _route(
        "route",
        routing_logits,
        routing_bias,
        top_k=top_k,
        routing_method_type=routing_method_type,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
    )


def fp8_block_scale_moe(
    routing_logits: ArrayLike,
    routing_bias: ArrayLike | None,
    hidden_states: ArrayLike,
    hidden_states_scale: ArrayLike | None,
    gemm1_weights: ArrayLike,
    gemm1_weights_scale: ArrayLike,
    gemm2_weights: ArrayLike,
    gemm2_weights_scale: ArrayLike,
    *,
    top_k: int,
    n_group: int | None = None,
    topk_group: int | None = None,
    local_expert_offset: int | ArrayLike = 0,
    routed_scaling_factor: float | None = None,
    routing_method_type: int | RoutingMethodType = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int | WeightLayout = 0,
    do_finalize: bool = True,
    fp8_quantization_type: int | Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8,
    activation_type: int | ActivationType = ActivationType.Swiglu,
    norm_topk_prob: bool = True,
    gemm1_alpha: ArrayLike | None = None,
    gemm1_beta: ArrayLike | None = None,
    gemm1_clamp_limit: ArrayLike | None = None,
    hidden_states_scale_order: str | None = None,
    batch_invariant: bool | None = None,
    enable_pdl: bool | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """A mixture-of-experts layer on FP8 weights with block scales, from the router's logits: `route`, then
    `fp8_block_scale_routed_moe` with its ids and float32 weights.

    routing_logits, routing_bias, top_k, n_group, topk_group, routed_scaling_factor, routing_method_type and
    norm_topk_prob are those of `route`; num_experts is the number of logits of a token. Everything else is as in
    `fp8_block_scale_routed_moe`, the result too (without do_finalize its expert_weights are float32).
    """
    ids, weights = _route(
        "fp8_block_scale_moe",
        routing_logits,
        routing_bias,
        top_k=top_k,
        routing_method_type=routing_method_type,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
        enable_pdl=enable_pdl,
    )
    return fp8_block_scale_routed_moe(
        (ids, weights),
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        num_experts=jnp.shape(routing_logits)[1],
        local_expert_offset=local_expert_offset,
        use_shuffled_weight=use_shuffled_weight,
        weight_layout=weight_layout,
        do_finalize=do_finalize,
        fp8_quantization_type=fp8_quantization_type,
        activation_type=activation_type,
        gemm1_alpha=gemm1_alpha,
        gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
        hidden_states_scale_order=hidden_states_scale_order,
        batch_invariant=batch_invariant,
        enable_pdl=enable_pdl,
    )


def _route(function: str, logits: Any, bias: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    described = _describe(function, "routing_logits", logits)
    problem = RoutingProblem.create(
        function, described, None if bias is None else _describe(function, "routing_bias", bias), **options
    )
    operands = (logits, bias) if problem.reads_bias else (logits,)
    return _function(dataclasses.replace(problem, num_tokens=0))(*operands)


def _describe(function: str, name: str, value: Any) -> Array:
    """Shape and dtype of an argument, taken before JAX could convert it. Only the number of tokens may be symbolic."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{function}: {name} must be an array, got {type(value).__name__}")
    array = Array(tuple(value.shape), str(value.dtype))
    if not all(isinstance(size, int) for size in array.shape[-1:]):
        raise NotImplementedError(f"{function}: {name} must be of a constant number of experts, got {array}")
    return array


@functools.cache
def _function(problem: RoutingProblem) -> Any:
    """Logits and, where the problem reads it, bias -> ids and weights. The problem's num_tokens means nothing."""

    @jax.custom_batching.custom_vmap
    def apply(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _custom_call(problem, *operands)

    @apply.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> tuple[Any, Any]:
        logits, *bias = operands
        if not any(in_batched[1:]):
            results = apply(logits.reshape(-1, problem.num_experts), *bias)
            return tuple(x.reshape(*logits.shape[:2], problem.top_k) for x in results), (True, True)

        def one(batched: list[jax.Array]) -> tuple[jax.Array, ...]:
            rest = iter(batched)
            return apply(*(next(rest) if b else x for x, b in zip(operands, in_batched, strict=True)))

        results = jax.lax.map(one, [x for x, b in zip(operands, in_batched, strict=True) if b])
        return results, (True, True)

    def route_logits(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return apply(*operands)

    inference_only = jax.custom_jvp(route_logits)
    inference_only.defjvp(_refuse_differentiation)
    return jax.jit(inference_only)


def _refuse_differentiation(primals: object, tangents: object) -> NoReturn:
    raise NotImplementedError(
        "route: every argument must be free of derivatives (inference only), got a differentiated one; wrap the "
        "arguments in jax.lax.stop_gradient"
    )


def _custom_call(problem: RoutingProblem, logits: jax.Array, *bias: jax.Array) -> tuple[jax.Array, ...]:
    shapes = dataclasses.replace(problem, num_tokens=logits.shape[0]).outputs().values()
    results = jax.ffi.ffi_call(native.ROUTE_LOGITS_TARGET, [jax.ShapeDtypeStruct(*shape) for shape in shapes])(
        logits, *(bias or (jnp.zeros(0, jnp.float32),)), **problem.attributes()
    )
    # Under shard_map results differ between the devices that operands differ between, which JAX cannot know.
    axes = sorted(set().union(*map(varying_axes, (logits, *bias))))
    return tuple(vary(x, axes) for x in results)
