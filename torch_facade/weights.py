"""The memory orders of weights, for callers that prepare them: what use_shuffled_weight and weight_layout describe.

All take torch tensors of any dtype on any device. Of scales, only those of MxFp8 for 1x32 have such orders.
"""

from __future__ import annotations

from typing import Any

import torch

from jax_moe import layout


def shuffle_matrix_a(x: torch.Tensor, epilogue_tile_m: int) -> torch.Tensor:
    """[..., rows, columns], contiguous, with its rows in the order of an epilogue tile of `epilogue_tile_m` rows.

    epilogue_tile_m is 64 for DeepSeekFp8 with use_shuffled_weight=True: new row n of each 16 is then old row 2n for
    n < 8, 2 (n - 8) + 1 for the others. For MxFp8 it is 128: new row n of each 32 is old row 4 (n % 8) + n // 8. Raises
    ValueError for another tile, or rows that are no multiple of 16 (tile 64) or 32 (tile 128).
    """
    _check_matrix("shuffle_matrix_a", x)
    return layout.shuffle_matrix_a(x, epilogue_tile_m)


def shuffle_matrix_sf_a(s: torch.Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 32) -> torch.Tensor:
    """MxFp8 scales [..., rows, columns/32] of plain order, in that of `shuffle_matrix_a(weights, epilogue_tile_m)`.

    Their rows are shuffled as those of the weights; then they are interleaved 128x4, which keeps the shape: that of row
    r and column c of C is at byte (r // 128 * C // 4 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4.
    num_elts_per_sf, 16 or 32, changes nothing. Raises ValueError for other values, and for rows that are no multiple of
    128 or columns that are none of 4.
    """
    _check_matrix("shuffle_matrix_sf_a", s, "s")
    if num_elts_per_sf not in (16, 32):
        raise ValueError(f"shuffle_matrix_sf_a: num_elts_per_sf must be 16 or 32, got {num_elts_per_sf!r}")
    return layout.shuffle_matrix_sf_a(s, epilogue_tile_m)


def convert_to_block_layout(x: torch.Tensor, block_k: int) -> torch.Tensor:
    """[..., M, K] -> contiguous [..., K / block_k, M, block_k]: y[kb, m, kk] = x[m, block_k * kb + kk].

    WeightLayout.BlockMajorK is block_k = 128. Rows are shuffled before. Raises ValueError unless K is a multiple of
    block_k.
    """
    columns = _check_matrix("convert_to_block_layout", x)[-1]
    if isinstance(block_k, bool) or not isinstance(block_k, int) or block_k < 1:
        raise ValueError(f"convert_to_block_layout: block_k must be a positive integer, got {block_k!r}")
    if columns % block_k:
        raise ValueError(
            f"convert_to_block_layout: x must be of columns that are a multiple of block_k ({block_k}), got {columns}; "
            f"pad to {-(-columns // block_k) * block_k}"
        )
    return layout.convert_to_block_layout(x, block_k)


def reorder_rows_for_gated_act_gemm(x: torch.Tensor) -> torch.Tensor:
    """[..., M, columns] -> the same shape, its halves interleaved: new[2j] = old[j], new[2j + 1] = old[M/2 + j].

    For gated gemm1_weights of MxFp8 and their scales, before they are shuffled. DeepSeekFp8 wants them without this:
    all up rows, then all gate rows. Raises ValueError unless M is even.
    """
    _check_matrix("reorder_rows_for_gated_act_gemm", x)
    return layout.reorder_rows_for_gated_act_gemm(x)


def _check_matrix(function: str, x: Any, name: str = "x") -> torch.Size:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{function}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() < 2:
        expected = "at least 2 dimensions, [..., rows, columns]"
        raise ValueError(f"{function}: {name} must be of {expected}, got {list(x.shape)}")
    return x.shape
