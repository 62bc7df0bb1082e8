// Narrow tiles: how sums, weight rows by tokens as wgmma leaves them,
//   sums[half][4 j + 2 v + b]  of row 64 index + fragment_row + 8 v of a half and token 8 j + 2 quad + b,
// become rows of tokens. Each warp stages, transposed, pieces of 16 bytes a token with the values of its 16 rows, in
// the order of its registers; whoever copies a piece to its place puts its bytes in the order of the columns.
#pragma once
#include "warpgroup.cuh"

namespace jax_moe::cuda {

// GEMM1: the column, in a half's 128, of this thread's row v (0: fragment_row, 1: + 8). kTurns: of the values of half
// v, in the tile's 128.
template <Order kOrder>
DEVICE int column_of(const WarpgroupContext& wg, int v) {
  const int warp = wg.warp(), row = wg.lane() / 4, first = wg.index * kWarpgroupRows;
  switch (kOrder) {
    case Order::kEights:
      return first + 32 * (warp / 2) + 4 * row + 2 * (warp % 2) + v;
    case Order::kTurns:
      return 64 * v + 32 * wg.index + 16 * (warp / 2) + 2 * row + warp % 2;
    default:
      return first + 16 * warp + 2 * row + v;
  }
}

// Four units of 16 bits at each of two places, one of either by turns.
DEVICE uint4 zip16(uint32_t first, uint32_t second) {
  const uint2 a = load_shared_v2(first), b = load_shared_v2(second);
  return make_uint4(__byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632), __byte_perm(a.y, b.y, 0x5410),
                    __byte_perm(a.y, b.y, 0x7632));
}

// Staged pieces of 64 bytes a token, one a warp: units of two codes, those of v = 0 and 1, of 8 rows.
struct StagedCodes {
  uint32_t base;

  DEVICE uint32_t piece(int token, int warp) const { return base + token * 64 + ((warp ^ (token / 2 & 3)) << 4); }

  // Codes of four groups of 8 tokens, from token on; of each the units of this thread's two tokens.
  DEVICE void put(const WarpgroupContext& wg, int token, const uint32_t (&units)[4]) const {
    store_transposed_x4(piece(token + wg.lane(), wg.warp()), units[0], units[1], units[2], units[3]);
  }
  // 16 neighbouring columns of a token, those from first_column(wg, piece) on.
  template <Order kOrder>
  DEVICE uint4 get(int token, int p) const {
    static_assert(kOrder != Order::kPlain, "GEMM1's rows never are");
    if constexpr (kOrder == Order::kFours) {
      return load_shared_v4(piece(token, p));
    } else if constexpr (kOrder == Order::kEights) {
      return zip16(piece(token, p & ~1) + p % 2 * 8, piece(token, p | 1) + p % 2 * 8);
    } else {
      const uint4 a = load_shared_v4(piece(token, p % 2 * 2)), b = load_shared_v4(piece(token, p % 2 * 2 + 1));
      const uint32_t which = p / 2 == 0 ? 0x6240 : 0x7351;
      return make_uint4(__byte_perm(a.x, b.x, which), __byte_perm(a.y, b.y, which), __byte_perm(a.z, b.z, which),
                        __byte_perm(a.w, b.w, which));
    }
  }
  template <Order kOrder>
  static DEVICE int first_column(const WarpgroupContext& wg, int p) {
    return kOrder == Order::kTurns ? 64 * (p / 2) + 32 * wg.index + 16 * (p % 2) : wg.index * kWarpgroupRows + 16 * p;
  }
};

// Staged pieces of 128 bytes a token, two a warp: bf16 values of v = 0 in the first, of v = 1 in the second.
struct StagedBf16 {
  uint32_t base;

  DEVICE uint32_t piece(int token, int p) const { return base + token * 128 + ((p ^ (token & 7)) << 4); }

  // Two groups of 8 tokens, from token on: pairs[g][v] of this thread's two tokens.
  DEVICE void put(const WarpgroupContext& wg, int token, const uint32_t (&pairs)[2][2]) const {
    const int matrix = wg.lane() / 8;
    store_transposed_x4(piece(token + matrix / 2 * 8 + wg.lane() % 8, 2 * wg.warp() + matrix % 2), pairs[0][0],
                        pairs[0][1], pairs[1][0], pairs[1][1]);
  }
  // Columns 8 p to 8 p + 7 of this warpgroup's 64, of a token.
  template <Order kOrder>
  DEVICE uint4 get(int token, int p) const {
    if constexpr (kOrder == Order::kPlain) {
      return load_shared_v4(piece(token, p));
    } else if constexpr (kOrder == Order::kFours) {
      return zip16(piece(token, p & ~1) + p % 2 * 8, piece(token, p | 1) + p % 2 * 8);
    } else {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = load_shared_u32(piece(token, (p & ~3) + i) + p % 4 * 4);
      return make_uint4(__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410),
                        __byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632));
    }
  }
};

}  // namespace jax_moe::cuda
