"""FP8 block-scaled mixture-of-experts inference for JAX, compiled, on Hopper GPUs and CPUs.

Names are loaded on first use: importing jax_moe imports neither jax nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout
    from .finalization import finalize
    from .layout import (
        convert_to_block_layout,
        reorder_rows_for_gated_act_gemm,
        shuffle_matrix_a,
        shuffle_matrix_sf_a,
    )
    from .logits import fp8_block_scale_moe, route
    from .moe import explain, export_checks, fp8_block_scale_routed_moe
    from .prepare import prepare_mxfp8_weights
    from .quantize import (
        dequantize_activations,
        dequantize_weights,
        mxfp8_dequantize,
        mxfp8_quantize,
        quantize_activations,
        quantize_weights,
    )
    from .routing import pack_topk_ids, unpack_topk_ids

__all__ = [
    "ActivationType",
    "Fp8QuantizationType",
    "RoutingMethodType",
    "WeightLayout",
    "__version__",
    "convert_to_block_layout",
    "dequantize_activations",
    "dequantize_weights",
    "explain",
    "export_checks",
    "finalize",
    "fp8_block_scale_moe",
    "fp8_block_scale_routed_moe",
    "mxfp8_dequantize",
    "mxfp8_quantize",
    "pack_topk_ids",
    "prepare_mxfp8_weights",
    "quantize_activations",
    "quantize_weights",
    "reorder_rows_for_gated_act_gemm",
    "route",
    "shuffle_matrix_a",
    "shuffle_matrix_sf_a",
    "unpack_topk_ids",
]

# Module -> the public names that it has.
_HOMES = {
    "enums": ("ActivationType", "Fp8QuantizationType", "RoutingMethodType", "WeightLayout"),
    "finalization": ("finalize",),
    "layout": (
        "convert_to_block_layout",
        "reorder_rows_for_gated_act_gemm",
        "shuffle_matrix_a",
        "shuffle_matrix_sf_a",
    ),
    "logits": ("fp8_block_scale_moe", "route"),
    "moe": ("explain", "export_checks", "fp8_block_scale_routed_moe"),
    "prepare": ("prepare_mxfp8_weights",),
    "quantize": (
        "dequantize_activations",
        "dequantize_weights",
        "mxfp8_dequantize",
        "mxfp8_quantize",
        "quantize_activations",
        "quantize_weights",
    ),
    "routing": ("pack_topk_ids", "unpack_topk_ids"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
