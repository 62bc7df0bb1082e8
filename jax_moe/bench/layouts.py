"""The weights of a layer in every layout and format that the op takes, made of DeepSeekFp8 ones in MajorK, by torch."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

import torch_facade as facade

from ..problem import SCALE_BLOCK
from .device import Set

PLAIN = "plain"
WEIGHTS = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
MX = facade.Fp8QuantizationType.MxFp8
BLOCKED = facade.WeightLayout.BlockMajorK
# By their names the options of a call besides those of a plain one.
LAYOUTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "shuffled": {"use_shuffled_weight": True},
    "BlockMajorK": {"weight_layout": BLOCKED},
    "shuffled BlockMajorK": {"use_shuffled_weight": True, "weight_layout": BLOCKED},
    "MxFp8 1x32": {"fp8_quantization_type": MX},
    "MxFp8 32x32": {"fp8_quantization_type": MX},
    "MxFp8 shuffled": {"fp8_quantization_type": MX, "use_shuffled_weight": True},
    "MxFp8 prepared": {},
}


def weight_layouts(weights: Set, names: Iterable[str] = LAYOUTS) -> dict[str, tuple[Set, dict[str, Any]]]:
    """The weights in the layouts of those names, with the options of a call."""
    mx = functools.cache(lambda: mx_weights(weights))
    by_rows = functools.cache(lambda: shuffled(weights))
    make = {
        PLAIN: lambda: weights,
        "shuffled": by_rows,
        "BlockMajorK": lambda: blocked(weights),
        "shuffled BlockMajorK": lambda: blocked(by_rows()),
        "MxFp8 1x32": mx,
        "MxFp8 32x32": lambda: mx_grid(mx()),
        "MxFp8 shuffled": lambda: mx_shuffled(mx()),
        "MxFp8 prepared": lambda: prepared(mx()),
    }
    return {name: (make[name](), LAYOUTS[name]) for name in names}


def shuffled(weights: Set) -> Set:
    return {n: facade.shuffle_matrix_a(w, 64) if "scale" not in n else w for n, w in weights.items()}


def blocked(weights: Set) -> Set:
    return {n: facade.convert_to_block_layout(w, SCALE_BLOCK) if "scale" not in n else w for n, w in weights.items()}


def mx_weights(weights: Set) -> Set:
    """The values of DeepSeekFp8 weights in the MxFp8 format, expert by expert."""
    made: Set = {}
    for name in ("gemm1_weights", "gemm2_weights"):
        parts = []
        for codes, scale in zip(weights[name], weights[f"{name}_scale"], strict=True):
            factors = scale.repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)
            parts.append(facade.mxfp8_quantize(codes.float() * factors, False))
        made[name] = torch.stack([codes.view(torch.uint8) for codes, _ in parts]).view(torch.float8_e4m3fn)
        made[f"{name}_scale"] = torch.stack([scale for _, scale in parts])
    return made


def mx_shuffled(weights: Set) -> Set:
    made: Set = {}
    for name, w in weights.items():
        order = facade.reorder_rows_for_gated_act_gemm(w) if name.startswith("gemm1") else w
        made[name] = (facade.shuffle_matrix_sf_a if "scale" in name else facade.shuffle_matrix_a)(order, 128)
    return made


def mx_grid(weights: Set) -> Set:
    """One scale for 32x32: the timing does not ask whether it is a good one."""
    return {n: w[:, ::32].contiguous() if "scale" in n else w for n, w in weights.items()}


def prepared(weights: Set) -> Set:
    folded = facade.prepare_mxfp8_weights(*(weights[name] for name in WEIGHTS), max_exponent_spread=254)
    return {name: getattr(folded, name) for name in WEIGHTS}
