"""Folds MxFp8 weights onto 128x128 power-of-two scales, so that the kernels of DeepSeekFp8 run them."""

from __future__ import annotations

from typing import Any

import torch

from jax_moe import folding, layout
from jax_moe.enums import ActivationType, parse_enum
from jax_moe.folding import FUNCTION, MAX_EXPONENT_SPREAD, Folded, PreparedWeights
from jax_moe.options import GATED, invalid
from jax_moe.problem import MX_SCALE_BLOCK, SCALE_BLOCK, Array

from .quantize import MX_NAN, mx_exponent, power_of_two

EPILOGUE_TILE_M = 128  # of shuffled MxFp8 weights
BEYOND = 64  # a shift after which a code is 0; there is none of so many bits upwards


def prepare_mxfp8_weights(
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    *,
    use_shuffled_weight: bool = False,
    activation_type: int = ActivationType.Swiglu,
    max_exponent_spread: int = MAX_EXPONENT_SPREAD,
) -> PreparedWeights:
    """Weights for DeepSeekFp8 from those for MxFp8, and a report of how exact they are.

    Each 128x128 block gets one scale, the smallest power of two that holds its largest value; codes move to it by whole
    exponents. A code changes only where it then has bits below 2^-9, the smallest code. NaN (also by a scale of 255)
    stays NaN.

    Args:
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale: as the op takes them with MxFp8, scales
            for 1x32 or for 32x32. They are worked on where they are, one expert at a time.
        use_shuffled_weight: whether they are in the order that the op's argument of this name describes.
        activation_type: whether gemm1_weights is gated, which its shuffled order depends on.
        max_exponent_spread: the largest difference of exponents within 128x128 where codes may lose bits.

    Returns:
        The four tensors in plain order for fp8_quantization_type DeepSeekFp8 (hidden_states then are bfloat16, or have
        float32 scales per 1x128), and a report: the share of codes that changed, the largest difference of exponents
        within 128x128, and the largest change relative to the largest of the 32 values that shared a scale.

    Raises:
        ValueError: tensors that do not fit, or codes that lose bits where exponents lie further apart than allowed.
    """
    kind = parse_enum(FUNCTION, "activation_type", ActivationType, activation_type)
    folding.check_limit(max_exponent_spread)
    given = {
        "gemm1_weights": (gemm1_weights, gemm1_weights_scale, kind in GATED),
        "gemm2_weights": (gemm2_weights, gemm2_weights_scale, False),
    }
    matrices: list[tuple[torch.Tensor, torch.Tensor]] = []
    folded = []
    for name, (weights, scale, gated) in given.items():
        is_grid = folding.check_weights(name, _describe(name, weights), _describe(f"{name}_scale", scale))
        experts, rows, columns = weights.shape
        codes = torch.empty_like(weights, memory_format=torch.contiguous_format)
        new_scale = weights.new_empty((experts, rows // SCALE_BLOCK, columns // SCALE_BLOCK), dtype=torch.float32)
        total = Folded(weights.numel(), 0, 0, 0.0, 0)
        for e in range(experts):
            w, s = _plain(weights[e], scale[e].view(torch.uint8), is_grid, bool(use_shuffled_weight), gated)
            found = _fold_matrix(w, s, max_exponent_spread, codes[e], new_scale[e])
            changed, spread, change, refused = (x.item() for x in found)
            total = Folded(
                total.codes,
                total.changed + int(changed),
                max(total.spread, int(spread)),
                max(total.relative_change, float(change)),
                max(total.refused_spread, int(refused)),
            )
        folding.check_folded(name, total, max_exponent_spread)
        folded.append(total)
        matrices.append((codes, new_scale))
    return PreparedWeights(*matrices[0], *matrices[1], folding.report(*folded))


def _plain(
    w: torch.Tensor, s: torch.Tensor, is_grid: bool, shuffled: bool, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns] and scales [rows, columns/32] in plain order."""
    if shuffled:
        w = layout.unshuffle_matrix_a(w, EPILOGUE_TILE_M)
        w = layout.restore_rows_of_gated_act_gemm(w) if gated else w
        if not is_grid:
            s = layout.unshuffle_matrix_sf_a(s, EPILOGUE_TILE_M)
            s = layout.restore_rows_of_gated_act_gemm(s) if gated else s
    return w, s.repeat_interleave(MX_SCALE_BLOCK, dim=0) if is_grid else s


def _fold_matrix(
    w: torch.Tensor, scale: torch.Tensor, limit: int, result: torch.Tensor, result_scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """w [rows, columns], scale uint8 [rows, columns/32]; returns what Folded has but for the number of codes."""
    rows, columns = w.shape
    per_block = SCALE_BLOCK // MX_SCALE_BLOCK
    # [rows/128, 128, columns/128, 4], codes [..., 32]; over `block` is over one 128x128.
    shape, block = (rows // SCALE_BLOCK, SCALE_BLOCK, columns // SCALE_BLOCK, per_block), (1, 3)
    codes = w.reshape(*shape, MX_SCALE_BLOCK).float()
    exponent = scale.reshape(shape).to(torch.int32) - 127
    is_nan = exponent == MX_NAN - 127
    amax = codes.abs().nan_to_num(0.0).amax(dim=-1)
    live = (amax > 0) & ~is_nan

    any_live = live.any(dim=3).any(dim=1)
    least, most = -(2**20), 2**20
    wanted = torch.where(live, exponent + mx_exponent(amax), least).amax(dim=block)
    folded_exponent = torch.where(any_live, wanted, 0).clamp(-126, 127)  # of normal float32
    shift = (exponent - folded_exponent[:, None, :, None]).clamp(-BEYOND, BEYOND)
    exact = codes * power_of_two(shift)[..., None]
    folded = exact.masked_fill(is_nan[..., None], float("nan")).to(torch.float8_e4m3fn)
    change = torch.where(live[..., None], (folded.float() - exact).abs().nan_to_num(0.0), 0.0)
    highest = torch.where(live, exponent, least).amax(dim=block)
    spread = torch.where(any_live, highest - torch.where(live, exponent, most).amin(dim=block), 0)
    relative = change.amax(dim=-1) / torch.where(live, amax * power_of_two(shift), 1.0)
    loses = (change.amax(dim=(1, 3, 4)) > 0) & (spread > limit)
    result.copy_(folded.reshape(w.shape))
    result_scale.copy_(power_of_two(folded_exponent))
    return change.count_nonzero(), spread.max(), relative.max(), torch.where(loses, spread, 0).max()


def _describe(name: str, value: Any) -> Array:
    if not isinstance(value, torch.Tensor):
        raise invalid(FUNCTION, name, "a torch.Tensor", type(value).__name__)
    return Array(tuple(value.shape), str(value.dtype).removeprefix("torch."))
