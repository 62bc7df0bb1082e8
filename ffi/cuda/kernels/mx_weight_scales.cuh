// The E8M0 scales of MxFp8 weights, 1x32 or 32x32, as they lie in memory, and how producer threads bring those of a
// tile to a stage: a word of four for each of its 256 rows and 128 of K.
#pragma once
#include "mx_scale.cuh"
#include "token_scales.cuh"

namespace jax_moe::cuda {

// How the scales of weights, [L * rows, K/32] or one for 32 rows, lie in memory.
enum class MxScaleOrder {
  kRows,         // as the rows
  kGrid,         // 32x32, as the rows, which may be shuffled in groups of 32
  kGridByTurns,  // 32x32, up then gate rows, where up and gate rows of the weights take turns
  kInterleaved   // of shuffled rows, 128x4: words of row r and block k at [r / 128][k][r % 32][r % 128 / 32]
};
struct MxWeightScales {
  const uint32_t* words;
  MxScaleOrder order;

  // The word of a row of an expert's weights and the first 128 of K, and how far the next one is. NOTE: 2^32 words are
  // the scales of 512 GiB of weights.
  DEVICE uint32_t first(const GemmShape& shape, int expert, int row) const {
    const uint32_t rows = shape.rows_per_expert, k_blocks = shape.k_blocks, base = uint32_t(expert) * rows, r = row;
    switch (order) {
      case MxScaleOrder::kGrid:
        return (base + r) / 32 * k_blocks;
      case MxScaleOrder::kGridByTurns:  // of 32 rows 16 are up rows, and those in the first of every two eights
        return (base / 32 + r / 64 + r / 8 % 2 * (rows / 64)) * k_blocks;
      case MxScaleOrder::kInterleaved:
        return (base + r) / 128 * k_blocks * 128 + r % 32 * 4 + r % 128 / 32;
      default:
        return (base + r) * k_blocks;
    }
  }
  DEVICE uint32_t step() const { return order == MxScaleOrder::kInterleaved ? 128 : 1; }
};

// Of one of kThreads producer threads: the rows of a tile that it asks for.
template <int kThreads>
class MxWeightWords {
 public:
  static constexpr int kCount = 2 * kHalfRows;
  DEVICE MxWeightWords(const MxWeightScales& scales, const GemmShape& shape, int thread)
      : scales_(scales), shape_(shape), thread_(thread) {}

  DEVICE void begin(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int row = min(thread_ + i * kThreads, kCount - 1);
      hide(row);  // what follows from it is not for the loop over tiles to carry
      at_[i] = scales_.first(shape_, tile.expert(), b_row(shape_, tile, row / kHalfRows) + row % kHalfRows);
    }
  }
  // The words of the next 128 of K.
  DEVICE void ask(uint32_t (&words)[kCount]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = thread_ + i * kThreads;
      if (row < kCount) cp_async_4(smem_address(&words[row]), scales_.words + at_[i]);
      at_[i] += scales_.step();
    }
  }
  // Calls use(row) for those that this thread has asked for.
  template <class Use>
  DEVICE void for_each(const Use& use) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (const int row = thread_ + i * kThreads; row < kCount) use(row);
  }

 private:
  static constexpr int kRows = (kCount + kThreads - 1) / kThreads;
  const MxWeightScales& scales_;
  const GemmShape& shape_;
  int thread_;
  uint32_t at_[kRows];
};

// Whether a scale of a warpgroup's rows, of either half, is above a byte. NOTE: of all, since its warps multiply
// together.
template <uint32_t kByte>
DEVICE bool any_mx_scale_above(const uint32_t* words, const WarpgroupContext& wg) {
  static_assert(kByte >= 128, "found by the high bit and the others");
  const uint4 v =
      load_shared_v4(smem_address(&words[wg.lane() / 16 * kHalfRows + wg.index * kWarpgroupRows + wg.lane() % 16 * 4]));
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) any |= ((word[i] & 0x7F7F7F7F) + (255 - kByte) * 0x01010101) & word[i];
  return __any_sync(~0u, (any & 0x80808080) != 0);
}

}  // namespace jax_moe::cuda
