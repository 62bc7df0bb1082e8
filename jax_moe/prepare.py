"""Folds MxFp8 weights onto 128x128 power-of-two scales, so that the kernels of DeepSeekFp8 run them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from . import folding, layout
from .enums import ActivationType, parse_enum
from .folding import FUNCTION, MAX_EXPONENT_SPREAD, Folded, PreparedWeights
from .options import GATED, invalid
from .problem import MX_SCALE_BLOCK, SCALE_BLOCK, Array
from .quantize import MX_NAN, mx_exponent, power_of_two, to_e4m3

EPILOGUE_TILE_M = 128  # of shuffled MxFp8 weights
BEYOND = 64  # a shift after which a code is 0; there is none of so many bits upwards


def prepare_mxfp8_weights(
    gemm1_weights: ArrayLike,
    gemm1_weights_scale: ArrayLike,
    gemm2_weights: ArrayLike,
    gemm2_weights_scale: ArrayLike,
    *,
    use_shuffled_weight: bool = False,
    activation_type: int | ActivationType = ActivationType.Swiglu,
    max_exponent_spread: int = MAX_EXPONENT_SPREAD,
) -> PreparedWeights:
    """Weights for DeepSeekFp8 from those for MxFp8, and a report of how exact they are.

    The arrays are those of `fp8_block_scale_routed_moe` with MxFp8: gemm1_weights float8_e4m3fn [L, M, H] with E8M0
    scales (uint8 or float8_e8m0fnu) [L, M, H/32] or [L, M/32, H/32], gemm2_weights [L, H, I] likewise. With
    use_shuffled_weight they are in its order, and activation_type says whether gemm1_weights is gated.

    Each 128x128 block gets one scale, the smallest power of two that holds its largest value; codes move to it by
    whole exponents. A code changes only where it then has bits below 2^-9, the smallest code. The report tells how many
    do, and by how much at most, relative to the largest of the 32 values that shared its scale. NaN (also by a scale of
    255) stays NaN.

    Returns the four arrays in plain order for fp8_quantization_type DeepSeekFp8 (hidden_states then are bfloat16, or
    quantised by `quantize_activations`), and the report. Not to be jitted: it looks at the weights.

    Raises ValueError for arrays that do not fit, and where codes lose bits in a block of 128x128 whose exponents lie
    more than max_exponent_spread apart.
    """
    kind = parse_enum(FUNCTION, "activation_type", ActivationType, activation_type)
    folding.check_limit(max_exponent_spread)
    given = {
        "gemm1_weights": (gemm1_weights, gemm1_weights_scale, kind in GATED),
        "gemm2_weights": (gemm2_weights, gemm2_weights_scale, False),
    }
    matrices: list[tuple[Any, Any]] = []
    folded = []
    for name, (weights, scale, gated) in given.items():
        is_grid = folding.check_weights(name, _describe(name, weights), _describe(f"{name}_scale", scale))
        shuffled = bool(use_shuffled_weight)
        codes, new_scale, *found = _fold(weights, scale, is_grid, shuffled, gated, max_exponent_spread)
        changed, *largest = map(np.asarray, found)  # of each expert
        spread, change, refused = (x.max(initial=0).item() for x in largest)
        folded.append(Folded(codes.size, int(changed.sum(dtype=np.int64)), spread, change, refused))
        folding.check_folded(name, folded[-1], max_exponent_spread)
        matrices.append((codes, new_scale))
    return PreparedWeights(*matrices[0], *matrices[1], folding.report(*folded))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _fold(weights: jax.Array, scale: jax.Array, is_grid: bool, shuffled: bool, gated: bool, limit: int) -> Any:
    """Codes, scales, and for each expert what Folded has but for the number of codes."""

    def expert(pair: tuple[jax.Array, jax.Array]) -> Any:
        w, s = pair
        if shuffled:
            w = layout.unshuffle_matrix_a(w, EPILOGUE_TILE_M)
            w = layout.restore_rows_of_gated_act_gemm(w) if gated else w
            if not is_grid:
                s = layout.unshuffle_matrix_sf_a(s, EPILOGUE_TILE_M)
                s = layout.restore_rows_of_gated_act_gemm(s) if gated else s
        return _fold_matrix(w, jnp.repeat(s, MX_SCALE_BLOCK, axis=0) if is_grid else s, limit)

    return jax.lax.map(expert, (weights, jax.lax.bitcast_convert_type(scale, jnp.uint8)))


def _fold_matrix(w: jax.Array, scale: jax.Array, limit: int) -> tuple[jax.Array, ...]:
    """w [rows, columns], scale uint8 [rows, columns/32]."""
    rows, columns = w.shape
    per_block = SCALE_BLOCK // MX_SCALE_BLOCK
    # [rows/128, 128, columns/128, 4], codes [..., 32]; over `block` is over one 128x128.
    shape, block = (rows // SCALE_BLOCK, SCALE_BLOCK, columns // SCALE_BLOCK, per_block), (1, 3)
    codes = w.reshape(*shape, MX_SCALE_BLOCK).astype(jnp.float32)
    exponent = scale.reshape(shape).astype(jnp.int32) - 127
    is_nan = exponent == MX_NAN - 127
    amax = jnp.max(jnp.where(jnp.isnan(codes), 0.0, jnp.abs(codes)), axis=-1)
    live = (amax > 0) & ~is_nan

    def over(function: Any, values: jax.Array, other: int) -> jax.Array:
        return function(jnp.where(live, values, other), axis=block)

    least, most = -(2**20), 2**20
    any_live = jnp.any(live, axis=block)
    wanted = jnp.where(any_live, over(jnp.max, exponent + mx_exponent(amax), least), 0)
    folded_exponent = jnp.clip(wanted, -126, 127)  # of normal float32
    shift = jnp.clip(exponent - folded_exponent[:, None, :, None], -BEYOND, BEYOND)
    exact = codes * power_of_two(shift)[..., None]
    folded = to_e4m3(exact)
    change = jnp.where(live[..., None] & ~jnp.isnan(exact), jnp.abs(folded.astype(jnp.float32) - exact), 0.0)
    spread = jnp.where(any_live, over(jnp.max, exponent, least) - over(jnp.min, exponent, most), 0)
    relative = jnp.max(change, axis=-1) / jnp.where(live, amax * power_of_two(shift), 1.0)
    loses = jnp.any(change > 0, axis=(*block, 4)) & (spread > limit)
    result = jnp.where(is_nan[..., None], jnp.nan, folded.astype(jnp.float32)).astype(jnp.float8_e4m3fn)
    return (
        result.reshape(w.shape),
        power_of_two(folded_exponent),
        jnp.count_nonzero(change),
        jnp.max(spread),
        jnp.max(relative),
        jnp.max(jnp.where(loses, spread, 0)),
    )


def _describe(name: str, value: Any) -> Array:
    if isinstance(value, Tracer):
        raise ValueError(
            f"{FUNCTION}: {name} must be a concrete array, got a traced one; prepare weights outside of jit"
        )
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise invalid(FUNCTION, name, "an array", type(value).__name__)
    return Array(tuple(value.shape), str(value.dtype))
