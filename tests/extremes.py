"""What a case may put into its inputs that is not ordinary: NaN and Inf at one place, zeros, very large and very small.

Each function changes the arrays of a case; each array that it touches is copied first.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray | None]
NAN_CODE = 0x7F  # of float8_e4m3fn


def _set(name: str, place: tuple, value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        array = _copy(arrays, name)
        array[place] = value

    return change


def _set_code(name: str, place: tuple) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        _copy(arrays, name).view(np.uint8)[place] = NAN_CODE

    return change


def _scale(**factors: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        for name, factor in factors.items():
            _copy(arrays, name)[...] *= np.float32(factor)

    return change


def _set_x(value: float) -> Callable[[Arrays], None]:
    """One element of hidden_states."""

    def change(arrays: Arrays) -> None:
        _copy(arrays, "hidden_states")[2, 140] = value

    return change


def _nan_weight(arrays: Arrays) -> None:
    """The routing weight of one slot is NaN."""
    bits = np.array(np.nan, ml_dtypes.bfloat16).view(np.uint16)
    packed = _copy(arrays, "topk_ids")
    packed[3, 0] = (packed[3, 0] & ~0xFFFF) | int(bits)


def _cancelling_weights(arrays: Arrays) -> None:
    """Two slots of a token name one expert with float32 weights that differ by less than bfloat16 tells apart."""
    ids, weights = _copy(arrays, "topk_ids"), _copy(arrays, "topk_weights")
    ids[:, 1], ids[:, 2] = ids[:, 0], -1
    weights[:, 0], weights[:, 1] = 1 + 2.0**-12, -1


def _zero_x(arrays: Arrays) -> None:
    """Two tokens of zeros: their activations have no largest value to scale by."""
    _copy(arrays, "hidden_states")[[1, 4]] = 0


def _copy(arrays: Arrays, name: str) -> NDArray:
    array = arrays[name]
    assert array is not None, f"{name} is absent in this case"
    copied = np.copy(array, order="K")
    arrays[name] = copied
    return copied


# A name may end with "_" and the option of cases.OPTIONS that it needs.
# "tiny" brings activations to 1e-37, where their scale is the smallest normal float32; the second GEMM's scale makes up
# for it. "large" and "small" stay inside bfloat16 at the end.
EXTREMES: dict[str, Callable[[Arrays], None]] = {
    "nan_x_scale": _set("hidden_states_scale", (1, 3), np.nan),
    "inf_x_scale": _set("hidden_states_scale", (0, 5), np.inf),
    "nan_gemm1_scale": _set("gemm1_weights_scale", (2, 1, 0), np.nan),
    "inf_gemm1_scale": _set("gemm1_weights_scale", (2, 3, 1), np.inf),
    "nan_gemm2_scale": _set("gemm2_weights_scale", (4, 1, 0), np.nan),
    "inf_gemm2_scale": _set("gemm2_weights_scale", (4, 0, 1), np.inf),
    "nan_x": _set_x(np.nan),
    "inf_x": _set_x(np.inf),
    "nan_gemm1_code": _set_code("gemm1_weights", (1, 17, 130)),
    "nan_gemm2_code": _set_code("gemm2_weights", (1, 200, 5)),
    "nan_routing_weight": _nan_weight,
    "nan_apart_f32": _set("topk_weights", (3, 0), np.nan),
    "cancelling_apart_f32": _cancelling_weights,
    "nan_alpha": _set("gemm1_alpha", (2,), np.nan),
    "zero_alpha": _set("gemm1_alpha", (2,), 0),
    "negative_alpha": _set("gemm1_alpha", (2,), -1.5),
    "huge_alpha": _set("gemm1_alpha", (2,), 1e30),
    "nan_beta": _set("gemm1_beta", (2,), np.nan),
    "inf_beta": _set("gemm1_beta", (2,), np.inf),
    "huge_beta": _set("gemm1_beta", (2,), -1e6),
    "zero_clamp": _set("gemm1_clamp_limit", (2,), 0),
    "negative_clamp": _set("gemm1_clamp_limit", (2,), -0.5),
    "inf_clamp": _set("gemm1_clamp_limit", (2,), np.inf),
    "nan_clamp": _set("gemm1_clamp_limit", (2,), np.nan),
    "zero_alpha_beta_clamp": _set("gemm1_clamp_limit", (2,), 0),
    "nan_lora": _set("gemm1_lora_delta", (5, 1, 7), np.nan),
    "inf_lora": _set("gemm1_lora_delta", (5, 1, 7), np.inf),
    "zero_x": _zero_x,
    "tiny": _scale(hidden_states_scale=2.0**-62, gemm2_weights_scale=2.0**30),
    "large": _scale(hidden_states_scale=2.0**20, gemm1_weights_scale=2.0**12, gemm2_weights_scale=2.0**30),
    "small": _scale(hidden_states_scale=2.0**-10, gemm1_weights_scale=2.0**-10, gemm2_weights_scale=2.0**-40),
}


def _set_scales(**bytes_of: tuple[tuple, int]) -> Callable[[Arrays], None]:
    """Of each named array, the E8M0 bytes at a place become this byte."""

    def change(arrays: Arrays) -> None:
        for name, (place, byte) in bytes_of.items():
            _copy(arrays, name).view(np.uint8)[place] = byte

    return change


def _add_to_scales(**amounts: int) -> Callable[[Arrays], None]:
    """Scales of whole arrays times a power of two."""

    def change(arrays: Arrays) -> None:
        for name, amount in amounts.items():
            _copy(arrays, name)[...] += np.uint8(amount % 256)

    return change


def _zero_blocks(arrays: Arrays) -> None:
    """32 zero columns of a token under the largest scale, and 32 rows of an expert that make a block of zeros."""
    _copy(arrays, "hidden_states")[4, 64:96] = 0
    _copy(arrays, "hidden_states_scale")[4, 2] = 254
    for place in ((2, slice(32, 64)), (2, slice(256 + 32, 256 + 64))):
        _copy(arrays, "gemm1_weights")[place] = 0
    _copy(arrays, "gemm1_lora_delta")[...] = 0


def _smallest_factor(arrays: Arrays) -> None:
    """Up rows' scales times the tokens' are the largest subnormal power of two; gate rows make up for it."""
    _copy(arrays, "hidden_states_scale").view(np.uint8)[...] = 63
    scale = _copy(arrays, "gemm1_weights_scale").view(np.uint8)
    rows = scale.shape[1]
    scale[:, : rows // 2], scale[:, rows // 2 :] = 64, 191
    _copy(arrays, "gemm2_weights_scale")[...] += np.uint8(100)


ALL = slice(None)
# Of MxFp8, whose hidden_states_scale is [T, H/32] here. In "far_scales" the values of x, or of a weight, are beyond
# float32; their products are ordinary. BEYOND_BF16: not for kernels that multiply values in bfloat16.
BEYOND_BF16 = ("mx_far_scales", "mx_far_scales_of_weights", "mx_largest_gemm2_scale")
MX_EXTREMES: dict[str, Callable[[Arrays], None]] = {
    "mx_nan_x_scale": _set_scales(hidden_states_scale=((3, 5), 255)),
    "mx_nan_gemm1_scale": _set_scales(gemm1_weights_scale=((2, 70, 3), 255)),
    "mx_nan_gemm2_scale": _set_scales(gemm2_weights_scale=((4, 130, 1), 255)),
    "mx_nan_both_scales": _set_scales(
        hidden_states_scale=((3, 5), 255), gemm1_weights_scale=((ALL, ALL, 5), 0), gemm2_weights_scale=((1, 7, 0), 255)
    ),
    "mx_smallest_x_scale": _set_scales(hidden_states_scale=((3, ALL), 0)),
    "mx_smallest_gemm1_scale": _set_scales(gemm1_weights_scale=((2, slice(60, 80), ALL), 0)),
    "mx_smallest_gemm2_scale": _set_scales(gemm2_weights_scale=((ALL, slice(60, 80), ALL), 0)),
    "mx_largest_gemm2_scale": _set_scales(gemm2_weights_scale=((4, 130, 1), 254)),
    "mx_far_scales": _set_scales(hidden_states_scale=((ALL, 1), 250), gemm1_weights_scale=((ALL, ALL, 1), 0)),
    "mx_far_scales_of_weights": _set_scales(
        hidden_states_scale=((ALL, 1), 0), gemm1_weights_scale=((ALL, ALL, 1), 250)
    ),
    "mx_smallest_factor": _smallest_factor,
    "mx_zero_blocks": _zero_blocks,
    "mx_zero_x": _zero_x,
    "mx_nan_x": _set_x(np.nan),
    "mx_nan_gemm1_code": _set_code("gemm1_weights", (1, 17, 130)),
    "mx_nan_gemm2_code": _set_code("gemm2_weights", (1, 200, 5)),
    "mx_nan_lora": _set("gemm1_lora_delta", (5, 1, 7), np.nan),
    "mx_inf_lora": _set("gemm1_lora_delta", (5, 1, 7), np.inf),
    "mx_nan_x_bf16": _set_x(np.nan),
    "mx_inf_x_bf16": _set_x(np.inf),
    "mx_zero_x_bf16": _zero_x,
    "mx_tiny_bf16": _add_to_scales(gemm1_weights_scale=-62, gemm2_weights_scale=100),
    "mx_large_bf16": _add_to_scales(gemm1_weights_scale=30, gemm2_weights_scale=-50),
}
