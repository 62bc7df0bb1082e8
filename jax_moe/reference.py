"""What the op means, in numpy: the definition that tests and benchmarks compare against, written apart from any kernel.

Every array is an ordinary numpy array (float8 and bfloat16 by ml_dtypes), every sum is float32, and experts without
rows cost nothing. Imports neither jax nor torch nor the extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import layout
from .enums import ActivationType, Fp8QuantizationType, WeightLayout

BLOCK = 128  # elements that share a scale with DeepSeekFp8
MX_BLOCK = 32  # and with MxFp8, whose scale bytes b are 2^(b - 127)
MX_NAN = 255
E4M3_MAX = np.float32(448)
MIN_SCALE = np.finfo(np.float32).tiny
EPILOGUE_TILE_M = 64  # of shuffled weights
MX_EPILOGUE_TILE_M = 128
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Result(NamedTuple):
    """Everything the op may return. Rows and columns of permuted rows that the map does not name are zero here."""

    output: NDArray  # [T, H]
    gemm2_output: NDArray  # [T*K, H]
    expert_weights: NDArray  # bfloat16 [T, K], or topk_weights
    expanded_idx_to_permuted_idx: NDArray  # int32 [T*K], -1 where a slot makes no row
    gemm1_activation_output: NDArray  # float8_e4m3fn [T*K, I]; without requantize float32
    gemm1_activation_scale: NDArray  # float32 [I/128, T*K], MxFp8 uint8 [I/128, T*K, 4]; without requantize all 1


def fp8_block_scale_routed_moe(
    topk_ids: NDArray,
    hidden_states: NDArray,
    hidden_states_scale: NDArray | None,
    gemm1_weights: NDArray,
    gemm1_weights_scale: NDArray,
    gemm2_weights: NDArray,
    gemm2_weights_scale: NDArray,
    *,
    num_experts: int,
    local_expert_offset: int = 0,
    topk_weights: NDArray | None = None,
    activation_type: ActivationType = ActivationType.Swiglu,
    weight_layout: WeightLayout = WeightLayout.MajorK,
    use_shuffled_weight: bool = False,
    fp8_quantization_type: Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8,
    gemm1_lora_delta: NDArray | None = None,
    gemm1_alpha: NDArray | None = None,
    gemm1_beta: NDArray | None = None,
    gemm1_clamp_limit: NDArray | None = None,
    requantize: bool = True,
) -> Result:
    """The op on T tokens, K slots each, and L local experts.

    topk_ids int32 [T, K], packed, or plain ids beside topk_weights (bfloat16 or float32 [T, K]); hidden_states
    float8_e4m3fn [T, H] with hidden_states_scale float32 [H/128, T] (any strides), or bfloat16 [T, H] without;
    gemm1_weights float8_e4m3fn [L, M, H] scaled by float32 [L, M/128, H/128], where M is 2I (up rows, then gate rows)
    or with Relu2 and Identity I; gemm2_weights float8_e4m3fn [L, H, I] scaled by float32 [L, H/128, I/128]. In
    BlockMajorK the weights are [L, K/128, rows, 128]. gemm1_lora_delta bfloat16 [T, K, M] is added before the
    activation; gemm1_alpha, gemm1_beta and gemm1_clamp_limit, float32 [L], belong to Swiglu.

    MxFp8 has scales of E8M0 bytes (uint8 or float8_e8m0fnu), hidden_states_scale [T, H/32], those of the weights
    [L, M, H/32] and [L, H, I/32], or [L, M/32, H/32] and [L, H/32, I/32], one for 32x32.

    requantize=True rounds where the op rounds (activations and bfloat16 hidden_states to float8 of 1x128 or 1x32,
    gemm2_output and output to bfloat16); False rounds nowhere and returns float32.
    """
    ids, weights = unpack_topk_ids(topk_ids) if topk_weights is None else (topk_ids, topk_weights)
    experts = local_expert(ids, num_experts, local_expert_offset, len(gemm1_weights)).reshape(-1)
    expanded_to_permuted, permuted_to_expanded = permutation(experts)
    top_k, hidden = topk_ids.shape[1], hidden_states.shape[1]
    form = FORMATS[fp8_quantization_type]
    inter = gemm2_weights_scale.shape[2] * form.block
    gated = activation_type in (ActivationType.Swiglu, ActivationType.Geglu)
    order = (weight_layout, use_shuffled_weight)

    rows_dtype, codes_dtype = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn) if requantize else (np.float32, np.float32)
    gemm2_output = np.zeros((experts.size, hidden), rows_dtype)
    activation = np.zeros((experts.size, inter), codes_dtype)
    activation_scale = np.zeros((experts.size, inter // form.block), form.one.dtype)
    with np.errstate(all="ignore"):  # NaN and Inf are inputs like others
        x, x_scale = _operand(form, hidden_states, hidden_states_scale, requantize)
        for expert in np.unique(experts[experts >= 0]):
            rows = np.flatnonzero(experts[permuted_to_expanded] == expert)
            token, slot = np.divmod(permuted_to_expanded[rows], top_k)
            w1 = form.weights(gemm1_weights[expert], gemm1_weights_scale[expert], *order, gated)
            w2 = form.weights(gemm2_weights[expert], gemm2_weights_scale[expert], *order, False)
            g = form.matmul(x[token], None if x_scale is None else x_scale[token], *w1)
            if gemm1_lora_delta is not None:
                g += gemm1_lora_delta[token, slot].astype(np.float32)
            parameters = (p if p is None else p[expert] for p in (gemm1_alpha, gemm1_beta, gemm1_clamp_limit))
            a = activate(g, activation_type, *parameters)
            codes, scale = form.quantize(a) if requantize else (a, None)
            gemm2_output[rows] = form.matmul(codes, scale, *w2).astype(rows_dtype)
            activation[rows], activation_scale[rows] = codes, form.one if scale is None else scale
        output = weighted_sum(gemm2_output, expanded_to_permuted, weights).astype(rows_dtype)
    if form.block == MX_BLOCK:
        activation_scale = activation_scale.reshape(len(activation_scale), inter // BLOCK, BLOCK // MX_BLOCK)
    activation_scale = activation_scale.swapaxes(0, 1)
    return Result(output, gemm2_output, weights, expanded_to_permuted, activation, activation_scale)


def unpack_topk_ids(packed: NDArray) -> tuple[NDArray, NDArray]:
    """int32 [T, K] -> (expert ids int32, routing weights bfloat16), from the signed high and the low 16 bits."""
    return packed >> 16, (packed & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16)


def local_expert(ids: NDArray, num_experts: int, local_expert_offset: int, local_num_experts: int) -> NDArray:
    """Index into the local weights, -1 for an id that is no expert or not one of the local window's."""
    local = ids.astype(np.int64) - local_expert_offset
    inside = (ids >= 0) & (ids < num_experts) & (local >= 0) & (local < local_num_experts)
    return np.where(inside, local, -1)


