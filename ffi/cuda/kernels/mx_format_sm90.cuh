// MxFp8 where experts have many rows: wgmma of bf16 with all scales folded in, so that nothing is left to do for a sum
// but to add. Tokens come as values (mx_values.cuh), written once by whoever quantised them; weights come in float8,
// and each warp makes bf16 of its rows in registers. Half the rate of float8 wgmmas, but no operation a sum and 32 of
// K.
#pragma once
#include "mx_weight_scales.cuh"
#include "wgmma_sm90.cuh"

namespace jax_moe::cuda {

// As DeepSeekFormatOf.
struct MxFormat {
  using Scales = MxWeightScales;
  static constexpr bool kMx = true, kPairs = false, kOneLoop = false, kWide = false;
  static constexpr int kStages = 3, kInFlight = 2;
  static constexpr int kMaxTokens = kBlockM + kMostTailRows, kNarrowTokens = kBlockM, kTokenPlanes = 2;
  static constexpr int kFewestTokens = 16;
  struct Factors {};
  static constexpr int kMostWords = 2;  // there is no room for more
  using Landing = MxLanding<kMostWords>;
  using Stage = StageOf<StageOperands<kMaxTokens, kTokenPlanes>, Factors, Landing>;
  static_assert(kStages <= kMostWords + 1, "no word is overwritten that may still be read");

  // As DeepSeekFormat's.
  template <int kThreads>
  class Feed {
   public:
    DEVICE Feed(const MxWeightScales& scales, const GemmShape& shape, int thread) : weights_(scales, shape, thread) {}
    template <class Source>
    DEVICE void look(const Tile&, const Source&) {}
    DEVICE void begin(const Tile& tile) { weights_.begin(tile); }
    DEVICE void ask(const Stage& stage, int) { weights_.ask(stage.landing, stage.block); }
    DEVICE void finish(const Stage&) const {}

   private:
    MxWeightWords<kMostWords> weights_;
  };

  // sums += this warpgroup's 64 rows of each half times kTokens tokens.
  template <int kTokens, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const NarrowRows& rows, const WarpgroupContext& wg,
                                     float (&sums)[2][64], const Release& release) {
    multiply<kTokens>(stage, rows, wg, sums, nullptr, release);
  }
  // The same of kBlockM tokens, tail += those times the kMostTailRows behind them.
  template <int kSums, class Release>
  static DEVICE void multiply_tailed(const Stage& stage, const NarrowRows& rows, const WarpgroupContext& wg,
                                     float (&sums)[2][64], float (&tail)[2][kSums], const Release& release) {
    multiply<kBlockM>(stage, rows, wg, sums, tail, release);
  }

 private:
  static constexpr uint32_t kMostNearByte = 134;  // of a scale, 2^7: 2^120 times that is the largest factor in bf16

  // The weight rows of a warp: 16 of each half.
  struct Rows {
    uint64_t tokens;         // beside which they are multiplied
    uint32_t codes, piece;   // this lane's row of 128 bytes, and where in it its first 16 are
    uint32_t words[2][2];    // of scales: of a half and this thread's rows fragment_row() and + 8
    uint32_t factors[2][2];  // made of them: bytes, the exponents of fold()'s

