"""Weight layouts: the orders that the contract states, their inverses, and one function for three kinds of arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from jax_moe import layout

FIRST = {
    64: [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15],
    128: [*range(0, 32, 4), *range(1, 32, 4), *range(2, 32, 4), *range(3, 32, 4)],
}
tiles = pytest.mark.parametrize("tile", [64, 128])


def codes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8).view(ml_dtypes.float8_e4m3fn)


@tiles
def test_the_first_group_is_that_of_the_contract(tile):
    group = len(FIRST[tile])
    assert layout.shuffle_rows(group, tile).tolist() == FIRST[tile]
    rows = layout.shuffle_rows(4 * group, tile)
    assert [[row % group for row in part] for part in rows.reshape(4, group).tolist()] == [FIRST[tile]] * 4
    assert (rows // group).tolist() == (np.arange(4 * group) // group).tolist()


def test_rows_are_those_of_the_formulas():
    n = np.arange(384)
    r = n % 16
    assert np.array_equal(layout.shuffle_rows(384, 64), 16 * (n // 16) + np.where(r < 8, 2 * r, 2 * (r - 8) + 1))
    r = n % 32
    assert np.array_equal(layout.shuffle_rows(384, 128), 32 * (n // 32) + 4 * (r % 8) + r // 8)


@tiles
@pytest.mark.parametrize("shape", [(128, 5), (3, 64, 128), (2, 3, 32, 1), (0, 32, 4), (2, 0, 4), (2, 32, 0)], ids=str)
def test_a_matrix_is_shuffled_by_those_rows_and_back(tile, shape):
    x = codes(*shape)
    shuffled = layout.shuffle_matrix_a(x, tile)
    rows = layout.shuffle_rows(shape[-2], tile)
    assert np.array_equal(shuffled.view(np.uint8), x[..., rows, :].view(np.uint8))
    assert np.array_equal(layout.unshuffle_matrix_a(shuffled, tile).view(np.uint8), x.view(np.uint8))
    assert shuffled.dtype == x.dtype and shuffled.flags.c_contiguous


@pytest.mark.parametrize("shape", [(5, 256), (3, 7, 128), (2, 2, 1, 384), (0, 4, 128), (2, 0, 256), (3, 4, 0)], ids=str)
def test_block_major_k_is_blocks_of_columns_and_back(shape):
    x = codes(*shape)
    blocked = layout.convert_to_block_layout(x)
    assert blocked.shape == (*shape[:-2], shape[-1] // 128, shape[-2], 128) and blocked.flags.c_contiguous
    for block in range(shape[-1] // 128):
        part = x[..., 128 * block : 128 * block + 128]
        assert np.array_equal(blocked[..., block, :, :].view(np.uint8), part.view(np.uint8))
    back = layout.from_block_major_k(blocked)
    assert np.array_equal(back.view(np.uint8), x.view(np.uint8)) and back.flags.c_contiguous


def offset_of(row, column, columns):
    """Byte of a scale in the 128x4 order, as the contract writes it."""
    tiles = -(-columns // 4)
    return row // 128 * tiles * 512 + column // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


@pytest.mark.parametrize(
    ("columns", "row", "column", "byte"),
    [(4, 1, 0, 16), (4, 32, 0, 4), (4, 127, 0, 508), (4, 128, 0, 512), (8, 37, 5, 597), (8, 130, 6, 1570)],
)
def test_scales_are_where_the_contract_says(columns, row, column, byte):
    assert offset_of(row, column, columns) == byte
    scales = np.zeros((256, columns), np.uint8)
    scales[row, column] = 1
    assert np.flatnonzero(layout.interleave_scales(scales)).tolist() == [byte]


@pytest.mark.parametrize("shape", [(128, 4), (384, 12), (3, 256, 8), (2, 2, 128, 28), (0, 128, 4), (2, 0, 4)], ids=str)
def test_scales_are_interleaved_by_the_formula_and_back(shape):
    scales = codes(*shape).view(np.uint8)
    found = layout.interleave_scales(scales)
    assert found.shape == shape and found.flags.c_contiguous
    row, column = np.indices(shape[-2:])
    expected = np.zeros((*shape[:-2], shape[-2] * shape[-1]), np.uint8)
    expected[..., offset_of(row, column, shape[-1]).reshape(-1)] = scales.reshape(*shape[:-2], shape[-2] * shape[-1])
    assert np.array_equal(found.reshape(expected.shape), expected)
    assert np.array_equal(layout.deinterleave_scales(found), scales)


@tiles
def test_scales_are_shuffled_with_the_rows_of_the_weights_then_interleaved(tile):
    scales = codes(2, 256, 8).view(np.uint8)
    found = layout.shuffle_matrix_sf_a(scales, tile)
    rows = layout.shuffle_rows(256, tile)
    assert np.array_equal(found, layout.interleave_scales(scales[:, rows]))
    assert np.array_equal(layout.unshuffle_matrix_sf_a(found, tile), scales)


def test_halves_take_turns_and_back():
    x = codes(3, 12, 5)
    found = layout.reorder_rows_for_gated_act_gemm(x)
    for j in range(6):
        assert np.array_equal(found[:, 2 * j].view(np.uint8), x[:, j].view(np.uint8))
        assert np.array_equal(found[:, 2 * j + 1].view(np.uint8), x[:, 6 + j].view(np.uint8))
    assert np.array_equal(layout.restore_rows_of_gated_act_gemm(found).view(np.uint8), x.view(np.uint8))


def test_another_block_size():
    blocked = layout.convert_to_block_layout(np.arange(24).reshape(3, 8), 4)
    assert blocked.tolist() == [
        [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]],
        [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]],
    ]


@examples(60)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from((64, 128)), st.booleans())
def test_layouts_commute(groups, blocks, tile, block_first):
    """Rows may be shuffled before or after K is blocked."""
    x = np.arange(32 * groups * 128 * blocks).reshape(32 * groups, 128 * blocks)
    y = layout.shuffle_matrix_a(layout.convert_to_block_layout(x), tile)
    assert np.array_equal(y, layout.convert_to_block_layout(layout.shuffle_matrix_a(x, tile)))
    undone = (
        layout.from_block_major_k(layout.unshuffle_matrix_a(y, tile))
        if block_first
        else layout.unshuffle_matrix_a(layout.from_block_major_k(y), tile)
    )
    assert np.array_equal(undone, x)


FUNCTIONS = {
    "shuffle_64": lambda x: layout.shuffle_matrix_a(x, 64),
    "shuffle_128": lambda x: layout.shuffle_matrix_a(x, 128),
    "unshuffle_64": lambda x: layout.unshuffle_matrix_a(x, 64),
    "unshuffle_128": lambda x: layout.unshuffle_matrix_a(x, 128),
    "convert_to_block_layout": layout.convert_to_block_layout,
    "from_block_major_k": layout.from_block_major_k,
    "reorder": layout.reorder_rows_for_gated_act_gemm,
    "restore": layout.restore_rows_of_gated_act_gemm,
    "interleave": layout.interleave_scales,
    "deinterleave": layout.deinterleave_scales,
    "shuffle_scales_128": lambda x: layout.shuffle_matrix_sf_a(x, 128),
    "unshuffle_scales_128": lambda x: layout.unshuffle_matrix_sf_a(x, 128),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jax_arrays(name):
    jax = pytest.importorskip("jax")
    x = codes(2, 3, 128, 256)
    expected = FUNCTIONS[name](x)
    for function in (FUNCTIONS[name], jax.jit(FUNCTIONS[name]), jax.vmap(FUNCTIONS[name])):
        actual = np.asarray(function(jax.numpy.asarray(x)))
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert np.array_equal(actual.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_torch_tensors(name, contiguous):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(codes(3, 128, 256).view(np.uint8))
    if not contiguous:
        x = torch.stack([x, x], dim=-1)[..., 0]
    actual = FUNCTIONS[name](x.view(torch.float8_e4m3fn) if contiguous else x)
    assert actual.is_contiguous() and actual.dtype == (torch.float8_e4m3fn if contiguous else torch.uint8)
    assert np.array_equal(actual.view(torch.uint8).numpy(), FUNCTIONS[name](x.numpy()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: layout.shuffle_rows(40, 64), "shuffle_matrix_a: x must be of rows that are a multiple of 16, got 40"),
        (lambda: layout.shuffle_rows(48, 128), "shuffle_matrix_a: x must be of rows that are a multiple of 32, got 48"),
        (lambda: layout.shuffle_rows(64, 32), "shuffle_matrix_a: epilogue_tile_m must be 64 or 128, got 32"),
        (lambda: layout.shuffle_matrix_a(np.zeros(64), 64), "x must be of at least 2 dimensions, got (64,)"),
        (lambda: layout.unshuffle_matrix_a(np.zeros((8, 2)), 64), "unshuffle_matrix_a: x must be of rows that are a"),
        (lambda: layout.convert_to_block_layout(np.zeros((4, 130))), "of columns that are a multiple of 128, got 130"),
        (
            lambda: layout.convert_to_block_layout(np.zeros((4, 128)), 0),
            "convert_to_block_layout: block_k must be a positive integer, got 0",
        ),
        (lambda: layout.convert_to_block_layout(np.zeros((4, 128)), 128.0), "a positive integer, got 128.0"),
        (lambda: layout.shuffle_matrix_a([[1.0]], 64), "shuffle_matrix_a: x must be an array, got list"),
        (
            lambda: layout.interleave_scales(np.zeros((130, 4))),
            "interleave_scales: s must be of rows that are a multiple of 128 and columns that are a multiple of 4, got "
            "(130, 4); pad it with zeros",
        ),
        (lambda: layout.deinterleave_scales(np.zeros((128, 6))), "deinterleave_scales: s must be of rows that"),
        (lambda: layout.shuffle_matrix_sf_a(np.zeros((40, 4)), 128), "shuffle_matrix_sf_a: s must be of rows that are"),
        (lambda: layout.shuffle_matrix_sf_a(np.zeros((64, 4)), 128), "shuffle_matrix_sf_a: s must be of rows that are"),
        (lambda: layout.shuffle_matrix_sf_a(np.zeros((128, 4)), 16), "epilogue_tile_m must be 64 or 128, got 16"),
        (lambda: layout.shuffle_matrix_sf_a([1], 128), "shuffle_matrix_sf_a: s must be an array, got list"),
        (
            lambda: layout.reorder_rows_for_gated_act_gemm(np.zeros((5, 4))),
            "reorder_rows_for_gated_act_gemm: x must be of an even number of rows, got 5",
        ),
        (lambda: layout.from_block_major_k(np.zeros((4, 128))), "of at least 3 dimensions, got (4, 128)"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
