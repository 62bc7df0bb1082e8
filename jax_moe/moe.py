"""The JAX function of the op: arguments, checked while tracing, before anything is lowered -> one XLA custom call.

Importing this module registers the custom call with XLA (xla_call.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from . import native
from .enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout
from .options import Options
from .problem import INPUTS, Array, Problem
from .xla_call import BY_TOKEN, FUNCTION, Call

SCALE_ORDERS = (None, "block_major", "token_major")
# The arguments of the function: arrays but topk_ids, and what Options.parse takes.
ARRAYS = tuple(name for name in INPUTS if name not in ("topk_ids", "topk_weights", "local_expert_offset"))
OPTIONS = tuple(name for name in inspect.signature(Options.parse).parameters if name != "function")


def fp8_block_scale_routed_moe(
    topk_ids: ArrayLike | tuple[ArrayLike, ArrayLike],
    hidden_states: ArrayLike,
    hidden_states_scale: ArrayLike | None,
    gemm1_weights: ArrayLike,
    gemm1_weights_scale: ArrayLike,
    gemm2_weights: ArrayLike,
    gemm2_weights_scale: ArrayLike,
    *,
    num_experts: int,
    local_expert_offset: int | ArrayLike = 0,
    routing_method_type: int | RoutingMethodType = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int | WeightLayout = 0,
    do_finalize: bool = True,
    gemm1_lora_delta: ArrayLike | None = None,
    fp8_quantization_type: int | Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8,
    activation_type: int | ActivationType = ActivationType.Swiglu,
    n_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float | None = None,
    gemm1_alpha: ArrayLike | None = None,
    gemm1_beta: ArrayLike | None = None,
    gemm1_clamp_limit: ArrayLike | None = None,
    hidden_states_scale_order: str | None = None,
    batch_invariant: bool | None = None,
    enable_pdl: bool | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """A mixture-of-experts layer on FP8 weights with block scales, for tokens that are routed already.

    The function is FlashInfer's `trtllm_fp8_block_scale_routed_moe`: for every token t, the sum over its slots k of
    weight[t, k] x expert(t, k), where an expert is gemm2 . activation . gemm1. Sizes: num_tokens T, top_k K,
    hidden_size H and intermediate_size I (both multiples of 128), local experts L (those held here), rows of
    gemm1_weights M: 2I with a gated activation (Swiglu, Geglu), I with another (Relu2, Identity).

    Arrays, of exactly these types (nothing is cast); scales are those of DeepSeekFp8, see below for MxFp8:
      topk_ids               int32 [T, K], expert id and weight packed by `pack_topk_ids`; or a pair of ids int32 [T, K]
                             and weights bfloat16 or float32 [T, K], which are used as they are. A slot whose id is not
                             in [local_expert_offset, local_expert_offset + L) contributes nothing; -1 is padding.
      hidden_states          float8_e4m3fn [T, H] (see `quantize_activations`), or bfloat16 [T, H], which is quantised
                             inside by the same rule.
      hidden_states_scale    float32 [H/128, T], or [T, H/128] with hidden_states_scale_order="token_major"; None with
                             bfloat16 hidden_states.
      gemm1_weights          float8_e4m3fn [L, M, H]. Gated: rows 0..I-1 are the linear ("up") half, rows I..2I-1 the
                             gate half, the one that silu is applied to. Many checkpoints have them the other way round.
      gemm1_weights_scale    float32 [L, M/128, H/128], one per 128x128 block (see `quantize_weights`).
      gemm2_weights          float8_e4m3fn [L, H, I].
      gemm2_weights_scale    float32 [L, H/128, I/128].

    With fp8_quantization_type MxFp8 scales are E8M0 bytes, uint8 or float8_e8m0fnu (byte b is 2^(b-127), 255 is NaN),
    one for each 32 columns (see `mxfp8_quantize`):
      hidden_states_scale    [T, H/32], or [H/32, T] with hidden_states_scale_order="block_major".
      gemm1_weights_scale    [L, M, H/32], or one for each 32x32 block, [L, M/32, H/32].
      gemm2_weights_scale    [L, H, I/32], or [L, H/32, I/32]; of both weights the same.
    `prepare_mxfp8_weights` makes weights for DeepSeekFp8 of them, which is faster on a GPU where tokens are many.

    Options:
      num_experts            number of experts in the whole layer, K..32767.
      local_expert_offset    id of the first local expert: an integer, or an int32 scalar array known on the device only
                             (in shard_map: `jax.lax.axis_index(axis) * L`; sum the outputs with `jax.lax.psum`).
      use_shuffled_weight    True: the rows of both weights are in the order of `shuffle_matrix_a(weights, 64)`. With
                             MxFp8 in that of `shuffle_matrix_a(weights, 128)`, before which gated gemm1_weights went
                             through `reorder_rows_for_gated_act_gemm`; their scales did too, and then through
                             `shuffle_matrix_sf_a(scales, 128)`. Scales for 32x32 or 128x128 blocks stay as they are.
      weight_layout          MajorK (0), the shapes above, or BlockMajorK (2): [L, H/128, M, 128] and [L, I/128, H,
                             128], `convert_to_block_layout(weights, 128)` of plain or of shuffled weights. Scales are
                             the same in every order. MxFp8 has MajorK only.
      do_finalize            True returns the output; False returns the rows before they are weighted and summed.
      gemm1_lora_delta       bfloat16 [T, K, M]: added to what gemm1 gives for slot k of token t, before the activation.
                             Its columns are in the plain order of gemm1_weights' rows, shuffled or not.
      fp8_quantization_type  DeepSeekFp8 (1) or MxFp8 (2).
      activation_type        Swiglu: up x silu(gate). Geglu: up x gelu(gate), the exact one. Relu2: max(x, 0)^2.
                             Identity: x.
      gemm1_alpha, gemm1_beta, gemm1_clamp_limit
                             float32 [L] each, for Swiglu: gate x sigmoid(alpha gate) x (up + beta), after gate is
                             clamped to at most limit and up to [-limit, limit]. None: 1, 0 and no clamp.
      hidden_states_scale_order  "block_major" or "token_major", the order of hidden_states_scale. None is "block_major"
                             with DeepSeekFp8 and "token_major" with MxFp8.
      batch_invariant        True: a token's bits do not depend on the other tokens of the call, on their number or on
                             the kernels that a number of tokens would get. On a GPU calls of few tokens are slower for
                             it; the CPU does so anyway. None: as environment variable JAX_MOE_BATCH_INVARIANT says
                             while tracing (1 or true).
      enable_pdl             None or True: a kernel on a GPU may start while the one before it ends (programmatic
                             dependent launch). False: one after the other. Same bits.
      n_group, topk_group, routing_method_type, routed_scaling_factor describe how topk_ids were computed. They are
                             checked against each other and change nothing: the given weights are used as they are.

    Returns, with do_finalize and without gemm1_lora_delta, the output, bfloat16 [T, H]; else a tuple of
      output                        with do_finalize,
      gemm2_output                  without: bfloat16 [T*K, H], one row a slot, sorted by expert,
      expert_weights                without: bfloat16 [T, K], or the given weights,
      expanded_idx_to_permuted_idx  int32 [T*K]: the row of slot t*K + k in gemm2_output and gemm1_activation_output, -1
                                    where it has none. Rows that it does not name are undefined.
      gemm1_activation_output       with gemm1_lora_delta: uint8 [T*K, I], bits of the activation's float8_e4m3fn codes,
      gemm1_activation_scale        with gemm1_lora_delta: float32 [I/128, T*K rounded up to a multiple of 4]: element
                                    (row, i) is code [row, i] x scale [i // 128, row]. Other columns are undefined.
                                    MxFp8: uint8 [I/128, likewise, 4], E8M0 bytes: scale [i // 128, row, i % 128 // 32].

    Works under jit, scan, vmap (over tokens, for the output alone, it stays one call; else it becomes a loop),
    shard_map, export with a symbolic T (which JAX takes to be at least 1), and on T = 0. NaN or Inf of one token do
    not reach another's result. Inference only.

    Raises, while tracing, ValueError for arguments that do not fit each other and NotImplementedError for what this
    version does not have, differentiation among it.
    """
    call, _, given, offset = _checked(locals())  # of the arguments alone: nothing may come before
    results = call.results(given | {"local_expert_offset": local_expert_offset if offset is None else np.int32(offset)})
    return results[0] if len(results) == 1 else results


def explain(*arguments: Any, num_sms: int = 132, **options: Any) -> str:
    """What a call with these arguments would run on a GPU, as text, without running it: kernels, tiles, workspace.

    The arguments are those of `fp8_block_scale_routed_moe`; of arrays only shape and dtype are looked at, so that
    `jax.ShapeDtypeStruct` serves too, on any machine. num_sms: multiprocessors of the GPU, 132 on H100 and H200 SXM.

    Raises what the call itself raises, ValueError for a symbolic number of tokens, and NotImplementedError where this
    build has no CUDA kernels.
    """
    if isinstance(num_sms, bool) or not isinstance(num_sms, int) or num_sms < 1:
        raise ValueError(f"explain: num_sms must be a positive integer, got {num_sms!r}")
    bound = inspect.signature(fp8_block_scale_routed_moe).bind(*arguments, **options)
    bound.apply_defaults()
    _, problem, _, _ = _checked(bound.arguments)
    if not isinstance(problem.num_tokens, int):
        raise ValueError(f"explain: num_tokens must be known, got {problem.num_tokens}; give arrays of constant sizes")
    return native.explain(problem, num_sms)


def _checked(arguments: Mapping[str, Any]) -> tuple[Call, Problem, dict[str, Any], int | None]:
    """The call, its problem, the arrays that were given, by name, and the offset if it is known while tracing."""
    order = arguments["hidden_states_scale_order"]
    if order not in SCALE_ORDERS:
        expected = "None, 'block_major' or 'token_major'"
        raise ValueError(f"{FUNCTION}: hidden_states_scale_order must be {expected}, got {order!r}")
    options = Options.parse(FUNCTION, **{name: arguments[name] for name in OPTIONS})
    arrays = _routing(arguments["topk_ids"]) | {name: arguments[name] for name in ARRAYS}
    given = {name: value for name, value in arrays.items() if value is not None}
    offset = _known_offset(arguments["local_expert_offset"])
    token_major = options.is_mx if order is None else order == "token_major"
    call = Call(arguments["num_experts"], options, token_major)
    return call, call.problem({name: _describe(name, value) for name, value in given.items()}, offset), given, offset


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to let our custom calls pass.

    They are stable: a target's name carries its version, and a version keeps its meaning.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in native.TARGETS]


def _routing(topk_ids: Any) -> dict[str, Any]:
    """topk_ids as the operands it is made of."""
    if not isinstance(topk_ids, (tuple, list)):
        return {"topk_ids": topk_ids}
    if len(topk_ids) != 2 or any(part is None for part in topk_ids):
        got = ", ".join(type(part).__name__ for part in topk_ids)
        raise ValueError(
            f"{FUNCTION}: topk_ids must be one packed int32 array or a pair (ids, weights), "
            f"got a {type(topk_ids).__name__} of ({got}); pack ids and weights with jax_moe.pack_topk_ids"
        )
    return {"topk_ids": topk_ids[0], "topk_weights": topk_ids[1]}


def _describe(name: str, value: Any) -> Array:
    """Shape and dtype of an argument, taken before JAX could convert it. Only num_tokens may be symbolic."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{FUNCTION}: {name} must be an array, got {type(value).__name__}")
    array = Array(tuple(value.shape), str(value.dtype))
    constant = array.shape[1:] if name in BY_TOKEN else array.shape
    if name != "hidden_states_scale" and not all(isinstance(size, int) for size in constant):
        raise NotImplementedError(
            f"{FUNCTION}: {name} must be of constant sizes but for num_tokens, got {array}; "
            "only num_tokens can be symbolic"
        )
    return array


def _known_offset(offset: Any) -> int | None:
    """local_expert_offset if it is known while tracing, None for an int32 scalar array."""
    if isinstance(offset, (int, np.integer)):
        return offset if isinstance(offset, bool) else int(offset)
    dtype, shape = getattr(offset, "dtype", None), getattr(offset, "shape", None)
    if dtype != jnp.int32 or shape != ():
        got = type(offset).__name__ if dtype is None else str(Array(tuple(shape or ()), str(dtype)))
        raise ValueError(f"{FUNCTION}: local_expert_offset must be an integer or an int32 scalar array, got {got}")
    return None
