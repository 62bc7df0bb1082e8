// The product of a warp in the decode kernels: 16 rows of weights times 8-token tiles over 128 of K. Weights are e4m3
// rows of 128 bytes in 16-byte pieces, piece p of row r at place p ^ (r % 8); tokens as decode_layout.h has them. A
// thread's four values of a piece serve as k = 2q, 2q + 1, 2q + 8, 2q + 9 of an instruction, in both operands alike: a
// sum over k does not mind the order. MxFp8 scales the product of every two pieces.
#pragma once
#include "decode_layout.h"
#include "mx_sums.cuh"

namespace jax_moe::cuda {

// Where, from a block of 16 rows of weights, a lane begins to read: 32 of 128 number i are there ^ 32 i, since blocks
// are aligned. Matrices: rows 0-7 and 8-15 of a piece, then of the next one.
DEVICE uint32_t lane_rows() {
  const int row = threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
  return row * 128 + ((piece ^ (row & 7)) << 4);
}
// The same of a tile of 8 tokens, rows of `pitch` bytes, as many bytes on for each piece. Matrices: four pieces of 16
// bytes. Tokens past `last_token` repeat it.
DEVICE uint32_t lane_tokens(int tile, int pitch, int last_token) {
  const int lane = threadIdx.x % 32;
  return min(8 * tile + lane % 8, last_token) * pitch + lane / 8 * 16;
}

// Calls multiply(32 of 128, the rows' f16 values, those of the tokens): of a tile t, b[t][first] and b[t][first + 1].
// `rows` and `tokens`: this lane's.
template <int kTokenTiles, int kValueBytes, class Multiply>
DEVICE void for_each_32(uint32_t rows, const uint32_t (&tokens)[kTokenTiles], const Multiply& multiply) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t b[kTokenTiles][4][2];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      uint32_t loaded[4];
      if constexpr (kValueBytes == kHalfBytes) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          load_matrix_x4(loaded, tokens[t] + (4 * half + i) * 32);
          b[t][i][0] = loaded[0], b[t][i][1] = loaded[1];
          b[t][i + 1][0] = loaded[2], b[t][i + 1][1] = loaded[3];
        }
      } else {
        load_matrix_x4(loaded, tokens[t] + half * 64);
#pragma unroll
        for (int i = 0; i < 4; ++i) e4m3x4_to_f16x4(loaded[i], b[t][i][0], b[t][i][1]);
      }
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t codes[4], lo[4], hi[4];
      load_matrix_x4(codes, rows ^ (2 * half + pair) * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) e4m3x4_to_f16x4(codes[i], lo[i], hi[i]);
      multiply(2 * half + pair, lo, hi, b, 2 * pair);
    }
  }
}

// product[t] = the rows times tokens 8 t + ..., as mma_m16n8k16_f16 leaves it.
template <int kValueBytes, int kTokenTiles>
DEVICE void multiply_chunk(float (&product)[kTokenTiles][4], uint32_t rows, const uint32_t (&tokens)[kTokenTiles]) {
  float odd[kTokenTiles][4] = {};  // two chains of dependent instructions instead of one
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[t][i] = 0.f;
  }
  for_each_32<kTokenTiles, kValueBytes>(
      rows, tokens, [&](int, const auto& lo, const auto& hi, const auto& b, int first) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          mma_m16n8k16_f16(product[t], lo[0], lo[1], hi[0], hi[1], b[t][first][0], b[t][first][1]);
          mma_m16n8k16_f16(odd[t], lo[2], lo[3], hi[2], hi[3], b[t][first + 1][0], b[t][first + 1][1]);
        }
      });
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[t][i] += odd[t][i];
  }
}

