// What the grouped GEMMs are told of their weights and of the tokens' scales, and how producer threads find those of a
// tile.
#pragma once
#include "scheduler.cuh"
#include "warpgroup.cuh"

namespace jax_moe::cuda {

inline constexpr int kBlockK = 128;              // bytes of K a stage: one swizzle row and one scale group
inline constexpr int kGroupBytes = 8 * kBlockK;  // eight rows, after which the swizzle repeats itself

// What wgmma reads of a stage; tokens of more than a byte a value in as many planes of 128 bytes a token. NOTE: apart
// from what else belongs to it, or alignment would cost a KiB a stage.
template <int kMaxTokens, int kPlanes = 1>
struct alignas(1024) StageOperands {
  static constexpr int kTokenPlanes = kPlanes, kPlaneBytes = kMaxTokens * kBlockK;
  uint8_t tokens[kPlanes * kPlaneBytes];
  uint8_t weights[2][kHalfRows * kBlockK];
};

// A stage of the ring: that, and what a Format has of scales, in the stage or where those of several land together.
template <class Operands, class Factors, class Landing>
struct StageOf {
  Operands& operands;
  Factors& factors;
  Landing& landing;
  uint32_t block;  // K blocks, numbered on from tile to tile
};

// A warpgroup's 64 rows of the first half of a tile beside one K block: from that shared address on, so many bytes from
// eight rows to the next. Those of the second half are kHalfRows * kBlockK bytes behind.
struct NarrowRows {
  uint32_t address, group_stride;
};

// The scales of tokens: element (block, row) at block * block_stride + row * row_stride. MxFp8: words of four.
struct TokenScales {
  const float* scale;
  int64_t block_stride, row_stride;
};

// What both GEMMs are told. A tile's two halves are 128 weight rows each, from first_row + column * column_step on and
// half_step rows later. Box (row, k) of an expert begins at element (k * k_columns, expert * expert_stride + k *
// k_stride + row) of the weights: MajorK steps along its rows, BlockMajorK from one [rows, 128] matrix to the next.
// GEMM1's rows come zipped (tensor_map.h) unless they are shuffled in memory: neighbouring columns of the result are
// then in one thread.
struct GemmShape {
  const float* b_scale;  // [L * rows_per_expert / 128, k_blocks]
  int rows_per_expert;   // M or H
  int column_step;       // 128 (gate and up side by side) or 256
  int half_step;         // I or 128
  int first_row;         // of the first column tile
  int k_blocks;          // K / 128
  int expert_stride;     // rows_per_expert, or k_blocks times that
  int k_stride;          // 0, or rows_per_expert
  int k_columns;         // 128, or 0
};

// The stages of a Format's narrow tiles may come in pairs: of two K blocks the first stage has the first warpgroup's
// rows, the second the other's, so that 256 neighbouring bytes of a row are asked for together. Tokens and scales come
// with their own block; where there is no second one, the second stage has weights only.
template <class Format>
DEVICE bool in_pairs(const Tile& tile) {
  constexpr bool kAllNarrow = Format::kNarrowTokens == Format::kMaxTokens;
  return Format::kPairs && (kAllNarrow || tile.rows() <= Format::kNarrowTokens);
}
DEVICE int stages_of_pairs(int k_blocks) { return (k_blocks + 1) / 2 * 2; }
template <class Format>
DEVICE int stages_of(const GemmShape& shape, const Tile& tile) {
  return in_pairs<Format>(tile) ? stages_of_pairs(shape.k_blocks) : shape.k_blocks;
}

// First weight row of a half, in its expert. NOTE: the second half of the last tile is outside the expert when
// rows_per_expert is an odd multiple of 128; it repeats the first half and its sums are not stored.
DEVICE int b_row(const GemmShape& shape, const Tile& tile, int half) {
  const int first = shape.first_row + tile.column * shape.column_step, row = first + half * shape.half_step;
  return row < shape.rows_per_expert ? row : first;
}

// Where the scales of some of a tile's tokens are, kThreads apart, those of one of kThreads producer threads.
template <int kTokens, int kThreads>
class TokenScaleReader {
 public:
  DEVICE TokenScaleReader(const TokenScales& scales, int thread) : scales_(scales), thread_(thread) {}

  // Both for each tile, the first, which may have to ask memory, early. source(token) is a token's row.
  template <class Source>
  DEVICE void look(const Tile& tile, const Source& source) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) row_[i] = source(min(thread_ + i * kThreads, tile.rows() - 1));
  }
  DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      hide(row_[i]);  // else the first would wait for it
      at_[i] = scales_.scale + row_[i] * scales_.row_stride;
    }
  }
  // Calls use(token, its scale of block k).
  template <class Use>
  DEVICE void for_each(int k, const Use& use) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int token = thread_ + i * kThreads;
      if (token < kTokens) use(token, at_[i] + k * scales_.block_stride);
    }
  }

 private:
  static constexpr int kCount = (kTokens + kThreads - 1) / kThreads;
  const TokenScales& scales_;
  int row_[kCount];
  const float* at_[kCount];
  int thread_;
};

}  // namespace jax_moe::cuda