    DEVICE Rows(const Stage& stage, const NarrowRows& narrow, const WarpgroupContext& wg)
        : tokens(wgmma_descriptor(smem_address(stage.operands.tokens))),
          codes(narrow.address + (wg.warp() * 16 + wg.lane() % 16) * kBlockK),
          piece((wg.lane() / 16 ^ wg.lane() % 8) << 4) {
      const auto of_block = words_of(stage);
      const int row = wg.index * kWarpgroupRows + wg.fragment_row();
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i / 2][i % 2] = of_block.of_row(row + i / 2 * kHalfRows + i % 2 * 8);
    }
    template <bool kFar>
    DEVICE void make_factors() {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i / 2][i % 2];
        uint32_t near = kFar ? 0 : word;
#pragma unroll
        for (int s = 0; kFar && s < kMxScales; ++s) near |= min(word >> 8 * s & 255, kMostNearByte) << 8 * s;
        factors[i / 2][i % 2] = near + 120 * 0x01010101;
      }
    }
    // Steps `step` (even) and `step` + 1, of 16 of K each, of a half: of each of this thread's rows four neighbours in
    // either step, in the order of fold().
    DEVICE void load(uint32_t (&loaded)[4], int step, int half) const {
      load_matrix_x4(loaded, codes + half * (kHalfRows * kBlockK) + (piece ^ step / 2 << 5));
    }
    // A step of what was loaded as bf16 code * scale: a fragment. A code's bits in the place of bf16's say 2^-120 of
    // it, subnormals included: a factor of 2^120 * scale, if that is a bf16, makes up for it, exactly.
    template <bool kFar>
    DEVICE void fold(uint32_t (&values)[4], const uint32_t (&loaded)[4], int step, int half) const {
      const int s = step / 2;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        // Two of it, each byte where bf16 has its exponent.
        const uint32_t factor = permute_bytes(factors[half][v], s << 12 | 4 << 8 | s << 4 | 4) >> 1;
        const uint32_t four = loaded[step % 2 * 2 + v];
        values[v] = multiply_bf16x2(widen(four, 0x9180), factor);
        values[v + 2] = multiply_bf16x2(widen(four, 0xB3A2), factor);
        if (kFar) {
          const uint32_t rest = rest_of_scale(s, half, v);
          values[v] = multiply_bf16x2(values[v], rest);
          values[v + 2] = multiply_bf16x2(values[v + 2], rest);
        }
        // Of a row with a NaN in either step, one in the place of two values is enough.
        const bool nan = ((nan_bits(loaded[v]) | nan_bits(loaded[v + 2])) & 0x80808080) != 0;
        if (step % 2 == 0) values[v] = nan ? 0x7FC07FC0 : values[v];
      }
    }
    // sums += a step of a half's rows times the tokens, once it is there; `tail` likewise, unless it is nullptr.
    template <int kTokens, class Tail>
    DEVICE void start(float (&sums)[2][64], Tail& tail, const uint32_t (&values)[4], int step, int half) const {
      const uint64_t at = tokens + step % 4 * 2 + step / 4 * (kMaxTokens * kBlockK / 16);
      wgmma_fence();
      wgmma_m64k16_bf16<kTokens>(sums[half], values, at);
      if constexpr (!std::is_null_pointer_v<Tail>)
        wgmma_m64k16_bf16<kMostTailRows>(tail[half], values, at + kBlockM * kBlockK / 16);
      wgmma_commit();
    }

   private:
    // Two codes, each with its sign in the eight bits above, moved to bf16's sign, low exponent and high mantissa.
    static DEVICE uint32_t widen(uint32_t four, uint32_t which) { return permute_bytes(four, which) << 4 & 0x87F087F0; }
    // The high bit of a byte: that code is NaN.
    static DEVICE uint32_t nan_bits(uint32_t four) { return (four & 0x7F7F7F7F) + 0x01010101; }
    // What the factor leaves of a scale, 1 or more or NaN, as a pair.
    DEVICE uint32_t rest_of_scale(int s, int half, int v) const {
      const uint32_t byte = words[half][v] >> 8 * s & 255;
      const uint32_t rest = byte == kMxScaleNan ? 0x7FC0 : (max(byte, kMostNearByte) - kMostNearByte + 127) << 7;
      return rest * 0x00010001;
    }
  };

  // Halves take turns. While one step is multiplied, the next becomes bf16, and the codes of the one after are on their
  // way: what stands between two wgmmas takes the time of the first, which holds its warp as long as it reads
  // registers.
  template <int kTokens, bool kFar, class Tail>
  static DEVICE void multiply(Rows& rows, float (&sums)[2][64], Tail& tail) {
    rows.template make_factors<kFar>();
    uint32_t codes[2][4], values[3][4];
    rows.load(codes[0], 0, 0);
#pragma unroll
    for (int i = 0; i < 4 * kMxScales; ++i) {
      const int step = i / 2, half = i % 2;
      if (i % 4 == 0) rows.load(codes[1], step, 1);
      if (i % 4 == 3 && step + 1 < 2 * kMxScales) rows.load(codes[0], step + 1, 0);
      rows.template fold<kFar>(values[i % 3], codes[half], step, half);
      wgmma_wait<1>();  // of three fragments two may be in use
      rows.template start<kTokens>(sums, tail, values[i % 3], step, half);
    }
    wgmma_wait();
  }
  template <int kTokens, class Tail, class Release>
  static DEVICE void multiply(const Stage& stage, const NarrowRows& narrow, const WarpgroupContext& wg,
                              float (&sums)[2][64], Tail&& tail, const Release& release) {
    Rows rows(stage, narrow, wg);
    if (__builtin_expect(words_of(stage).template any_above<kMostNearByte>(wg), 0))
      multiply<kTokens, true>(rows, sums, tail);
    else
      multiply<kTokens, false>(rows, sums, tail);
    release();
  }
};

}  // namespace jax_moe::cuda
