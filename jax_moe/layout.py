"""The memory orders that weights may have: rows shuffled for an epilogue tile, and K in blocks of 128 columns.

Everything here is a reshape and a swap of axes, so that one function serves numpy, jax and torch arrays (float8 ones
too, on any device, under jit). Imports neither of them. Of scales, those of MxFp8 for 1x32 alone have such orders.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

AnyArray = TypeVar("AnyArray")  # of numpy, jax or torch

SCALE_ROWS, SCALE_COLUMNS = 128, 4  # of a tile of interleaved scales, 512 bytes

# Groups of rows, as (lanes, rows a lane): new row n of a group takes old row rows_a_lane * (n % lanes) + n // lanes.
GROUPS = {64: (8, 2), 128: (8, 4)}


def shuffle_rows(num_rows: int, epilogue_tile_m: int) -> NDArray[np.int64]:
    """The rows that `shuffle_matrix_a` takes: new row n is old row shuffle_rows(...)[n]. int64 [num_rows].

    Raises ValueError for an epilogue_tile_m other than 64 and 128, or rows that are not whole groups (of 16 and 32).
    """
    return shuffle_matrix_a(np.arange(num_rows)[:, None], epilogue_tile_m)[:, 0]


def shuffle_matrix_a(x: AnyArray, epilogue_tile_m: int) -> AnyArray:
    """[..., rows, columns] of any dtype, its rows in the order of an epilogue tile of 64 (DeepSeekFp8) or 128 rows.

    With 64 the first 16 rows are 0 2 4 6 8 10 12 14 1 3 5 7 9 11 13 15; with 128 the first 32 are
    0 4 8 12 16 20 24 28 1 5 9 13 ... Both halves of gemm1_weights are shuffled in place, each inside itself. Raises
    ValueError as `shuffle_rows`.
    """
    lanes, rows_a_lane = _group("shuffle_matrix_a", x, epilogue_tile_m)
    return _with_rows_swapped(x, lanes, rows_a_lane)


def unshuffle_matrix_a(x: AnyArray, epilogue_tile_m: int) -> AnyArray:
    """The inverse of `shuffle_matrix_a`."""
    lanes, rows_a_lane = _group("unshuffle_matrix_a", x, epilogue_tile_m)
    return _with_rows_swapped(x, rows_a_lane, lanes)


def shuffle_matrix_sf_a(s: AnyArray, epilogue_tile_m: int) -> AnyArray:
    """MxFp8's scales for 1x32, [..., M, K/32], in the order that goes with `shuffle_matrix_a(w, epilogue_tile_m)`.

    Their rows are shuffled as those of the weights, then `interleave_scales` is applied. Raises ValueError as those.
    """
    lanes, rows_a_lane = _group("shuffle_matrix_sf_a", s, epilogue_tile_m, "s")
    return _interleaved("shuffle_matrix_sf_a", _with_rows_swapped(s, lanes, rows_a_lane))


def unshuffle_matrix_sf_a(s: AnyArray, epilogue_tile_m: int) -> AnyArray:
    """The inverse of `shuffle_matrix_sf_a`."""
    lanes, rows_a_lane = _group("unshuffle_matrix_sf_a", s, epilogue_tile_m, "s")
    return _with_rows_swapped(_deinterleaved("unshuffle_matrix_sf_a", s), rows_a_lane, lanes)


def interleave_scales(s: AnyArray) -> AnyArray:
    """[..., M, C] -> the same shape, its elements in the 128x4 order: with tiles of 128 rows and 4 columns, the one of
    row r and column c is at (r // 128 * C // 4 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4.

    Raises ValueError unless M is a multiple of 128 and C of 4.
    """
    return _interleaved("interleave_scales", s)


def deinterleave_scales(s: AnyArray) -> AnyArray:
    """The inverse of `interleave_scales`."""
    return _deinterleaved("deinterleave_scales", s)


def reorder_rows_for_gated_act_gemm(x: AnyArray) -> AnyArray:
    """[..., M, columns] -> the same shape, its halves interleaved: new[2j] = old[j], new[2j + 1] = old[M/2 + j].

    MxFp8 wants it of gated gemm1_weights and of their scales before they are shuffled. Raises ValueError unless M is
    even.
    """
    *outer, rows, columns = _even("reorder_rows_for_gated_act_gemm", x)
    return _swapped(x, (*outer, 2, rows // 2, columns), (*outer, rows, columns))


def restore_rows_of_gated_act_gemm(x: AnyArray) -> AnyArray:
    """The inverse of `reorder_rows_for_gated_act_gemm`."""
    *outer, rows, columns = _even("restore_rows_of_gated_act_gemm", x)
    return _swapped(x, (*outer, rows // 2, 2, columns), (*outer, rows, columns))


def convert_to_block_layout(x: AnyArray, block_k: int = 128) -> AnyArray:
    """[..., M, K] -> contiguous [..., K / block_k, M, block_k]: y[kb, m, kk] = x[m, block_k * kb + kk].

    Raises ValueError unless K is a multiple of block_k.
    """
    *outer, rows, columns = _shape("convert_to_block_layout", x, 2)
    if not isinstance(block_k, int) or block_k < 1:
        raise ValueError(f"convert_to_block_layout: block_k must be a positive integer, got {block_k}")
    if columns % block_k:
        raise ValueError(
            f"convert_to_block_layout: x must be of columns that are a multiple of {block_k}, got {columns}"
        )
    return _swapped(x, (*outer, rows, columns // block_k, block_k), (*outer, columns // block_k, rows, block_k))


def from_block_major_k(x: AnyArray) -> AnyArray:
    """[..., K / block_k, M, block_k] -> contiguous [..., M, K]: the inverse of `convert_to_block_layout`."""
    *outer, blocks, rows, block_k = _shape("from_block_major_k", x, 3)
    return _swapped(x, (*outer, blocks, rows, block_k), (*outer, rows, blocks * block_k))


def _with_rows_swapped(x: Any, lanes: int, rows_a_lane: int) -> Any:
    *outer, rows, columns = x.shape
    groups = rows // (lanes * rows_a_lane)
    return _swapped(x, (*outer, groups, lanes, rows_a_lane, columns), (*outer, rows, columns))


def _interleaved(function: str, s: Any) -> Any:
    *outer, rows, columns = _scale_tiles(function, s)
    tiles = s.reshape((*outer, rows // SCALE_ROWS, 4, 32, columns // SCALE_COLUMNS, SCALE_COLUMNS))
    return tiles.swapaxes(-4, -2).reshape((-1,)).reshape((*outer, rows, columns))


def _deinterleaved(function: str, s: Any) -> Any:
    *outer, rows, columns = _scale_tiles(function, s)
    tiles = s.reshape((*outer, rows // SCALE_ROWS, columns // SCALE_COLUMNS, 32, 4, SCALE_COLUMNS))
    return tiles.swapaxes(-4, -2).reshape((-1,)).reshape((*outer, rows, columns))


def _swapped(x: Any, shape: tuple[int, ...], result: tuple[int, ...]) -> Any:
    """`x` as `shape`, the two axes before the last swapped, as a contiguous array of the shape `result`."""
    return x.reshape(shape).swapaxes(-3, -2).reshape((-1,)).reshape(result)


def _group(function: str, x: Any, epilogue_tile_m: int, name: str = "x") -> tuple[int, int]:
    if epilogue_tile_m not in GROUPS:
        raise ValueError(f"{function}: epilogue_tile_m must be 64 or 128, got {epilogue_tile_m!r}")
    lanes, rows_a_lane = GROUPS[epilogue_tile_m]
    rows, group = _shape(function, x, 2, name)[-2], lanes * rows_a_lane
    if rows % group:
        raise ValueError(f"{function}: {name} must be of rows that are a multiple of {group}, got {rows}")
    return lanes, rows_a_lane


def _scale_tiles(function: str, s: Any) -> tuple[int, ...]:
    shape = _shape(function, s, 2, "s")
    if shape[-2] % SCALE_ROWS or shape[-1] % SCALE_COLUMNS:
        expected = f"of rows that are a multiple of {SCALE_ROWS} and columns that are a multiple of {SCALE_COLUMNS}"
        raise ValueError(f"{function}: s must be {expected}, got {shape}; pad it with zeros")
    return shape


def _even(function: str, x: Any) -> tuple[int, ...]:
    shape = _shape(function, x, 2)
    if shape[-2] % 2:
        raise ValueError(f"{function}: x must be of an even number of rows, got {shape[-2]}")
    return shape


def _shape(function: str, x: Any, rank: int, name: str = "x") -> tuple[int, ...]:
    if not hasattr(x, "shape"):
        raise ValueError(f"{function}: {name} must be an array, got {type(x).__name__}")
    if len(x.shape) < rank:
        raise ValueError(f"{function}: {name} must be of at least {rank} dimensions, got {tuple(x.shape)}")
    return tuple(x.shape)
