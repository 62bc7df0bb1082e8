// DeepSeekFp8 in the grouped GEMMs: scales 1x128 on tokens and 128x128 on weights. Producer threads multiply the two, so a
// math thread reads one factor a token and half; it promotes its sums to float32 registers every 128 of K.
#pragma once
#include "token_scales.cuh"
#include "warpgroup.cuh"
#include "wgmma_sm90.cuh"

namespace jax_moe::cuda {

// kInFlight: stages that a gathering thread asks for before it waits for the first of them.
struct DeepSeekFormat {
  using Scales = TokenScales;
  static constexpr int kStages = 4, kInFlight = 2;
  static constexpr int kArrivalsOfScales = 1;  // of a thread that feeds scales beside TMA
  struct Stage {
    uint8_t tokens[kBlockM * kBlockK];
    uint8_t weights[2][kHalfRows * kBlockK];
    float factor[2][kBlockM];  // of a half and a token: the scales' product
  };

  template <int kThreads>
  class Feed {
   public:
    DEVICE Feed(const TokenScales& scales, const GemmShape& shape, int thread)
        : tokens_(scales, thread), shape_(shape) {}
    template <class Source>
    DEVICE void begin(const Tile& tile, const Source& source) {
      tokens_.begin(tile, shape_.k_blocks, source);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile.expert * shape_.rows_per_expert + b_row(shape_, tile, half);
        at_[half] = shape_.b_scale + int64_t(row / 128) * shape_.k_blocks;
        now_[half] = __ldg(at_[half]);
        next_[half] = __ldg(at_[half] + min(1, shape_.k_blocks - 1));
      }
    }
    DEVICE void put(Stage& stage, int k) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const float scale = tokens_.take(i, k, shape_.k_blocks);
        if (tokens_.token(i) >= kBlockM) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) stage.factor[half][tokens_.token(i)] = scale * now_[half];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        now_[half] = next_[half];
        next_[half] = __ldg(at_[half] + min(k + 2, shape_.k_blocks - 1));
      }
    }
    // Says, beside TMA, that the stage has its scales.
    static DEVICE void arrive(uint32_t full) { mbarrier_arrive(full); }

   private:
    static constexpr int kTokens = (kBlockM + kThreads - 1) / kThreads;
    TokenScaleReader<kTokens, kThreads> tokens_;
    const GemmShape& shape_;
    const float* at_[2];
    float now_[2], next_[2];
  };

  // Wide tiles: sums += this warpgroup's 64 tokens times all rows. One accumulator serves the two halves.
  template <class Release>
  static DEVICE void multiply_wide(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][64],
                                   const Release& release) {
    const int first = wg.index * kWarpgroupRows;
    const uint64_t tokens = wgmma_descriptor(smem_address(stage.tokens) + first * kBlockK);
    float acc[64], factor[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t weights = wgmma_descriptor(smem_address(stage.weights[half]));
      register_fence(acc);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma_m64k32_e4m3(acc, tokens + 2 * i, weights + 2 * i, i);
      wgmma_commit();
      register_fence(acc);
      if (half == 0) {  // in the shadow of the wgmmas
#pragma unroll
        for (int i = 0; i < 4; ++i)
          factor[i / 2][i % 2] = load_shared_f32(smem_address(&stage.factor[i / 2][first + wg.fragment_row() + i % 2 * 8]));
      }
      wgmma_wait();
      register_fence(acc);
      if (half == 1) release();
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[half][i] += factor[half][i / 2 % 2] * acc[i];
    }
  }

  // Narrow tiles: sums += this warpgroup's 64 rows of each half times kTokens tokens. The second half is multiplied while
  // the first is added.
  static constexpr int kNarrowTokens = 64;
  template <int kTokens, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][64],
                                     const Release& release) {
    const uint64_t tokens = wgmma_descriptor(smem_address(stage.tokens));
    float acc[2][kTokens / 2];
    register_fence(acc[0]);
    register_fence(acc[1]);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t weights =
          wgmma_descriptor(smem_address(stage.weights[half]) + wg.index * kWarpgroupRows * kBlockK);
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma_m64k32_e4m3(acc[half], weights + 2 * i, tokens + 2 * i, i);
      wgmma_commit();
    }
    register_fence(acc[0]);
    register_fence(acc[1]);
    wgmma_wait<1>();
    add<kTokens>(stage, wg, acc[0], 0, sums);
    wgmma_wait();
    add<kTokens>(stage, wg, acc[1], 1, sums);
    release();
  }

 private:
  template <int kTokens>
  static DEVICE void add(const Stage& stage, const WarpgroupContext& wg, float (&acc)[kTokens / 2], int half,
                         float (&sums)[2][64]) {
    register_fence(acc);
    const uint32_t factors = smem_address(&stage.factor[half][2 * wg.quad()]);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 factor = load_shared_f32x2(factors + 32 * j);
      sums[half][4 * j] += factor.x * acc[4 * j];
      sums[half][4 * j + 1] += factor.y * acc[4 * j + 1];
      sums[half][4 * j + 2] += factor.x * acc[4 * j + 2];
      sums[half][4 * j + 3] += factor.y * acc[4 * j + 3];
    }
  }
};

}  // namespace jax_moe::cuda
