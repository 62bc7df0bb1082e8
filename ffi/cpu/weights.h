// Where the rows of a weight matrix [N, K] of one expert lie in memory, for every layout. Readers ask for logical rows
// and columns; nothing is copied.
#pragma once
#include "../moe.h"

namespace jax_moe::cpu {

inline constexpr int kTileColumns = 16;  // weight rows whose values lie side by side once decoded

struct WeightMatrix {
  const uint8_t* codes;
  const float* scales;          // [N/128, K/128]
  int64_t k_blocks;             // K/128
  int64_t row_stride;           // bytes
  int64_t k_stride;             // bytes from one 128 of K to the next
  int8_t column[kTileColumns];  // logical place of each row of a tile, in the order of memory

  // Matrix `expert` of `codes`, [L, rows, columns] in the problem's layout, and `scales`, [L, rows/128, columns/128].
  WeightMatrix(const Problem& problem, const Buffer& all_codes, const Buffer& all_scales, int64_t expert, int64_t rows,
               int64_t columns)
      : codes(static_cast<const uint8_t*>(all_codes.data) + expert * rows * columns),
        scales(static_cast<const float*>(all_scales.data) + expert * (rows / kScaleBlock) * (columns / kScaleBlock)),
        k_blocks(columns / kScaleBlock),
        row_stride(problem.block_major_k() ? kScaleBlock : columns),
        k_stride(problem.block_major_k() ? rows * kScaleBlock : kScaleBlock) {
    // Shuffled rows change places within groups of 16: the even rows of a group come first, then the odd ones.
    static_assert(kTileColumns == 16, "a tile is a group of the shuffle");
    constexpr int kHalf = kTileColumns / 2;
    for (int n = 0; n < kTileColumns; ++n)
      column[n] = int8_t(problem.use_shuffled_weight ? n % kHalf * 2 + n / kHalf : n);
  }

  // First byte of the tile of 128 columns and kTileColumns rows that begins with `row`.
  const uint8_t* Tile(int64_t row, int64_t k_block) const { return codes + row * row_stride + k_block * k_stride; }
  float Scale(int64_t row, int64_t k_block) const { return scales[row / kScaleBlock * k_blocks + k_block]; }
};

}  // namespace jax_moe::cpu
