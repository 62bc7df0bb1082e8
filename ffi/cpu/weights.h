// Where the rows of a weight matrix [N, K] of one expert and their scales lie in memory, for every layout and
// quantisation. Readers ask for logical rows and columns; nothing is copied.
#pragma once
#include "mx_scale.h"

namespace jax_moe::cpu {

struct WeightMatrix {
  const uint8_t* codes;
  const void* scales;          // float32 [N/128, K/128]; with MxFp8 E8M0 [N / weights_scale_rows, K/32]
  int64_t k_blocks;            // K/128
  int64_t row_stride;          // bytes
  int64_t k_stride;            // bytes from one 128 of K to the next
  int lane_shift;              // the shuffle has 2^lane_shift rows a lane; 0: rows are in order
  int64_t interleaved_half;    // rows of a half, where up and gate rows take turns before they are shuffled; else 0
  int64_t weights_scale_rows;  // rows that share a scale
  bool mx;

  // Matrix `expert` of `codes`, [L, rows, columns] in the problem's layout, and its scales. `gated`: the first half of
  // the rows are up rows, the second their gate rows.
  WeightMatrix(const Problem& problem, const Buffer& all_codes, const Buffer& all_scales, int64_t expert, int64_t rows,
               int64_t columns, bool gated)
      : codes(static_cast<const uint8_t*>(all_codes.data) + expert * rows * columns),
        k_blocks(columns / kScaleBlock),
        row_stride(problem.block_major_k() ? kScaleBlock : columns),
        k_stride(problem.block_major_k() ? rows * kScaleBlock : kScaleBlock),
        lane_shift(!problem.use_shuffled_weight ? 0
                   : problem.mx()               ? 2
                                                : 1),
        interleaved_half(problem.use_shuffled_weight && problem.mx() && gated ? rows / 2 : 0),
        weights_scale_rows(problem.weights_scale_rows),
        mx(problem.mx()) {
    const int64_t scale_bytes = mx ? 1 : sizeof(float);
    scales = static_cast<const uint8_t*>(all_scales.data) +
             expert * (rows / weights_scale_rows) * (columns / problem.scale_block()) * scale_bytes;
  }

  // The row of memory that holds a logical row. The shuffle moves rows inside groups of 8 lanes: with r rows a lane,
  // place n of a group takes row r * (n % 8) + n / 8.
  int64_t MemoryRow(int64_t row) const {
    if (interleaved_half) row = row < interleaved_half ? 2 * row : 2 * (row - interleaved_half) + 1;
    const int64_t in_group = row & ((8 << lane_shift) - 1), in_lane = row & ((1 << lane_shift) - 1);
    return row - in_group + 8 * in_lane + (in_group >> lane_shift);
  }

  // The 128 codes of a logical row.
  const uint8_t* Codes(int64_t row, int64_t k_block) const {
    return codes + MemoryRow(row) * row_stride + k_block * k_stride;
  }

  float Scale(int64_t row, int64_t k_block) const {
    return static_cast<const float*>(scales)[row / kScaleBlock * k_blocks + k_block];
  }

  // MxFp8: the four codes of the scales of a logical row. Those of shuffled rows are shuffled with them and interleaved
  // 128x4; a 32x32 grid is in order whatever the rows are.
  const uint8_t* MxScales(int64_t row, int64_t k_block) const {
    const auto* first = static_cast<const uint8_t*>(scales);
    if (weights_scale_rows > 1) return first + (row / kMxScaleBlock * k_blocks + k_block) * kMxScales;
    if (lane_shift == 0) return first + (row * k_blocks + k_block) * kMxScales;
    const int64_t n = MemoryRow(row);
    return first + (n / 128 * k_blocks + k_block) * 512 + n % 32 * 16 + n % 128 / 32 * 4;
  }
};

}  // namespace jax_moe::cpu
