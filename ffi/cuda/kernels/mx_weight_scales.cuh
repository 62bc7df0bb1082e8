// The E8M0 scales of MxFp8 weights, 1x32 or 32x32, as they lie in memory, and how producer threads bring those of a
// tile: a word of four for each of its 256 rows and 128 of K. Words that are neighbours in memory, of up to four K
// blocks or of four rows, come by one request to shared memory apart from the stages, and go to theirs from there: one
// by one they would bring the 32 bytes around each of them from L2 again and again.
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
  int words_per_request;  // 1, 2 or 4 K blocks of a row, not of kInterleaved: divides those of every tile

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

// Where requests for up to kMostWords K blocks at a time land. K blocks are numbered on from tile to tile: that of
// number n is at [n / kMostWords % 2][row][n % kMostWords]; of kInterleaved at [n % kBlocks][half][row % 32][row / 32].
template <int kMostWords>
struct alignas(16) MxLanding {
  static constexpr int kBlocks = 2 * kMostWords;  // those of a request, and those asked for before and not used yet
  uint32_t words[kBlocks * 2 * kHalfRows];
};

// Of one of kThreads producer threads: the rows of a tile that it asks for.
template <int kThreads, int kMostWords>
class MxWeightWords {
 public:
  DEVICE MxWeightWords(const MxWeightScales& scales, const GemmShape& shape, MxLanding<kMostWords>& landing, int thread)
      : scales_(scales), shape_(shape), landing_(smem_address(&landing)), thread_(thread) {}

  DEVICE void begin(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      int row = interleaved() ? row_of_four(min(thread_, kCount / 4 - 1)) : min(thread_ + i * kThreads, kCount - 1);
      hide(row);  // what follows from it is not for the loop over tiles to carry
      at_[i] = scales_.first(shape_, tile.expert(), b_row(shape_, tile, row / kHalfRows) + row % kHalfRows);
    }
  }
  // The words of that K block, the next; or of some that begin with it, if they have not come with one before.
  DEVICE void ask(uint32_t block) {
    if (interleaved()) {
      if (thread_ < kCount / 4) cp_async_16(place_of_four(block), scales_.words + at_[0]);
      at_[0] += 4 * 32;
      return;
    }
    const uint32_t count = scales_.words_per_request;
    if (block % count != 0) return;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int row = thread_ + i * kThreads;
      if (row < kCount) copy(place(row, block), scales_.words + at_[i], count);
      at_[i] += count;
    }
  }
  // Calls use(row, word) for those of a K block that this thread has asked for, when they have landed.
  template <class Use>
  DEVICE void for_each(uint32_t block, const Use& use) const {
    if (interleaved()) {
      if (thread_ >= kCount / 4) return;
      const uint4 v = load_shared_v4(place_of_four(block));
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) use(row_of_four(thread_) + 32 * i, word[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      if (const int row = thread_ + i * kThreads; row < kCount) use(row, load_shared_u32(place(row, block)));
  }

 private:
  static constexpr int kCount = 2 * kHalfRows, kBlocks = MxLanding<kMostWords>::kBlocks;
  static constexpr int kMine = (kCount + kThreads - 1) / kThreads;
  static_assert(kThreads >= kCount / 4, "a request of four rows each");

  DEVICE bool interleaved() const { return scales_.order == MxScaleOrder::kInterleaved; }
  // The first of four rows, 32 apart.
  static DEVICE int row_of_four(int four) { return four / 32 * kHalfRows + four % 32; }
  DEVICE uint32_t place_of_four(uint32_t block) const {
    return landing_ + (block % kBlocks * (kCount / 4) + thread_) * 16;
  }
  DEVICE uint32_t place(int row, uint32_t block) const {
    return landing_ + ((block / kMostWords % 2 * kCount + row) * kMostWords + block % kMostWords) * 4;
  }
  static DEVICE void copy(uint32_t to, const uint32_t* from, uint32_t count) {
    if (kMostWords >= 4 && count == 4)
      cp_async_16(to, from);
    else if (count == 2)
      cp_async_8(to, from);
    else
      cp_async_4(to, from);
  }

  const MxWeightScales& scales_;
  const GemmShape& shape_;
  uint32_t landing_;
  int thread_;
  uint32_t at_[kMine];
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
