"""FP8 block-scaled mixture-of-experts inference for torch, under the signature that serving frameworks call.

Importing this package imports torch, never jax.
"""

from jax_moe.enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout

from .finalization import finalize
from .logits import trtllm_fp8_block_scale_moe
from .moe import explain, trtllm_fp8_block_scale_routed_moe
from .prepare import prepare_mxfp8_weights
from .quantize import mxfp8_dequantize_host, mxfp8_quantize
from .weights import convert_to_block_layout, reorder_rows_for_gated_act_gemm, shuffle_matrix_a, shuffle_matrix_sf_a

__all__ = [
    "ActivationType",
    "Fp8QuantizationType",
    "RoutingMethodType",
    "WeightLayout",
    "convert_to_block_layout",
    "explain",
    "finalize",
    "mxfp8_dequantize_host",
    "mxfp8_quantize",
    "prepare_mxfp8_weights",
    "reorder_rows_for_gated_act_gemm",
    "shuffle_matrix_a",
    "shuffle_matrix_sf_a",
    "trtllm_fp8_block_scale_moe",
    "trtllm_fp8_block_scale_routed_moe",
]
