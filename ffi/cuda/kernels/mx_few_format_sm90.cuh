// MxFp8 where experts have few rows: one wgmma of float8 a half and 32 of K, then its sums under their scales.
#pragma once
#include "mx_sums.cuh"
#include "mx_weight_scales.cuh"
#include "wgmma_sm90.cuh"

namespace jax_moe::cuda {

struct MxScales {
  TokenScales tokens;  // words
  MxWeightScales weights;
};

// As DeepSeekFormatOf.
template <bool kInPairs>
struct MxFewFormatOf {
  using Scales = MxScales;
  static constexpr bool kMx = true, kPairs = kInPairs, kOneLoop = true, kWide = false;
  static constexpr int kStages = 5, kInFlight = 4;
  static constexpr int kMaxTokens = kFewRows, kNarrowTokens = kMaxTokens, kTokenPlanes = 1, kFewestTokens = 8;
  struct alignas(16) Factors {
    float factor[kMxScales][kMaxTokens];  // halves of a token's scales; made of the words that come to the first
  };
  static constexpr int kMostWords = 4;
  using Landing = MxLanding<kMostWords>;
  using Stage = StageOf<StageOperands<kMaxTokens, kTokenPlanes>, Factors, Landing>;
  static_assert(kStages <= kMostWords + 1, "no word is overwritten that may still be read");

  // As DeepSeekFormat's; when words have landed, it makes floats of those of tokens.
  template <int kThreads>
  class Feed {
   public:
    DEVICE Feed(const MxScales& scales, const GemmShape& shape, int thread)
        : tokens_(scales.tokens, (thread + kThreads - kWordThreads) % kThreads),
          weights_(scales.weights, shape, thread) {}
    template <class Source>
    DEVICE void look(const Tile& tile, const Source& source) {
      tokens_.look(tile, source);
    }
    DEVICE void begin(const Tile& tile) {
      tokens_.begin();
      weights_.begin(tile);
    }
    DEVICE void ask(const Stage& stage, int k) {
      weights_.ask(stage.landing, stage.block);
      tokens_.for_each(
          k, [&](int token, const float* from) { cp_async_4(smem_address(&stage.factors.factor[0][token]), from); });
    }
    DEVICE void finish(const Stage& stage) const {
      tokens_.for_each(0, [&](int token, const float*) {
        const uint32_t word = __float_as_uint(stage.factors.factor[0][token]);
#pragma unroll
        for (int s = 0; s < kMxScales; ++s) stage.factors.factor[s][token] = mx_token_factor(word >> 8 * s & 255);
      });
    }

   private:
    static constexpr int kWordThreads = MxWeightWords<kMostWords>::kThreads;  // the others begin with tokens
    TokenScaleReader<kMaxTokens, kThreads> tokens_;
    MxWeightWords<kMostWords> weights_;
  };

  // sums += this warpgroup's 64 rows of each half times kTokens tokens: all wgmmas of a stage together.
  template <int kTokens, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const NarrowRows& rows, const WarpgroupContext& wg,
                                     float (&sums)[2][64], const Release& release) {
    const uint64_t tokens = wgmma_descriptor(smem_address(stage.operands.tokens));
    const uint64_t weights = wgmma_descriptor(rows.address, rows.group_stride);
    float acc[kMxScales * 2][kTokens / 2];
#pragma unroll
    for (int i = 0; i < kMxScales * 2; ++i) register_fence(acc[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kMxScales * 2; ++i)
      wgmma_m64k32_e4m3(acc[i], weights + i / 2 * 2 + i % 2 * (kHalfRows * kBlockK / 16), tokens + i / 2 * 2, 0);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < kMxScales * 2; ++i) register_fence(acc[i]);
    // The rest in their shadow.
    StageScales<kTokens> scales(stage, wg);
    const bool far = scales.any_far();
    wgmma_wait();  // NOTE: before the warps part: PTX wants all four to wait at one instruction
    release();     // before what takes longest, which needs the stage no more
    if (__builtin_expect(far, 0))
      add<true>(acc, scales, sums);
    else
      add<false>(acc, scales, sums);
  }

 private:
  // What a thread needs of a stage.
  template <int kTokens>
  struct StageScales {
    uint32_t word[2][2];                    // of a half and this thread's row v
    float2 tokens[kMxScales][kTokens / 8];  // halves of scales

    DEVICE StageScales(const Stage& stage, const WarpgroupContext& wg) {
      const auto words = words_of(stage);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word[i / 2][i % 2] =
            words.of_row(i / 2 * kHalfRows + wg.index * kWarpgroupRows + wg.fragment_row() + i % 2 * 8);
#pragma unroll
      for (int i = 0; i < kMxScales * (kTokens / 8); ++i)
        tokens[i % kMxScales][i / kMxScales] =
            load_shared_f32x2(smem_address(&stage.factors.factor[i % kMxScales][i / kMxScales * 8 + 2 * wg.quad()]));
    }
    // Of the warp's rows.
    DEVICE bool any_far() const {
      uint32_t above = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) above |= far_scales(word[i / 2][i % 2]);
      return __any_sync(~0u, above != 0);
    }
  };

  // sums += acc * scale of the row * scale of the token.
  template <bool kFar, int kTokens>
  static DEVICE void add(float (&acc)[kMxScales * 2][kTokens / 2], const StageScales<kTokens>& scales,
                         float (&sums)[2][64]) {
#pragma unroll
    for (int i = 0; i < kMxScales * 2; ++i) {
      const int s = i / 2, half = i % 2;
      register_fence(acc[i]);
#pragma unroll
      for (int j = 0; j < kTokens / 2; ++j) {
        const float2 two = scales.tokens[s][j / 4];
        sums[half][j] =
            add_scaled<kFar>(sums[half][j], acc[i][j], scales.word[half][j / 2 % 2], s, j % 2 == 0 ? two.x : two.y);
      }
    }
  }
};

using MxFewFormat = MxFewFormatOf<false>;
using MxFewPairsFormat = MxFewFormatOf<true>;

}  // namespace jax_moe::cuda
