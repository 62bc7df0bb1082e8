// DeepSeekFp8 in the grouped GEMMs: scales 1x128 on tokens and 128x128 on weights; sums are promoted to float32
// registers every 128 of K.
#pragma once
#include "token_scales.cuh"
#include "warpgroup.cuh"
#include "wgmma_sm90.cuh"

namespace jax_moe::cuda {

// kTileTokens: the most of a tile. kInPairs: see in_pairs(). kInFlight: stages whose tokens and scales are on their way
// at a time; with fewer a stage is told sooner, which wide tiles gain by. kWide: whether tiles of more than
// kNarrowTokens are wide, else narrow ones of kBlockM with a tail. kOneLoop: Multiplier::run() says why.
template <int kTileTokens, int kRingStages, bool kInPairs>
struct DeepSeekFormatOf {
  using Scales = TokenScales;
  static constexpr bool kMx = false, kPairs = kInPairs, kOneLoop = false, kWide = true;
  static constexpr int kTokenPlanes = 1, kFewestTokens = kTileTokens > 32 ? 16 : 8;
  static constexpr int kStages = kRingStages, kInFlight = kTileTokens > kFewRows ? 2 : 3;
  static constexpr int kMaxTokens = kTileTokens;
  struct Factors {
    float token_scale[kMaxTokens];
    float weight_scale[2];  // of a half
  };
  struct Landing {};  // all is in the stage
  using Stage = StageOf<StageOperands<kMaxTokens>, Factors, Landing>;

  // What one of kThreads producer threads does for the scales of a stage: asks for them by cp.async, and when they have
  // landed, nothing.
  template <int kThreads>
  class Feed {
   public:
    DEVICE Feed(const TokenScales& scales, const GemmShape& shape, int thread)
        : tokens_(scales, thread), shape_(shape), thread_(thread) {}
    template <class Source>
    DEVICE void look(const Tile& tile, const Source& source) {
      tokens_.look(tile, source);
    }
    DEVICE void begin(const Tile& tile) {
      tokens_.begin();
      const int row = tile.expert() * shape_.rows_per_expert + b_row(shape_, tile, thread_ % 2);
      weights_ = uint32_t(row / 128) * uint32_t(shape_.k_blocks);
    }
    DEVICE void ask(const Stage& stage, int k) const {
      tokens_.for_each(
          k, [&](int token, const float* from) { cp_async_4(smem_address(&stage.factors.token_scale[token]), from); });
      if (thread_ < 2)
        cp_async_4(smem_address(&stage.factors.weight_scale[thread_]), shape_.b_scale + (weights_ + uint32_t(k)));
    }
    DEVICE void finish(const Stage&) const {}

   private:
    TokenScaleReader<kMaxTokens, kThreads> tokens_;
    const GemmShape& shape_;
    int thread_;
    uint32_t weights_;  // in b_scale, of half thread_ % 2
  };

  // Wide tiles: sums += this warpgroup's 64 tokens times all rows. One accumulator serves the two halves.
  template <class Release>
  static DEVICE void multiply_wide(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][64],
                                   const Release& release) {
    const int first = wg.index * kWarpgroupRows;
    const uint64_t tokens = wgmma_descriptor(smem_address(stage.operands.tokens) + first * kBlockK);
    float acc[64], scale[4];  // two tokens', two halves'
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t weights = wgmma_descriptor(smem_address(stage.operands.weights[half]));
      register_fence(acc);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma_m64k32_e4m3(acc, tokens + 2 * i, weights + 2 * i, i);
      wgmma_commit();
      register_fence(acc);
      if (half == 0) {  // in the shadow of the wgmmas
        // NOTE: ptxas keeps these loads behind the barrier; without one it waits for them after the first wgmma.
        wg.let_other_begin();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scale[i] = load_shared_f32(smem_address(&stage.factors.token_scale[first + wg.fragment_row() + i * 8]));
          scale[2 + i] = load_shared_f32(smem_address(&stage.factors.weight_scale[i]));
        }
      }
      wgmma_wait();
      register_fence(acc);
      register_fence(scale);  // else they would be waited for between two wgmmas
      if (half == 1) release();
      const float factor[2] = {scale[0] * scale[2 + half], scale[1] * scale[2 + half]};
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[half][i] += factor[i / 2 % 2] * acc[i];
    }
  }

  // The same, tail += this warpgroup's rows times the tokens behind those.
  template <int kSums, class Release>
  static DEVICE void multiply_tailed(const Stage& stage, const NarrowRows& rows, const WarpgroupContext& wg,
                                     float (&sums)[2][64], float (&tail)[2][kSums], const Release& release) {
    multiply_narrow<kMostTailRows>(stage, rows, wg, tail, [] {}, kBlockM);
    multiply_wide(stage, wg, sums, release);
  }

  // Narrow tiles: sums += this warpgroup's 64 rows of each half times kTokens tokens from `first` on. The second half
  // is multiplied while the first is added.
  static constexpr int kNarrowTokens = kMaxTokens < 64 ? kMaxTokens : 64;
  template <int kTokens, int kSums, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const NarrowRows& rows, const WarpgroupContext& wg,
                                     float (&sums)[2][kSums], const Release& release, int first = 0) {
    const uint64_t tokens = wgmma_descriptor(smem_address(stage.operands.tokens) + first * kBlockK);
    const uint64_t weights = wgmma_descriptor(rows.address, rows.group_stride);
    float acc[2][kTokens / 2];
    register_fence(acc[0]);
    register_fence(acc[1]);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        wgmma_m64k32_e4m3(acc[half], weights + half * (kHalfRows * kBlockK / 16) + 2 * i, tokens + 2 * i, i);
      wgmma_commit();
    }
    register_fence(acc[0]);
    register_fence(acc[1]);
    wgmma_wait<1>();
    add(&stage.factors.token_scale[first], stage.factors.weight_scale[0], wg, acc[0], sums[0]);
    wgmma_wait();
    add(&stage.factors.token_scale[first], stage.factors.weight_scale[1], wg, acc[1], sums[1]);
    release();
  }

 private:
  template <int kCount>
  static DEVICE void add(const float* token_scales, float weight_scale, const WarpgroupContext& wg,
                         float (&acc)[kCount], float* sums) {
    register_fence(acc);
    const uint32_t from = smem_address(token_scales + 2 * wg.quad());
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float2 scale = load_shared_f32x2(from + 8 * i);
      const float x = scale.x * weight_scale, y = scale.y * weight_scale;
      sums[i] += x * acc[i];
      sums[i + 1] += y * acc[i + 1];
      sums[i + 2] += x * acc[i + 2];
      sums[i + 3] += y * acc[i + 3];
    }
  }
};

using DeepSeekFormat = DeepSeekFormatOf<kBlockM + kMostTailRows, 4, false>;
using DeepSeekPairsFormat = DeepSeekFormatOf<kBlockM + kMostTailRows, 4, true>;
using DeepSeekFewFormat = DeepSeekFormatOf<kFewRows, 5, false>;
using DeepSeekFewPairsFormat = DeepSeekFormatOf<kFewRows, 5, true>;

}  // namespace jax_moe::cuda
