// The E8M0 scales of MxFp8 weights, 1x32 or 32x32, as they lie in memory, and how producer threads bring those of a
// tile: a word of four for each of its 256 rows and 128 of K, those of up to four K blocks by one request. One by one
// they would bring the 32 bytes around each from L2 again and again: rows of 256 have no room in L1.
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
  int words_per_request;  // of as many K blocks: divides those of every tile; 1 unless they are neighbours
  bool zipped;            // as the weights come: of every 16 rows the even ones, then the odd ones

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
  // The row of a half that lands as its row r.
  DEVICE int row_of(int r) const { return zipped ? r / 16 * 16 + r % 8 * 2 + r / 8 % 2 : r; }
  DEVICE uint32_t step() const { return order == MxScaleOrder::kInterleaved ? 128 : 1; }
};

// Where requests for up to kMostWords K blocks at a time land. K blocks are numbered on from tile to tile: the word of
// row r and number n is at [n / kMostWords % 2][r][n % kMostWords]. NOTE: what a request overwrites, kMostWords to
// 2 * kMostWords blocks back, has been read, as long as a ring is not longer than kMostWords + 1 stages.
template <int kMostWords>
struct alignas(16) MxLanding {
  uint32_t words[2][2 * kHalfRows][kMostWords];

  // The words of a K block, a row of its words from the next.
  static constexpr int kStride = kMostWords * 4;
  DEVICE uint32_t of_block(uint32_t block) const {
    return smem_address(&words[block / kMostWords % 2][0][block % kMostWords]);
  }
};

// Of one of kThreads producer threads: the rows of a tile that it asks for.
template <int kThreads, int kMostWords>
class MxWeightWords {
 public:
  DEVICE MxWeightWords(const MxWeightScales& scales, const GemmShape& shape, int thread)
      : scales_(scales), shape_(shape), thread_(thread) {}

  DEVICE void begin(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      int row = min(thread_ + i * kThreads, kCount - 1);
      hide(row);  // what follows from it is not for the loop over tiles to carry
      at_[i] =
          scales_.first(shape_, tile.expert(), b_row(shape_, tile, row / kHalfRows) + scales_.row_of(row % kHalfRows));
    }
  }
  // The words of that K block, the next; with those of some after it, if they have not come with one before.
  DEVICE void ask(const MxLanding<kMostWords>& landing, uint32_t block) {
    const uint32_t count = scales_.words_per_request;
    if (block % count != 0) return;
    const uint32_t to = landing.of_block(block);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int row = thread_ + i * kThreads;
      if (row < kCount)
        cp_async_words<kMostWords>(to + row * MxLanding<kMostWords>::kStride, scales_.words + at_[i], count);
      at_[i] += scales_.step() * count;
    }
  }
  // Calls use(row) for those that this thread asks for.
  template <class Use>
  DEVICE void for_each(const Use& use) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      if (const int row = thread_ + i * kThreads; row < kCount) use(row);
  }

 private:
  static constexpr int kCount = 2 * kHalfRows, kMine = (kCount + kThreads - 1) / kThreads;

  const MxWeightScales& scales_;
  const GemmShape& shape_;
  int thread_;
  uint32_t at_[kMine];
};

// The words of a K block.
template <int kStride>
struct MxWordsOfBlock {
  uint32_t base;

  DEVICE uint32_t of_row(int row) const { return load_shared_u32(base + row * kStride); }
  // Whether a scale of a warpgroup's rows, of either half, is above a byte. NOTE: of all, since its warps multiply
  // together.
  template <uint32_t kByte>
  DEVICE bool any_above(const WarpgroupContext& wg) const {
    uint32_t above = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      above |=
          bytes_above<kByte>(of_row(wg.lane() / 16 * kHalfRows + wg.index * kWarpgroupRows + i * 16 + wg.lane() % 16));
    return __any_sync(~0u, above != 0);
  }
};

template <class Operands, class Factors, int kMostWords>
DEVICE MxWordsOfBlock<MxLanding<kMostWords>::kStride> words_of(
    const StageOf<Operands, Factors, MxLanding<kMostWords>>& stage) {
  return {stage.landing.of_block(stage.block)};
}

}  // namespace jax_moe::cuda
