"""Finalising apart in JAX: the weighted sum of the rows that a call with do_finalize=False returned."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import native
from .finalize_problem import FinalizeProblem
from .problem import Array
from .xla_call import vary, varying_axes


def finalize(gemm2_output: ArrayLike, expert_weights: ArrayLike, expanded_idx_to_permuted_idx: ArrayLike) -> jax.Array:
    """What `fp8_block_scale_routed_moe` does last, for callers that stopped before it with do_finalize=False.

    gemm2_output: bfloat16 [R, H], H a multiple of 128: the rows to sum, any number of them.
    expert_weights: bfloat16 or float32 [T, K], K at most 32.
    expanded_idx_to_permuted_idx: int32 [T*K]: the row of slot t*K + k. A slot whose row is not in [0, R), -1 for one,
      is skipped: every bit pattern is safe.

    Returns bfloat16 [T, H]: for every token the sum over its slots, in order, of expert_weights[t, k] times its row,
    in float32, rounded once; zeros for a token without rows. These are the bits that do_finalize=True gives.

    Works under jit, vmap (it stays one call), scan, shard_map (over tokens, with gemm2_output whole on each device) and
    export with a symbolic T and R. Inference only.

    Raises, while tracing, ValueError for arguments that do not fit each other and NotImplementedError for
    differentiation and for a symbolic H or K.
    """
    described = (
        _describe("gemm2_output", gemm2_output, 1),
        _describe("expert_weights", expert_weights, 1),
        _describe("expanded_idx_to_permuted_idx", expanded_idx_to_permuted_idx, 0),
    )
    FinalizeProblem.create("finalize", *described)
    return _finalize(gemm2_output, expert_weights, expanded_idx_to_permuted_idx)


def _describe(name: str, value: Any, constant: int) -> Array:
    """Shape and dtype of an argument, taken before JAX could convert it. The last `constant` sizes are no symbols."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"finalize: {name} must be an array, got {type(value).__name__}")
    array = Array(tuple(value.shape), str(value.dtype))
    if constant and not all(isinstance(size, int) for size in array.shape[-constant:]):
        raise NotImplementedError(f"finalize: {name} must be of constant sizes but the first, got {array}")
    return array


@jax.custom_batching.custom_vmap
def _apply(rows: jax.Array, weights: jax.Array, row_of: jax.Array) -> jax.Array:
    described = [Array(x.shape, str(x.dtype)) for x in (rows, weights, row_of)]
    output = FinalizeProblem.create("finalize", *described).output()
    result = jax.ffi.ffi_call(native.FINALIZE_TARGET, jax.ShapeDtypeStruct(*output))(rows, weights, row_of)
    # Under shard_map the result differs between the devices that operands differ between, which JAX cannot know.
    return vary(result, sorted(set().union(*map(varying_axes, (rows, weights, row_of)))))


@_apply.def_vmap
def _vmap(
    axis_size: int, in_batched: list[bool], rows: jax.Array, weights: jax.Array, row_of: jax.Array
) -> tuple[Any, Any]:
    """One call on the tokens of all, call after call; rows of their own are numbered on."""
    batched_rows, batched_weights, batched_row_of = in_batched
    if not batched_weights:
        weights = jnp.broadcast_to(weights, (axis_size, *weights.shape))
    if not batched_row_of:
        row_of = jnp.broadcast_to(row_of, (axis_size, *row_of.shape))
    if batched_rows:
        size = rows.shape[1]
        first = (jnp.arange(axis_size, dtype=jnp.int32) * size)[:, None]
        row_of = jnp.where((row_of >= 0) & (row_of < size), row_of + first, -1)
        rows = rows.reshape(axis_size * size, rows.shape[2])
    _, tokens, top_k = weights.shape
    output = _apply(rows, weights.reshape(axis_size * tokens, top_k), row_of.reshape(axis_size * tokens * top_k))
    return output.reshape(axis_size, tokens, output.shape[1]), True


def _function(rows: jax.Array, weights: jax.Array, row_of: jax.Array) -> jax.Array:
    return _apply(rows, weights, row_of)


def _refuse_differentiation(primals: object, tangents: object) -> NoReturn:
    raise NotImplementedError(
        "finalize: every argument must be free of derivatives (inference only), got a differentiated one; wrap the "
        "arguments in jax.lax.stop_gradient"
    )


_function.__name__ = "finalize"  # in profiles and programs
_inference_only = jax.custom_jvp(_function)
_inference_only.defjvp(_refuse_differentiation)
_finalize = jax.jit(_inference_only)
