"""The torch functions that prepare weights: the orders of the contract, any dtype and device, words of refusals."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from torch_facade import (  # noqa: E402
    convert_to_block_layout,
    reorder_rows_for_gated_act_gemm,
    shuffle_matrix_a,
    shuffle_matrix_sf_a,
)

DTYPES = [torch.float8_e4m3fn, torch.uint8, torch.bfloat16, torch.float32]
PREPARE: dict[str, Callable] = {
    "shuffle_64": lambda x: shuffle_matrix_a(x, 64),
    "shuffle_128": lambda x: shuffle_matrix_a(x, 128),
    "block": lambda x: convert_to_block_layout(x, 128),
    "reorder": reorder_rows_for_gated_act_gemm,
    "shuffle_scales": lambda x: shuffle_matrix_sf_a(x, 128),
}


def codes(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return random.view(dtype)[..., 0]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile, old_row", [
    (64, lambda n: 16 * (n // 16) + (2 * (n % 16) if n % 16 < 8 else 2 * (n % 16 - 8) + 1)),
    (128, lambda n: 32 * (n // 32) + 4 * (n % 32 % 8) + n % 32 // 8),
])  # fmt: skip
def test_shuffled_rows_are_those_of_the_formula(tile: int, old_row: Callable[[int], int], dtype: torch.dtype) -> None:
    x = codes(3, 96, 130, dtype=dtype)
    shuffled = shuffle_matrix_a(x, tile)
    assert shuffled.shape == x.shape and shuffled.dtype == dtype and shuffled.is_contiguous()
    for n in range(96):
        assert torch.equal(bits(shuffled[:, n]), bits(x[:, old_row(n)])), n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_k", [128, 64])
def test_blocks_are_columns(block_k: int, dtype: torch.dtype) -> None:
    x = codes(2, 5, 384, dtype=dtype)
    blocks = convert_to_block_layout(x, block_k)
    assert blocks.shape == (2, 384 // block_k, 5, block_k) and blocks.dtype == dtype and blocks.is_contiguous()
    for block in range(384 // block_k):
        assert torch.equal(bits(blocks[:, block]), bits(x[..., block * block_k : (block + 1) * block_k])), block


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_are_interleaved(dtype: torch.dtype) -> None:
    x = codes(2, 12, 7, dtype=dtype)
    y = reorder_rows_for_gated_act_gemm(x)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    assert torch.equal(bits(y[:, 0::2]), bits(x[:, :6])) and torch.equal(bits(y[:, 1::2]), bits(x[:, 6:]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_go_with_their_rows_to_the_bytes_of_the_contract(dtype: torch.dtype) -> None:
    s = codes(2, 256, 8, dtype=dtype)
    found = shuffle_matrix_sf_a(s, 128, num_elts_per_sf=32)
    assert found.shape == s.shape and found.dtype == dtype and found.is_contiguous()
    flat = bits(found).reshape(2, -1)
    for n, c in ((0, 0), (1, 0), (32, 0), (37, 5), (127, 3), (128, 0), (130, 6), (255, 7)):
        row = 32 * (n // 32) + 4 * (n % 32 % 8) + n % 32 // 8
        byte = n // 128 * 2 * 512 + c // 4 * 512 + n % 32 * 16 + n % 128 // 32 * 4 + c % 4
        assert torch.equal(flat[:, byte], s.view(torch.uint8)[:, row, c]), (n, c)


@pytest.mark.parametrize("name", PREPARE)
def test_one_matrix_and_a_stack_agree(name: str) -> None:
    x = codes(2, 3, 128, 256)
    whole = PREPARE[name](x)
    for i in range(2):
        for j in range(3):
            assert torch.equal(bits(whole[i, j]), bits(PREPARE[name](x[i, j])))


@pytest.mark.parametrize("name", PREPARE)
def test_strided_tensors_and_parameters_are_read(name: str) -> None:
    x = codes(128, 256)
    expected = PREPARE[name](x)
    before = bits(x).clone()
    for given in (x.t().contiguous().t(), torch.nn.Parameter(x, requires_grad=False)):
        assert torch.equal(bits(PREPARE[name](given)), bits(expected))
    assert torch.equal(bits(x), before)


@pytest.mark.parametrize("name", PREPARE)
def test_shapes_need_no_data(name: str) -> None:
    x = codes(2, 128, 256)
    real = PREPARE[name](x)
    with FakeTensorMode() as mode:
        fake = PREPARE[name](mode.from_tensor(x).to("cuda:0"))
    meta = PREPARE[name](x.to("meta"))
    for found in (fake, meta):
        assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.device == torch.device("cuda:0") and meta.is_meta


@pytest.mark.parametrize("name", PREPARE)
def test_compiled_equals_eager(name: str) -> None:
    x = codes(2, 128, 256)
    compiled = torch.compile(PREPARE[name], fullgraph=True, backend="aot_eager")
    assert torch.equal(bits(compiled(x)), bits(PREPARE[name](x)))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: shuffle_matrix_a(codes(64, 128), 32), "shuffle_matrix_a: epilogue_tile_m must be 64 or 128, got 32"),
        (lambda: shuffle_matrix_a(codes(24, 128), 64), "shuffle_matrix_a: x must be of rows that are a multiple of 16"),
        (
            lambda: shuffle_matrix_a(codes(48, 128), 128),
            "shuffle_matrix_a: x must be of rows that are a multiple of 32",
        ),
        (lambda: shuffle_matrix_a([1.0], 64), "shuffle_matrix_a: x must be a torch.Tensor, got list"),
        (
            lambda: shuffle_matrix_a(codes(64), 64),
            "shuffle_matrix_a: x must be of at least 2 dimensions, [..., rows, columns], got [64]",
        ),
        (
            lambda: convert_to_block_layout(codes(4, 200), 128),
            "convert_to_block_layout: x must be of columns that are a multiple of block_k (128), got 200; pad to 256",
        ),
        (
            lambda: convert_to_block_layout(codes(4, 128), 0),
            "convert_to_block_layout: block_k must be a positive integer, got 0",
        ),
        (
            lambda: convert_to_block_layout(codes(4, 128), True),
            "convert_to_block_layout: block_k must be a positive integer, got True",
        ),
        (lambda: convert_to_block_layout(None, 128), "convert_to_block_layout: x must be a torch.Tensor, got NoneType"),
        (
            lambda: shuffle_matrix_sf_a(codes(128, 4), 128, 64),
            "shuffle_matrix_sf_a: num_elts_per_sf must be 16 or 32, got 64",
        ),
        (
            lambda: shuffle_matrix_sf_a(codes(128, 6), 128),
            "shuffle_matrix_sf_a: s must be of rows that are a multiple of 128 and columns that are a multiple of 4",
        ),
        (lambda: shuffle_matrix_sf_a(None, 128), "shuffle_matrix_sf_a: s must be a torch.Tensor, got NoneType"),
        (
            lambda: reorder_rows_for_gated_act_gemm(codes(5, 128)),
            "reorder_rows_for_gated_act_gemm: x must be of an even number of rows, got 5",
        ),
        (
            lambda: reorder_rows_for_gated_act_gemm(codes(4)),
            "reorder_rows_for_gated_act_gemm: x must be of at least 2 dimensions, [..., rows, columns], got [4]",
        ),
    ],
)
def test_refusals_say_what_is_expected(call: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        call()
