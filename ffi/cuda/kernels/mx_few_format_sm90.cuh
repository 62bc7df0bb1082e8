// MxFp8 where experts have few rows: one wgmma of float8 a half and 32 of K, then
// sums += acc * scale of the weight row * scale of the token, all exact but the last addition. Two operations of
// float32 for each sum and 32 of K: little beside the weights' bytes as long as tokens are few.
#pragma once
#include "mx_weight_scales.cuh"
#include "wgmma_sm90.cuh"

namespace jax_moe::cuda {

struct MxScales {
  TokenScales tokens;  // words
  MxWeightScales weights;
};

// As DeepSeekFormatOf.
struct MxFewFormat {
  using Scales = MxScales;
  static constexpr bool kMx = true;
  static constexpr int kStages = 4, kInFlight = 3;
  static constexpr int kMaxTokens = kFewRows, kNarrowTokens = kMaxTokens, kTokenPlanes = 1, kFewestTokens = 8;
  struct alignas(16) Factors {
    float factor[kMxScales][kMaxTokens];  // of a token; made of the words that come to the first
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
        : tokens_(scales.tokens, thread), weights_(scales.weights, shape, thread) {}
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
        for (int s = 0; s < kMxScales; ++s) stage.factors.factor[s][token] = mx_scale(word, s);
      });
    }

   private:
    TokenScaleReader<kMaxTokens, kThreads> tokens_;
    MxWeightWords<kThreads, kMostWords> weights_;
  };

  // sums += this warpgroup's 64 rows of each half times kTokens tokens: all wgmmas of a stage, then one after the other
  // is added, which costs the least latency a stage.
  template <int kTokens, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][64],
                                     const Release& release) {
    Operands from(stage, wg);
    if (__builtin_expect(words_of(stage).template any_above<kMostNearByte>(wg), 0)) {
      multiply_far<kTokens>(from, sums);
    } else {
      float acc[kMxScales * 2][kTokens / 2];
#pragma unroll
      for (int i = 0; i < kMxScales * 2; ++i) from.start(acc[i], i / 2, i % 2, 0);
      float2 tokens[kMxScales][kTokens / 8];  // their factors, loaded in the shadow of the wgmmas
#pragma unroll
      for (int i = 0; i < kMxScales * (kTokens / 8); ++i)
        tokens[i % kMxScales][i / kMxScales] =
            load_shared_f32x2(from.factors + (i % kMxScales * kMaxTokens + i / kMxScales * 8) * 4);
#pragma unroll
      for (int i = 0; i < kMxScales * 2; ++i) {
        wait_for_one_of(kMxScales * 2 - i);
        promote(acc[i], from.row(i / 2, i % 2), tokens[i / 2], sums[i % 2]);
      }
    }
    release();
  }

 private:
  // Of 32 products e4m3 each, a sum is below 2^23 and a multiple of 2^-18: times any scale up to kFarScale it is a
  // float32, exactly. A larger one, of weights that only the tokens' scales bring back, gives kShift to the other side.
  static constexpr uint32_t kMostNearByte = 231;  // kFarScale's
  static constexpr float kFarScale = 0x1p104f, kShift = 0x1p40f, kLargest = 0x1p127f;

  struct Operands {
    uint64_t tokens, weights;
    uint32_t factors;     // of this thread's tokens
    uint32_t word[2][2];  // of a half and this thread's row v

    DEVICE Operands(const Stage& stage, const WarpgroupContext& wg)
        : tokens(wgmma_descriptor(smem_address(stage.operands.tokens))),
          weights(wgmma_descriptor(smem_address(stage.operands.weights[0]) + wg.index * kWarpgroupRows * kBlockK)),
          factors(smem_address(&stage.factors.factor[0][2 * wg.quad()])) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word[i / 2][i % 2] =
            words_of(stage).of_row(i / 2 * kHalfRows + wg.index * kWarpgroupRows + wg.fragment_row() + i % 2 * 8);
    }
    // The scales of this thread's two rows of a half.
    DEVICE float2 row(int s, int half) const {
      return make_float2(mx_scale(word[half][0], s), mx_scale(word[half][1], s));
    }
    // d = the products of 32 of K, s times 32 further, a half and some tokens from `first` on, once they are there.
    template <int kCount>
    DEVICE void start(float (&d)[kCount], int s, int half, int first) const {
      register_fence(d);
      wgmma_fence();
      wgmma_m64k32_e4m3(d, weights + 2 * s + half * (kHalfRows * kBlockK / 16), tokens + 2 * s + first * (kBlockK / 16),
                        0);
      wgmma_commit();
      register_fence(d);
    }
    // To the next 32 of K.
    DEVICE void advance() {
      tokens += 2, weights += 2, factors += kMaxTokens * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i / 2][i % 2] >>= 8;
    }
  };

  // Until the first of `started` groups, at most kMost, has ended.
  template <int kMost = 2 * kMxScales>
  static DEVICE void wait_for_one_of(int started) {
    if constexpr (kMost > 1) {
      if (started < kMost) return wait_for_one_of<kMost - 1>(started);
    }
    wgmma_wait<kMost - 1>();
  }

  // sums += acc * scale of the row * scale of the token.
  template <int kCount>
  static DEVICE void promote(float (&acc)[kCount], float2 row, const float2 (&tokens)[kCount / 4], float* sums) {
    register_fence(acc);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float2 token = tokens[i / 4];
      sums[i] = __fmaf_rn(acc[i] * row.x, token.x, sums[i]);
      sums[i + 1] = __fmaf_rn(acc[i + 1] * row.x, token.y, sums[i + 1]);
      sums[i + 2] = __fmaf_rn(acc[i + 2] * row.y, token.x, sums[i + 2]);
      sums[i + 3] = __fmaf_rn(acc[i + 3] * row.y, token.y, sums[i + 3]);
    }
  }

  // The same where a row's scale is far.
  template <int kTokens>
  static DEVICE void multiply_far(Operands from, float (&sums)[2][64]) {
    float acc[8];
#pragma unroll 1
    for (int s = 0; s < kMxScales; ++s, from.advance()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 row = from.row(0, half);
#pragma unroll
        for (int first = 0; first < kTokens; first += 16) {
          from.start(acc, 0, half, first);
          wgmma_wait();
          register_fence(acc);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float scale = i / 2 % 2 == 0 ? row.x : row.y;
            const bool shift = scale > kFarScale;
            float token = load_shared_f32(from.factors + (first + i / 4 * 8 + i % 2) * 4) * (shift ? kShift : 1.f);
            token = token > kLargest ? kLargest : token;  // infinite: so is the sum, unless acc is 0
            float& sum = sums[half][first / 2 + i];
            sum = __fmaf_rn(acc[i] * (shift ? scale / kShift : scale), token, sum);
          }
        }
      }
    }
  }
};

}  // namespace jax_moe::cuda
