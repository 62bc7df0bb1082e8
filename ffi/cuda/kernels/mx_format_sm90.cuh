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

  static constexpr int kNarrowTokens = kBlockM;

  // sums += this warpgroup's 64 rows of each half times kTokens tokens, in steps of 32 of K and as many tokens as
  // registers allow. The second half is multiplied while the first is added.
  template <int kTokens, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][64],
                                     const Release& release) {
    Operands from(stage, wg);
    const bool far = __any_sync(~0u, from.far());
    uint32_t factors = smem_address(&stage.factor[0][2 * wg.quad()]);
#pragma unroll 1
    for (int s = 0; s < kMxScales; ++s, factors += kBlockM * 4, from.advance())
      for_parts<kTokens>(std::make_integer_sequence<int, Part<kTokens, 0>::kParts>(), [&](auto part) {
        using At = Part<kTokens, decltype(part)::value>;
        float acc[2][At::count / 2];
        register_fence(acc[0]);
        register_fence(acc[1]);
        wgmma_fence();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          wgmma_m64k32_e4m3(acc[half], from.weights + half * (kHalfRows * kBlockK / 16),
                            from.tokens + At::first * (kBlockK / 16), 0);
          wgmma_commit();
        }
        register_fence(acc[0]);
        register_fence(acc[1]);
        float of_token[At::count / 4];  // in the shadow of the wgmmas
#pragma unroll
        for (int j = 0; j < At::count / 8; ++j) {
          const float2 two = load_shared_f32x2(factors + At::first * 4 + 32 * j);
          of_token[2 * j] = two.x, of_token[2 * j + 1] = two.y;
        }
        wgmma_wait<1>();
        promote(acc[0], from.row(0), of_token, &sums[0][At::first / 2], far);
        wgmma_wait();
        promote(acc[1], from.row(1), of_token, &sums[1][At::first / 2], far);
      });
    release();
  }

 private:
  static constexpr int kStepTokens = 48;
  // Of 32 products e4m3 each, acc is below 2^23 and a multiple of 2^-18: times any scale up to kFarScale it is a
  // float32, exactly. A larger one, of weights that only the tokens' scales bring back, gives kShift to the other side.
  static constexpr float kFarScale = 0x1p104f, kShift = 0x1p40f, kLargest = 0x1p127f;

  // Tokens of a step: `count` from `first` on.
  template <int kTokens, int kPart>
  struct Part {
    static constexpr int kParts = (kTokens + kStepTokens - 1) / kStepTokens, kGroups = kTokens / 8;
    static constexpr int first = kPart * kGroups / kParts * 8, count = (kPart + 1) * kGroups / kParts * 8 - first;
  };
  template <int kTokens, int... kParts, class Use>
  static DEVICE void for_parts(std::integer_sequence<int, kParts...>, const Use& use) {
    (use(std::integral_constant<int, kParts>()), ...);
  }

  struct Operands {
    uint64_t tokens, weights;
    uint32_t word[2][2];  // of a half and this thread's row v

    DEVICE Operands(const Stage& stage, const WarpgroupContext& wg)
        : tokens(wgmma_descriptor(smem_address(stage.tokens))),
          weights(wgmma_descriptor(smem_address(stage.weights[0]) + wg.index * kWarpgroupRows * kBlockK)) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word[i / 2][i % 2] = load_shared_u32(smem_address(
            &stage.weight_words[i / 2 * kHalfRows + wg.index * kWarpgroupRows + wg.fragment_row() + i % 2 * 8]));
    }
    // Whether a scale is above kFarScale.
    DEVICE bool far() const {
      uint32_t any = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t w = word[i / 2][i % 2];
        any |= ((w & 0x7F7F7F7F) + 0x18181818) & w;  // the high bit of bytes from 232 on
      }
      return any & 0x80808080;
    }
    // The scales of this thread's two rows of a half.
    DEVICE float2 row(int half) const { return make_float2(mx_scale(word[half][0], 0), mx_scale(word[half][1], 0)); }
    // To the next 32 of K.
    DEVICE void advance() {
      tokens += 2, weights += 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i / 2][i % 2] >>= 8;
    }
  };

  // sums += acc * row * token.
  template <int kCount>
  static DEVICE void promote(float (&acc)[kCount], float2 row, const float (&of_token)[kCount / 2], float* sums,
                             bool far) {
    register_fence(acc);
    if (__builtin_expect(far, 0)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float scale = i / 2 % 2 == 0 ? row.x : row.y;
        const bool shift = scale > kFarScale;
        float token = of_token[i / 4 * 2 + i % 2] * (shift ? kShift : 1.f);
        token = token > kLargest ? kLargest : token;  // infinite: so is the sum, unless acc is 0
        sums[i] = __fmaf_rn(acc[i] * (shift ? scale / kShift : scale), token, sums[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        sums[i] = __fmaf_rn(acc[i] * (i / 2 % 2 == 0 ? row.x : row.y), of_token[i / 4 * 2 + i % 2], sums[i]);
    }
  }
};
static_assert(sizeof(MxFormat::Stage) % 1024 == 0, "swizzled tiles");

}  // namespace jax_moe::cuda
