// The product of a warp in the decode kernels: 16 rows of weights times 8-token tiles over 128 of K. Weights are e4m3
// rows of 128 bytes in 16-byte pieces, piece p of row r at place p ^ (r % 8); tokens as decode_layout.h has them. A
// thread's four values of a piece serve as k = 2q, 2q + 1, 2q + 8, 2q + 9 of an instruction, in both operands alike: a
// sum over k does not mind the order. MxFp8 scales the product of every two pieces.
#pragma once
#include "decode_layout.h"
#include "mx_scale.cuh"

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

// MxFp8: a product under two E8M0 scales, whatever they are. NOTE: the scales' product may leave float32 where the
// result does not, and under a zero it may not become infinite: it is taken in two halves.
DEVICE float scaled_by_halves(float product, uint32_t a, uint32_t b) {
  const uint32_t sum = a + b, low = sum / 2;
  if (a == kMxScaleNan || b == kMxScaleNan) return __uint_as_float(0x7FFFFFFF);
  return product * __uint_as_float(low << 23) * __uint_as_float((sum - low) << 23);
}

// Bytes that are scales from 2^-63 to 2^64, of tokens to 2^63, of all four in a word: 0x80 each. None is NaN, and the
// product of two such scales is a float32 with an exponent of its own.
inline constexpr uint32_t kAllNear = 0x80808080;
DEVICE uint32_t near_rows(uint32_t word) { return (word ^ word << 1) & kAllNear; }
DEVICE uint32_t near_tokens(uint32_t word) { return near_rows(word) & near_rows(word + 0x01010101); }

// The words of four scales of this thread's two rows and of its two tokens of each tile.
template <int kTokenTiles>
struct MxWords {
  const uint32_t (&rows)[2];
  uint32_t tokens[kTokenTiles][2];

  DEVICE MxWords(const uint32_t (&rows)[2], const float (&token_words)[kTokenTiles][2]) : rows(rows) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) tokens[t][i] = __float_as_uint(token_words[t][i]);
    }
  }

  // kAllNear, or less.
  DEVICE uint32_t tokens_near() const {
    uint32_t near = kAllNear;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) near &= near_tokens(tokens[t][0]) & near_tokens(tokens[t][1]);
    return near;
  }
  // sums += products under their scales, of 32 of K, number `block`.
  DEVICE void add_far(float (&sums)[kTokenTiles][4], const float (&product)[kTokenTiles][4], int block) const {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[t][i] +=
            scaled_by_halves(product[t][i], rows[i / 2] >> 8 * block & 255, tokens[t][i % 2] >> 8 * block & 255);
    }
  }
};

// The same where all are near: for each of this thread's values a word of four exponents.
template <int kTokenTiles>
struct MxExponents {
  uint32_t of_value[kTokenTiles][4];

  DEVICE explicit MxExponents(const MxWords<kTokenTiles>& words) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of_value[t][i] = words.rows[i / 2] - 0x40404040 + (words.tokens[t][i % 2] - 0x3F3F3F3F);
        if (kTokenTiles == 1) hold(of_value[t][i]);  // else it would be computed again for every scale
      }
    }
  }
  // kStep 2: only the first of each thread's two tokens.
  template <int kStep>
  DEVICE void add(float (&sums)[kTokenTiles][4], const float (&product)[kTokenTiles][4], int block) const {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; i += kStep)
        sums[t][i] += product[t][i] * __uint_as_float((of_value[t][i] >> 8 * block & 255) << 23);
    }
  }
};

// sums[t] += the rows times tokens 8 t + ..., under their scales. `tokens_near`: kAllNear, or less; `one_token`: there
// is but one in the call.
template <int kValueBytes, int kTokenTiles>
DEVICE void multiply_mx_chunk(float (&sums)[kTokenTiles][4], uint32_t rows, const uint32_t (&tokens)[kTokenTiles],
                              const MxWords<kTokenTiles>& words, uint32_t tokens_near, bool one_token) {
  const auto all_near = [&] {
    return __all_sync(~0u, (near_rows(words.rows[0]) & near_rows(words.rows[1]) & tokens_near) == kAllNear);
  };
  const auto multiply = [](float (&product)[kTokenTiles][4], const auto& lo, const auto& hi, const auto& b, int first) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      mma_m16n8k16_f16(product[t], lo[0], lo[1], hi[0], hi[1], b[t][first][0], b[t][first][1]);
      mma_m16n8k16_f16(product[t], lo[2], lo[3], hi[2], hi[3], b[t][first + 1][0], b[t][first + 1][1]);
    }
  };
  if constexpr (kTokenTiles == 1) {  // with room for the products of all scales, before these are looked at
    float product[kMxScales][kTokenTiles][4] = {};
    for_each_32<kTokenTiles, kValueBytes>(rows, tokens,
                                          [&](int block, const auto& lo, const auto& hi, const auto& b, int first) {
                                            multiply(product[block], lo, hi, b, first);
                                          });
    if (__builtin_expect(all_near(), 1)) {
      const MxExponents<kTokenTiles> exponents(words);
      if (one_token) {
#pragma unroll
        for (int block = 0; block < kMxScales; ++block) exponents.template add<2>(sums, product[block], block);
      } else {
#pragma unroll
        for (int block = 0; block < kMxScales; ++block) exponents.template add<1>(sums, product[block], block);
      }
    } else {
#pragma unroll
      for (int block = 0; block < kMxScales; ++block) words.add_far(sums, product[block], block);
    }
  } else {
    const bool near = all_near();
    for_each_32<kTokenTiles, kValueBytes>(rows, tokens,
                                          [&](int block, const auto& lo, const auto& hi, const auto& b, int first) {
                                            float product[kTokenTiles][4] = {};
                                            multiply(product, lo, hi, b, first);
                                            if (__builtin_expect(near, 1))
                                              MxExponents<kTokenTiles>(words).template add<1>(sums, product, block);
                                            else
                                              words.add_far(sums, product, block);
                                          });
  }
}

// Shuffled weights: the row of 16 that is stored as row r.
DEVICE int plain_row(int r) { return r < 8 ? 2 * r : 2 * r - 15; }

}  // namespace jax_moe::cuda
