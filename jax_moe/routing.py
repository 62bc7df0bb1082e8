"""Packed routing: an expert id and its weight in one int32, (id << 16) | bits of bfloat16(weight).

Plain jnp, so both functions work under jit, vmap, scan and export.
"""

from __future__ import annotations

from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .problem import MAX_NUM_EXPERTS


def pack_topk_ids(ids: ArrayLike, weights: ArrayLike) -> jax.Array:
    """Expert ids and routing weights as the `topk_ids` of fp8_block_scale_routed_moe.

    ids: any integer dtype, [num_tokens, top_k] (any shape works); -1 marks a padding slot. An id outside [-1, 32767]
        does not fit the int16 it is stored in and becomes -1, so that it can never name another expert.
    weights: bfloat16 (kept bit for bit), or float16 or float32 (rounded to bfloat16, to nearest even), of the shape of
        `ids`. Negative weights are fine.
    Returns int32 of the same shape. The bits carry no derivative: differentiating through `weights` raises
    NotImplementedError (it would be zero without a word).
    Raises ValueError for another dtype or for shapes that differ.
    """
    ids, weights = ids if isinstance(ids, jax.Array) else np.asarray(ids), jnp.asarray(weights)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"pack_topk_ids: ids must be of an integer dtype, got {ids.dtype}{list(ids.shape)}")
    if weights.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        got = f"{weights.dtype}{list(weights.shape)}"
        raise ValueError(f"pack_topk_ids: weights must be bfloat16, float16 or float32, got {got}")
    if ids.shape != weights.shape:
        expected = f"{list(ids.shape)}, the shape of ids"
        raise ValueError(f"pack_topk_ids: weights must be {expected}, got {list(weights.shape)}")
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(np.int32)
    # NOTE: compared before the cast to 32 bits, which would fold a 64-bit id onto another expert.
    fits = (ids >= 0) & (ids <= MAX_NUM_EXPERTS)
    return _pack(jnp.where(fits, ids.astype(np.int32), -1), weights)


@jax.custom_jvp
def _pack(ids: jax.Array, weights: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(weights.astype(jnp.bfloat16), jnp.uint16)
    # NOTE: unsigned, hence zero-extended: the sign bit of a negative weight must not spread over the id.
    return (ids << 16) | bits.astype(jnp.int32)


@_pack.defjvp
def _pack_jvp(primals: object, tangents: object) -> NoReturn:
    raise NotImplementedError(
        "pack_topk_ids: weights must be free of derivatives (packed bits carry none), got differentiated ones; "
        "wrap them in jax.lax.stop_gradient"
    )


def unpack_topk_ids(packed: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The expert ids (int32, sign-extended, -1 for padding) and routing weights (bfloat16) of int32 packed ids.

    Raises ValueError for another dtype.
    """
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.int32:
        raise ValueError(f"unpack_topk_ids: packed must be int32, got {packed.dtype}{list(packed.shape)}")
    weights = jax.lax.bitcast_convert_type((packed & 0xFFFF).astype(jnp.uint16), jnp.bfloat16)
    return packed >> 16, weights
