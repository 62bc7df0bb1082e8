"""The numbers in the arrays of a case: weights, activations, and what the options add to them."""

from __future__ import annotations

import functools
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

PARAMETERS = {"gemm1_alpha": (0.5, 2), "gemm1_beta": (-1, 1), "gemm1_clamp_limit": (0.2, 2)}  # lowest, highest


@functools.cache
def _normal_codes() -> NDArray:
    """65536 float8 codes distributed as a normal of standard deviation 448 / 4.5."""
    normal = statistics.NormalDist(0, 448 / 4.5)
    values = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    return np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn)


@functools.lru_cache(maxsize=1)
def weights(experts: int, hidden: int, gemm1_rows: int, inter: int, seed: int) -> Mapping[str, NDArray]:
    """Normal weights with another magnitude in each 128x128 block. More than 16 experts repeat codes, never scales."""
    rng = np.random.default_rng([seed, 1])
    result = {}
    for name, rows, columns in (("gemm1_weights", gemm1_rows, hidden), ("gemm2_weights", hidden, inter)):
        codes = _normal_codes()[rng.integers(0, 65536, (min(experts, 16), rows, columns), np.uint16)]
        blocks = (experts, rows // reference.BLOCK, columns // reference.BLOCK)
        magnitude = np.exp2(rng.uniform(-2, 2, blocks)) / np.sqrt(columns)
        result[name] = codes[np.arange(experts) % 16] if experts > 16 else codes
        result[f"{name}_scale"] = (magnitude * 4.5 / 448).astype(np.float32)
    for array in result.values():
        array.flags.writeable = False  # shared between cases
    return result


def activations(rng: np.random.Generator, tokens: int, hidden: int) -> tuple[NDArray, NDArray]:
    """1x128-quantised normal rows; past 1021 tokens codes repeat, with other scales."""
    rows = min(tokens, 1021)
    x = rng.standard_normal((rows, hidden), np.float32)
    x *= np.repeat(np.exp2(rng.uniform(-1, 1, (rows, hidden // reference.BLOCK))), reference.BLOCK, axis=1)
    codes, scale = reference.quantize_1x128(x)
    row = np.arange(tokens) % max(rows, 1)
    return codes[row], scale[row] * rng.uniform(0.7, 1.4, (tokens, 1)).astype(np.float32)


def ordered_scale(scale: NDArray, order: str) -> NDArray:
    """[T, H/128] as an [H/128, T] array of the wanted memory order; gaps hold NaN."""
    if order == "token_major":
        return np.ascontiguousarray(scale).T
    if order == "padded":
        memory = np.full((scale.shape[1], 2 * len(scale) + 3), np.nan, np.float32)
        memory[:, : 2 * len(scale) : 2] = scale.T
        return memory[:, : 2 * len(scale) : 2]
    return np.ascontiguousarray(scale.T)


def in_layout(w: NDArray, case: Case) -> NDArray:
    """[L, rows, K] in the layout of the case."""
    if case.shuffled:
        w = layout.shuffle_matrix_a(w, reference.EPILOGUE_TILE_M)
    return layout.convert_to_block_layout(w) if case.weight_layout is WeightLayout.BlockMajorK else w


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
