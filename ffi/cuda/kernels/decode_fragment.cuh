// The product of a warp in the decode kernels: 16 rows of weights times 8-token tiles over 128 of K. Both operands are
// e4m3 rows of 128 bytes in 16-byte pieces, piece p of row r at place p ^ (r % 8). A thread's four codes of a piece
// serve as the f16 values k = 2q, 2q + 1, 2q + 8, 2q + 9 of an instruction, in both operands alike: a sum over k does
// not mind the order.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

// product[t] = the rows times tokens 8 t + ..., as mma_m16n8k16_f16 leaves it. Tokens past `last_token` repeat it.
template <int kTokenTiles>
DEVICE void multiply_chunk(float (&product)[kTokenTiles][4], uint32_t rows, uint32_t tokens, int pitch,
                           int last_token) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 16, row_piece = lane / 16;  // matrices: rows 0-7 and 8-15 of a piece, then of the next one
  const int token_piece = lane / 8;                  // matrices: four pieces
  float odd[kTokenTiles][4] = {};                    // two chains of dependent instructions instead of one
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[t][i] = 0.f;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t b[kTokenTiles][4][2];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int token = min(8 * t + lane % 8, last_token);
      uint32_t codes[4];
      load_matrix_x4(codes, tokens + token * pitch + (4 * half + token_piece) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) e4m3x4_to_f16x4(codes[i], b[t][i][0], b[t][i][1]);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t codes[4], lo[4], hi[4];
      load_matrix_x4(codes, rows + row * 128 + (((4 * half + 2 * pair + row_piece) ^ (row & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) e4m3x4_to_f16x4(codes[i], lo[i], hi[i]);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        mma_m16n8k16_f16(product[t], lo[0], lo[1], hi[0], hi[1], b[t][2 * pair][0], b[t][2 * pair][1]);
        mma_m16n8k16_f16(odd[t], lo[2], lo[3], hi[2], hi[3], b[t][2 * pair + 1][0], b[t][2 * pair + 1][1]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[t][i] += odd[t][i];
  }
}

// The same for the tiles that have one of the tokens `named` (bits), other products are left 0: with few tokens an
// expert most of them need one tile of two, and a tile costs half as many conversions as the weights do.
template <int kTokenTiles>
DEVICE void multiply_named(float (&product)[kTokenTiles][4], uint32_t named, uint32_t rows, uint32_t tokens, int pitch,
                           int last_token) {
  static_assert(kTokenTiles == 1 || kTokenTiles == 2, "at most one tile to leave out");
  if constexpr (kTokenTiles == 2) {
    const bool first = (named & 0xFF) != 0, second = named >> 8 != 0;
    if (first != second) {
      float one[1][4];
      const int skipped = second ? 8 : 0;
      multiply_chunk(one, rows, tokens + skipped * pitch, pitch, last_token - skipped);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product[0][i] = first ? one[0][i] : 0.f;
        product[1][i] = second ? one[0][i] : 0.f;
      }
      return;
    }
  }
  multiply_chunk(product, rows, tokens, pitch, last_token);
}

// Shuffled weights: the row of 16 that is stored as row r.
DEVICE int plain_row(int r) { return r < 8 ? 2 * r : 2 * r - 15; }

}  // namespace jax_moe::cuda
