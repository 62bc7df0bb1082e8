// The E8M0 scales of MxFp8 weights, 1x32 or 32x32, as they lie in memory, and how producer threads bring those of a
// tile: a word of four for each of its 256 rows and 128 of K, those of up to four K blocks by one request. One by one
// they would bring the 32 bytes around each from L2 again and again: rows of 256 have no room in L1.
#pragma once
#include "mx_scale.cuh"
#include "token_scales.cuh"

namespace jax_moe::cuda {

// Where the scales of weights, [L * rows, K/32] or one for 32 rows, lie in memory: how many words from those of a row
// and 128 of K to others. NOTE: numbers, not the name of an order: to find the words of a tile is a few instructions
// then, for which nobody waits. 2^32 words are the scales of 512 GiB of weights.
struct MxWeightScales {
  const uint32_t* words;
  uint32_t to_expert, to_128_rows, to_k_block;  // the next
  uint32_t to_row[7];                           // of 128: the one 1, 2, 4, ..., 64 rows on
  int words_per_request;                        // of as many K blocks: divides those of every tile; 1 unless neighbours
  bool zipped;  // as the weights come: of every 16 rows the even ones, then the odd ones

  // Of the 128 rows of an expert that begin at `row`, a multiple of 128, the word of the first and of the first 128 of
  // K.
  DEVICE uint32_t of_rows(int expert, int row) const {
    return uint32_t(expert) * to_expert + uint32_t(row / 128) * to_128_rows;
  }
  // From there on, that of the row that lands as row r.
  DEVICE uint32_t in_rows(int r) const {
    const int row = zipped ? r / 16 * 16 + r % 8 * 2 + r / 8 % 2 : r;
    uint32_t sum = 0;
#pragma unroll
    for (int bit = 0; bit < 7; ++bit) sum += (row >> bit & 1) * to_row[bit];
    return sum;
  }
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

// What one of the first kThreads producer threads asks for: of either half of a tile its row and the one 64 rows on.
template <int kMostWords>
class MxWeightWords {
 public:
  static constexpr int kThreads = kHalfRows / 2;

  DEVICE MxWeightWords(const MxWeightScales& scales, const GemmShape& shape, int thread)
      : scales_(scales), shape_(shape), thread_(thread), in_half_(scales.in_rows(thread % kThreads)) {}

  DEVICE void begin(const Tile& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      at_[half] = scales_.of_rows(tile.expert(), b_row(shape_, tile, half)) + in_half_;
  }
  // The words of that K block, the next; with those of some after it, if they have not come with one before.
  DEVICE void ask(const MxLanding<kMostWords>& landing, uint32_t block) {
    const uint32_t count = scales_.words_per_request;
    if (thread_ >= kThreads || block % count != 0) return;
    const uint32_t to = landing.of_block(block);
    if (kMostWords >= 4 && count == 4)
      request<4>(to);
    else if (count == 2)
      request<2>(to);
    else
      request<1>(to);
  }

 private:
  static constexpr int kStride = MxLanding<kMostWords>::kStride;

  template <int kWords>
  DEVICE void request(uint32_t to) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* from = scales_.words + at_[half];
      const uint32_t row = to + (half * kHalfRows + thread_) * kStride;
      cp_async_words<kWords>(row, from);
      cp_async_words<kWords>(row + kThreads * kStride, from + scales_.to_row[6]);
      at_[half] += scales_.to_k_block * kWords;
    }
  }

  const MxWeightScales& scales_;
  const GemmShape& shape_;
  int thread_;
  uint32_t in_half_, at_[2];
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
