// MxFp8 in the grouped GEMMs: E8M0 scales, 1x32 on tokens, 1x32 or 32x32 on weights. One wgmma a half and 32 of K, then
// sums += acc * scale of the weight row * scale of the token, all exact but the last addition. Two operations of float32
// for each sum and 32 of K take twice the time of the wgmmas: the ALUs decide, not the memory.
#pragma once
#include "mx_scale.cuh"
#include "token_scales.cuh"
#include "warpgroup.cuh"
#include "wgmma_sm90.cuh"

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

struct MxScales {
  TokenScales tokens;  // words
  MxWeightScales weights;
};

struct MxFormat {
  using Scales = MxScales;
  static constexpr int kStages = 4, kInFlight = 2;
  static constexpr int kArrivalsOfScales = 2;  // of a thread that feeds scales beside TMA: for tokens', for weights'
  struct Stage {
    uint8_t tokens[kBlockM * kBlockK];
    uint8_t weights[2][kHalfRows * kBlockK];
    uint32_t weight_words[2 * kHalfRows];  // of four scales
    float factor[kMxScales][kBlockM];      // of a token
  };

  template <int kThreads>
  class Feed {
   public:
    DEVICE Feed(const MxScales& scales, const GemmShape& shape, int thread)
        : tokens_(scales.tokens, thread), weights_(scales.weights), shape_(shape), thread_(thread) {}
    template <class Source>
    DEVICE void begin(const Tile& tile, const Source& source) {
      tokens_.begin(tile, shape_.k_blocks, source);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = min(thread_ + i * kThreads, 2 * kHalfRows - 1);
        at_[i] = weights_.first(shape_, tile.expert, b_row(shape_, tile, row / kHalfRows) + row % kHalfRows);
      }
    }
    // NOTE: the weights' scales by cp.async, which the caller commits or lets arrive.
    DEVICE void put(Stage& stage, int k) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = thread_ + i * kThreads;
        if (row < 2 * kHalfRows) cp_async_4(smem_address(&stage.weight_words[row]), weights_.words + at_[i]);
        at_[i] += weights_.step();
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const uint32_t word = __float_as_uint(tokens_.take(i, k, shape_.k_blocks));
        if (tokens_.token(i) >= kBlockM) break;
#pragma unroll
        for (int s = 0; s < kMxScales; ++s) stage.factor[s][tokens_.token(i)] = mx_scale(word, s);
      }
    }
    static DEVICE void arrive(uint32_t full) {
      cp_async_arrive(full);
      mbarrier_arrive(full);
    }

   private:
    static constexpr int kTokens = (kBlockM + kThreads - 1) / kThreads;
    static constexpr int kRows = (2 * kHalfRows + kThreads - 1) / kThreads;
    TokenScaleReader<kTokens, kThreads> tokens_;
    const MxWeightScales& weights_;
    const GemmShape& shape_;
    int thread_;
    uint32_t at_[kRows];
  };

  template <int kTokens>
  static DEVICE void multiply(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][64]) {
    uint64_t tokens = wgmma_descriptor(smem_address(stage.tokens));
    uint64_t weights = wgmma_descriptor(smem_address(stage.weights[0]) + wg.index * kWarpgroupRows * kBlockK);
    const int row = wg.index * kWarpgroupRows + 16 * wg.warp() + wg.fragment_row();
    uint32_t word[2][2];  // of a half and this thread's row v
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int v = 0; v < 2; ++v)
        word[half][v] = load_shared_u32(smem_address(&stage.weight_words[half * kHalfRows + row + 8 * v]));
    }
    uint32_t factors = smem_address(&stage.factor[0][2 * wg.quad()]);
    float acc[kTokens / 2];
#pragma unroll 1
    for (int s = 0; s < kMxScales; ++s, tokens += 2, weights += 2, factors += kBlockM * 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        register_fence(acc);
        wgmma_fence();
        wgmma_m64k32_e4m3(acc, weights + half * (kHalfRows * kBlockK / 16), tokens, 0);
        wgmma_commit();
        register_fence(acc);
        const float scale[2] = {mx_scale(word[half][0], 0), mx_scale(word[half][1], 0)};
        word[half][0] >>= 8, word[half][1] >>= 8;
        wgmma_wait();
        register_fence(acc);
        if (scale[0] > kFarScale || scale[1] > kFarScale)
          promote<true>(acc, scale, factors, sums[half]);
        else
          promote<false>(acc, scale, factors, sums[half]);
      }
    }
  }

 private:
  // Of 32 products e4m3 each, acc is below 2^23 and a multiple of 2^-18: times any scale up to kFarScale it is a
  // float32, exactly. A larger one, of weights that only the tokens' scales bring back, gives kShift to the other side.
  static constexpr float kFarScale = 0x1p104f, kShift = 0x1p40f, kLargest = 0x1p127f;

  template <bool kFar, int kCount>
  static DEVICE void promote(const float (&acc)[kCount], const float (&scale)[2], uint32_t factors, float (&sums)[64]) {
    float row[2], shift[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const bool far = kFar && scale[v] > kFarScale;
      row[v] = far ? scale[v] / kShift : scale[v];
      shift[v] = far ? kShift : 1.f;
    }
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 of_tokens = load_shared_f32x2(factors + 32 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int v = i / 2;
        float token = i % 2 == 0 ? of_tokens.x : of_tokens.y;
        if (kFar) {
          token *= shift[v];
          token = token > kLargest ? kLargest : token;  // infinite: so is the sum, unless acc is 0
        }
        sums[4 * j + i] = __fmaf_rn(acc[4 * j + i] * row[v], token, sums[4 * j + i]);
      }
    }
  }
};
static_assert(sizeof(MxFormat::Stage) % 1024 == 0, "swizzled tiles");

}  // namespace jax_moe::cuda