// The same for the tiles that have one of the tokens `named` (bits), other products are left 0: with few tokens an
// expert most of them need one tile of two, and a tile costs half as many conversions as the weights do.
template <int kValueBytes, int kTokenTiles>
DEVICE void multiply_named(float (&product)[kTokenTiles][4], uint32_t named, uint32_t rows,
                           const uint32_t (&tokens)[kTokenTiles]) {
  static_assert(kTokenTiles == 1 || kTokenTiles == 2, "at most one tile to leave out");
  if constexpr (kTokenTiles == 2) {
    const bool first = (named & 0xFF) != 0, second = named >> 8 != 0;
    if (first != second) {
      float one[1][4];
      const uint32_t tile[1] = {second ? tokens[1] : tokens[0]};
      multiply_chunk<kValueBytes>(one, rows, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product[0][i] = first ? one[0][i] : 0.f;
        product[1][i] = second ? one[0][i] : 0.f;
      }
      return;
    }
  }
  multiply_chunk<kValueBytes>(product, rows, tokens);
}

// MxFp8: of 128 of K the scales of this thread's two rows, and the factors of its two tokens of each tile.
template <int kTokenTiles>
struct MxFactors {
  uint32_t rows[2];
  uint4 tokens[kTokenTiles][2];

  // Of a row of the warp.
  DEVICE bool any_far() const { return __any_sync(~0u, (far_scales(rows[0]) | far_scales(rows[1])) != 0); }
  // sums += products of 32 of K, number `block`. kStep 2: only the first of each thread's two tokens.
  template <bool kFar, int kStep>
  DEVICE void add(float (&sums)[kTokenTiles][4], const float (&product)[kTokenTiles][4], int block) const {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; i += kStep) {
        const uint4& four = tokens[t][i % 2];
        const uint32_t token = block == 0 ? four.x : block == 1 ? four.y : block == 2 ? four.z : four.w;
        sums[t][i] = add_scaled<kFar>(sums[t][i], product[t][i], rows[i / 2], block, __uint_as_float(token));
      }
    }
  }
};

// sums[t] += the rows times tokens 8 t + ..., under their scales. `one_token`: there is but one in the call.
template <int kValueBytes, int kTokenTiles>
DEVICE void multiply_mx_chunk(float (&sums)[kTokenTiles][4], uint32_t rows, const uint32_t (&tokens)[kTokenTiles],
                              const MxFactors<kTokenTiles>& factors, bool one_token) {
  const auto multiply = [](float (&product)[kTokenTiles][4], const auto& lo, const auto& hi, const auto& b, int first) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      mma_m16n8k16_f16(product[t], lo[0], lo[1], hi[0], hi[1], b[t][first][0], b[t][first][1]);
      mma_m16n8k16_f16(product[t], lo[2], lo[3], hi[2], hi[3], b[t][first + 1][0], b[t][first + 1][1]);
    }
  };
  const bool far = factors.any_far();
  if constexpr (kTokenTiles == 1) {  // with room for the products of all scales
    float product[kMxScales][kTokenTiles][4] = {};
    for_each_32<kTokenTiles, kValueBytes>(rows, tokens,
                                          [&](int block, const auto& lo, const auto& hi, const auto& b, int first) {
                                            multiply(product[block], lo, hi, b, first);
                                          });
    if (__builtin_expect(far, 0)) {
#pragma unroll
      for (int block = 0; block < kMxScales; ++block) factors.template add<true, 1>(sums, product[block], block);
    } else if (one_token) {
#pragma unroll
      for (int block = 0; block < kMxScales; ++block) factors.template add<false, 2>(sums, product[block], block);
    } else {
#pragma unroll
      for (int block = 0; block < kMxScales; ++block) factors.template add<false, 1>(sums, product[block], block);
    }
  } else {
    for_each_32<kTokenTiles, kValueBytes>(rows, tokens,
                                          [&](int block, const auto& lo, const auto& hi, const auto& b, int first) {
                                            float product[kTokenTiles][4] = {};
                                            multiply(product, lo, hi, b, first);
                                            if (__builtin_expect(far, 0))
                                              factors.template add<true, 1>(sums, product, block);
                                            else
                                              factors.template add<false, 1>(sums, product, block);
                                          });
  }
}

// Shuffled weights: the row of 16 that is stored as row r.
DEVICE int plain_row(int r) { return r < 8 ? 2 * r : 2 * r - 15; }

}  // namespace jax_moe::cuda
