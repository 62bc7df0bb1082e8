"""The numbers in the arrays of a case: weights, activations, and what the options add to them."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_moe import layout, reference
from jax_moe.enums import WeightLayout

if TYPE_CHECKING:
    from cases import Case

WEIGHTS = ("gemm1_weights", "gemm2_weights")
PARAMETERS = {"gemm1_alpha": (0.5, 2), "gemm1_beta": (-1, 1), "gemm1_clamp_limit": (0.2, 2)}  # lowest, highest


@functools.cache
def _normal_codes() -> NDArray:
    """65536 float8 codes distributed as a normal of standard deviation 448 / 4.5."""
    normal = statistics.NormalDist(0, 448 / 4.5)
    values = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    return np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn)


def weights_of(case: Case) -> Mapping[str, NDArray]:
    """Weights and scales of a case in plain layout."""
    rows_and_columns = case.local, case.hidden, case.gemm1_rows, case.inter, case.seed
    return _mx_weights(*rows_and_columns, case.scale_rows) if case.mx else _weights(*rows_and_columns)


@functools.lru_cache(maxsize=1)
def _weights(experts: int, hidden: int, gemm1_rows: int, inter: int, seed: int) -> Mapping[str, NDArray]:
    """Normal weights with another magnitude in each 128x128 block. More than 16 experts repeat codes, never scales."""
    rng = np.random.default_rng([seed, 1])
    result = {}
    for name, rows, columns in zip(WEIGHTS, (gemm1_rows, hidden), (hidden, inter), strict=True):
        result[name] = _normal_matrices(rng, experts, rows, columns)
        blocks = (experts, rows // reference.BLOCK, columns // reference.BLOCK)
        magnitude = np.exp2(rng.uniform(-2, 2, blocks)) / np.sqrt(columns)
        result[f"{name}_scale"] = (magnitude * 4.5 / 448).astype(np.float32)
    return _shared(result)


@functools.lru_cache(maxsize=1)
def _mx_weights(
    experts: int, hidden: int, gemm1_rows: int, inter: int, seed: int, scale_rows: int
) -> Mapping[str, NDArray]:
    """The same with powers of two, one for each 1x32 or 32x32."""
    rng = np.random.default_rng([seed, 1])
    result = {}
    for name, rows, columns in zip(WEIGHTS, (gemm1_rows, hidden), (hidden, inter), strict=True):
        result[name] = _normal_matrices(rng, experts, rows, columns)
        blocks = (experts, rows // scale_rows, columns // reference.MX_BLOCK)
        exponent = round(math.log2(4.5 / 448 / math.sqrt(columns)))
        result[f"{name}_scale"] = (127 + exponent + rng.integers(-2, 3, blocks)).astype(np.uint8)
    return _shared(result)


def _normal_matrices(rng: np.random.Generator, experts: int, rows: int, columns: int) -> NDArray:
    codes = _normal_codes()[rng.integers(0, 65536, (min(experts, 16), rows, columns), np.uint16)]
    return codes[np.arange(experts) % 16] if experts > 16 else codes


def _shared(arrays: dict[str, NDArray]) -> Mapping[str, NDArray]:
    for array in arrays.values():
        array.flags.writeable = False  # shared between cases
    return arrays


def activations(rng: np.random.Generator, case: Case) -> tuple[NDArray, NDArray]:
    """Normal rows, quantised to 1x128 or 1x32; past 1021 tokens codes repeat, with other scales."""
    rows = min(case.tokens, 1021)
    x = rng.standard_normal((rows, case.hidden), np.float32)
    x *= np.repeat(np.exp2(rng.uniform(-1, 1, (rows, case.hidden // reference.BLOCK))), reference.BLOCK, axis=1)
    codes, scale = reference.FORMATS[case.quantization].quantize(x)
    row = np.arange(case.tokens) % max(rows, 1)
    if case.mx:
        return codes[row], scale[row] + rng.integers(0, 2, (case.tokens, 1), np.uint8)
    return codes[row], scale[row] * rng.uniform(0.7, 1.4, (case.tokens, 1)).astype(np.float32)


def dequantized(codes: NDArray, scale: NDArray) -> NDArray:
    """bfloat16 values of codes [T, H] under scales [T, H/128], or E8M0 bytes [T, H/32]."""
    factor = np.exp2(scale.astype(np.float32) - 127) if scale.dtype == np.uint8 else scale
    factor = np.repeat(factor, codes.shape[1] // scale.shape[1], axis=1)
    return (codes.astype(np.float32) * factor).astype(ml_dtypes.bfloat16)


def ordered_scale(scale: NDArray, case: Case) -> NDArray:
    """[T, H/128] as [H/128, T] in the wanted order of memory, [T, H/32] in the wanted shape; gaps hold NaN."""
    if case.mx:
        scale = scale.view(case.scale_dtype)
        if case.scale_order == "block_major":
            return np.ascontiguousarray(scale.T)
        return _padded(scale) if case.scale_order == "padded" else np.ascontiguousarray(scale)
    if case.scale_order == "token_major":
        return np.ascontiguousarray(scale).T
    return _padded(scale.T) if case.scale_order == "padded" else np.ascontiguousarray(scale.T)


def _padded(scale: NDArray) -> NDArray:
    rows, columns = scale.shape
    memory = np.full((rows, (2 * columns + 3) * scale.itemsize), 0xFF, np.uint8).view(scale.dtype)
    memory[:, : 2 * columns : 2] = scale
    return memory[:, : 2 * columns : 2]


def in_layout(given: Mapping[str, NDArray], case: Case) -> dict[str, NDArray | None]:
    """Weights and scales, in the layout and dtype of the case."""
    result: dict[str, NDArray | None] = {}
    for name in WEIGHTS:
        w, scale = given[name], given[f"{name}_scale"]
        if case.mx:
            w, scale = _in_mx_layout(w, scale, case, case.gated and name == "gemm1_weights")
        elif case.shuffled:
            w = layout.shuffle_matrix_a(w, reference.EPILOGUE_TILE_M)
        result[name] = layout.convert_to_block_layout(w) if case.weight_layout is WeightLayout.BlockMajorK else w
        result[f"{name}_scale"] = scale
    return result


def _in_mx_layout(w: NDArray, scale: NDArray, case: Case, gated: bool) -> tuple[NDArray, NDArray]:
    if case.shuffled:
        tile = reference.MX_EPILOGUE_TILE_M
        w = layout.shuffle_matrix_a(layout.reorder_rows_for_gated_act_gemm(w) if gated else w, tile)
        if case.scale_rows == 1:
            scale = layout.reorder_rows_for_gated_act_gemm(scale) if gated else scale
            scale = layout.shuffle_matrix_sf_a(scale, tile)
    return w, scale.view(case.scale_dtype)


def per_expert(case: Case, rng: np.random.Generator) -> dict[str, NDArray]:
    """The activation's parameters that the case gives, float32 [L] each."""
    return {name: rng.uniform(*PARAMETERS[name], size=case.local).astype(np.float32) for name in case.per_expert}


def lora_delta(case: Case, ids: NDArray, rng: np.random.Generator) -> NDArray:
    """[T, K, M], as large as what it is added to; NaN at slots that make no row. Past 1021 tokens values repeat."""
    rows = min(case.tokens, 1021)
    delta = rng.standard_normal((rows, case.top_k, case.gemm1_rows), np.float32).astype(ml_dtypes.bfloat16)
    delta = delta[np.arange(case.tokens) % max(rows, 1)]
    delta[reference.local_expert(ids, case.experts, case.offset, case.local) < 0] = np.nan
    return delta