def permutation(experts: NDArray) -> tuple[NDArray, NDArray]:
    """The maps between expanded and permuted rows: sorted by local expert, in an expert by expanded index.

    `experts` [T*K] holds the local expert of each slot or -1. Returns expanded_to_permuted int32 [T*K] (-1: no row) and
    permuted_to_expanded [number of rows].
    """
    permuted_to_expanded = np.argsort(experts, kind="stable")[np.count_nonzero(experts < 0) :]
    expanded_to_permuted = np.full(experts.size, -1, np.int32)
    expanded_to_permuted[permuted_to_expanded] = np.arange(permuted_to_expanded.size, dtype=np.int32)
    return expanded_to_permuted, permuted_to_expanded


def quantize_1x128(x: NDArray) -> tuple[NDArray, NDArray]:
    """float [R, C] -> (float8_e4m3fn [R, C], float32 scale [R, C/128]), each scale the block's largest |x| / 448.

    A NaN becomes a NaN code under the scale of the others.
    """
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    with np.errstate(all="ignore"):
        scale = np.maximum(np.fmax.reduce(np.abs(blocks), axis=2, initial=0) / E4M3_MAX, MIN_SCALE)
        q = np.clip(blocks / scale[:, :, None], -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return q.reshape(x.shape), scale


def quantize_1x32(x: NDArray) -> tuple[NDArray, NDArray]:
    """float [R, C] -> (float8_e4m3fn [R, C], uint8 scale [R, C/32]), each scale the smallest power of two from 2^-127
    on that is at least the block's largest |x| / 448.

    A NaN becomes a NaN code under the scale of the others; an infinity makes the scale and every code NaN.
    """
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // MX_BLOCK, MX_BLOCK)
    with np.errstate(all="ignore"):
        amax = np.fmax.reduce(np.abs(blocks), axis=2, initial=0)
        mantissa, exponent = np.frexp(amax.astype(np.float64) / 448)  # in [1/2, 1)
        exponent = np.where(amax > 0, exponent - (mantissa == 0.5), -127)
        scale = np.where(np.isinf(amax), MX_NAN, np.clip(exponent + 127, 0, 254)).astype(np.uint8)
        scaled = np.ldexp(blocks, 127 - scale[:, :, None].astype(np.int32))
        scaled = np.where(scale[:, :, None] == MX_NAN, np.nan, scaled)
        q = np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return q.reshape(x.shape), scale


def block_scaled_matmul(a: NDArray, a_scale: NDArray | None, b: NDArray, b_scale: NDArray) -> NDArray:
    """float32 [R, N] = [R, K] [N, K]^T. a is scaled by [R, K/128] (1x128) or not at all, b by [N/128, K/128] (128x128):
    the partial sum of every 128 of K is scaled, then added.
    """
    total = np.zeros((len(a), len(b)), np.float32)
    for block in range(b.shape[1] // BLOCK):
        k = slice(block * BLOCK, (block + 1) * BLOCK)
        scale = np.repeat(b_scale[:, block], BLOCK)[None]
        if a_scale is not None:
            scale = a_scale[:, block : block + 1] * scale
        total += (_float32(a[:, k]) @ _float32(b[:, k]).T) * scale
    return total


def mx_matmul(a: NDArray, a_scale: NDArray | None, b: NDArray, b_scale: NDArray) -> NDArray:
    """float32 [R, N] = [R, K] [N, K]^T. a is scaled by E8M0 bytes [R, K/32] or not at all, b by [N, K/32]: the partial
    sum of every 32 of K is scaled by the product of the two powers of two, then added.
    """
    total = np.zeros((len(a), len(b)), np.float32)
    if a_scale is None:
        a_scale = np.full((len(a), b.shape[1] // MX_BLOCK), 127, np.uint8)
    for block in range(b.shape[1] // MX_BLOCK):
        k = slice(block * MX_BLOCK, (block + 1) * MX_BLOCK)
        a_byte, b_byte = a_scale[:, block].astype(np.int32), b_scale[:, block].astype(np.int32)
        part = np.ldexp(_float32(a[:, k]) @ _float32(b[:, k]).T, a_byte[:, None] + b_byte[None] - 254)
        part[a_byte == MX_NAN] = np.nan
        part[:, b_byte == MX_NAN] = np.nan
        total += part
    return total


def plain_weights(
    w: NDArray, scale: NDArray, weight_layout: WeightLayout, use_shuffled_weight: bool, gated: bool
) -> tuple[NDArray, NDArray]:
    """Weights [..., rows, K] and their scales from those of any layout; BlockMajorK is [..., K/128, rows, 128]."""
    if weight_layout is WeightLayout.BlockMajorK:
        w = layout.from_block_major_k(w)
    return layout.unshuffle_matrix_a(w, EPILOGUE_TILE_M) if use_shuffled_weight else w, scale


def plain_mx_weights(
    w: NDArray, scale: NDArray, weight_layout: WeightLayout, use_shuffled_weight: bool, gated: bool
) -> tuple[NDArray, NDArray]:
    """Weights [rows, K] and E8M0 bytes [rows, K/32] from those of MxFp8: MajorK, shuffled or not, scales for 1x32 or
    32x32. With `gated` the rows of shuffled weights took turns, up and gate, before.
    """
    assert weight_layout is WeightLayout.MajorK
    scale = scale.view(np.uint8)
    is_grid = len(scale) < len(w)
    if use_shuffled_weight:
        w = layout.unshuffle_matrix_a(w, MX_EPILOGUE_TILE_M)
        scale = scale if is_grid else layout.unshuffle_matrix_sf_a(scale, MX_EPILOGUE_TILE_M)
        if gated:
            w = layout.restore_rows_of_gated_act_gemm(w)
            scale = scale if is_grid else layout.restore_rows_of_gated_act_gemm(scale)
    return w, np.repeat(scale, MX_BLOCK, axis=0) if is_grid else scale


class Format(NamedTuple):
    """A quantisation: elements that share a scale, the scale 1, and its functions."""

    block: int
    one: NDArray
    quantize: Callable[[NDArray], tuple[NDArray, NDArray]]
    matmul: Callable[[NDArray, NDArray | None, NDArray, NDArray], NDArray]
    weights: Callable[[NDArray, NDArray, WeightLayout, bool, bool], tuple[NDArray, NDArray]]


FORMATS = {
    Fp8QuantizationType.DeepSeekFp8: Format(
        BLOCK, np.array(1, np.float32), quantize_1x128, block_scaled_matmul, plain_weights
    ),
    Fp8QuantizationType.MxFp8: Format(MX_BLOCK, np.array(127, np.uint8), quantize_1x32, mx_matmul, plain_mx_weights),
}


def activate(
    g: NDArray,
    activation_type: ActivationType,
    alpha: np.float32 | NDArray | None = None,
    beta: np.float32 | NDArray | None = None,
    limit: np.float32 | NDArray | None = None,
) -> NDArray:
    """[R, M] -> [R, I]: up * gate * sigmoid(gate), up * gate * Phi(gate), max(x, 0)^2 or x. Gated: up half, then gate.

    alpha, beta and limit are of Swiglu: gate is clamped to at most limit, up to at least -limit, then to at most limit
    (a NaN stays one, a NaN limit does not clamp), sigmoid is of alpha * gate, and up + beta stands for up.
    """
    if activation_type is ActivationType.Identity:
        return g
    if activation_type is ActivationType.Relu2:
        return np.where(g < 0, np.float32(0), g * g)
    up, gate = np.split(g, 2, axis=1)
    if activation_type is ActivationType.Geglu:
        return up * (gate * normal_cdf(gate))
    if limit is not None:
        gate = np.where(gate > limit, limit, gate)
        up = np.where(up < -limit, -limit, up)
        up = np.where(up > limit, limit, up)
    if beta is not None:
        up = up + beta
    return up * (gate / (1 + np.exp(-gate if alpha is None else -alpha * gate)))


def normal_cdf(x: NDArray) -> NDArray:
    """float32 [...] -> float32 [...]: the exact Gaussian distribution function Phi, rounded once."""
    erfc = np.frompyfunc(math.erfc, 1, 1)(x.astype(np.float64) * -math.sqrt(0.5))
    return (np.asarray(erfc, np.float64) * 0.5).astype(np.float32)


def weighted_sum(gemm2_output: NDArray, expanded_to_permuted: NDArray, weights: NDArray) -> NDArray:
    """float32 [T, H]: the token's rows times its weights, added in slot order. Slots without a row add nothing."""
    tokens, top_k = weights.shape
    row = expanded_to_permuted.reshape(tokens, top_k)
    total = np.zeros((tokens, gemm2_output.shape[1]), np.float32)
    for slot in range(top_k):
        has_row = row[:, slot] >= 0
        y = gemm2_output[row[has_row, slot]].astype(np.float32)
        total[has_row] += weights[has_row, slot].astype(np.float32)[:, None] * y
    return total


def _operand(form: Format, x: NDArray, scale: NDArray | None, requantize: bool) -> tuple[NDArray, NDArray | None]:
    """hidden_states as a left operand of a matmul, its scale by token."""
    if scale is not None:
        return x, scale.view(np.uint8) if form.block == MX_BLOCK else scale.T
    return form.quantize(x) if requantize else (x, None)


def _float32(x: NDArray) -> NDArray:
    if x.dtype == ml_dtypes.float8_e4m3fn:
        return E4M3_VALUES[x.view(np.uint8)]
    return x.astype(np.float32)
