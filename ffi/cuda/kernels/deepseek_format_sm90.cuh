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
  static constexpr int kMaxTokens = kBlockM + kMostTailRows;  // of a tile
  struct alignas(1024) Stage {
    uint8_t tokens[kMaxTokens * kBlockK];
    uint8_t weights[2][kHalfRows * kBlockK];
    float factor[2][kMaxTokens];  // of a half and a token: the scales' product
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
        at_[half] = uint32_t(row / 128) * uint32_t(shape_.k_blocks);
        now_[half] = load(half, 0);
        next_[half] = load(half, min(1, shape_.k_blocks - 1));
      }
    }
    DEVICE void put(Stage& stage, int k) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const float scale = tokens_.take(i, k, shape_.k_blocks);
        if (tokens_.token(i) >= kMaxTokens) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) stage.factor[half][tokens_.token(i)] = scale * now_[half];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        now_[half] = next_[half];
        next_[half] = load(half, min(k + 2, shape_.k_blocks - 1));
      }
    }
    // Says, beside TMA, that the stage has its scales.
    static DEVICE void arrive(uint32_t full) { mbarrier_arrive(full); }

   private:
    static constexpr int kTokens = (kMaxTokens + kThreads - 1) / kThreads;
    DEVICE float load(int half, int k) const { return __ldg(shape_.b_scale + (at_[half] + uint32_t(k))); }

    TokenScaleReader<kTokens, kThreads> tokens_;
    const GemmShape& shape_;
    uint32_t at_[2];  // in b_scale; no pointers, for registers' sake
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

  // Narrow tiles: sums += this warpgroup's 64 rows of each half times kTokens tokens from `first` on. The second half is
  // multiplied while the first is added.
  static constexpr int kNarrowTokens = 64;
  template <int kTokens, int kSums, class Release>
  static DEVICE void multiply_narrow(const Stage& stage, const WarpgroupContext& wg, float (&sums)[2][kSums],
                                     const Release& release, int first = 0) {
    const uint64_t tokens = wgmma_descriptor(smem_address(stage.tokens) + first * kBlockK);
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
    add(&stage.factor[0][first], wg, acc[0], sums[0]);
    wgmma_wait();
    add(&stage.factor[1][first], wg, acc[1], sums[1]);
    release();
  }

 private:
  template <int kCount>
  static DEVICE void add(const float* factors, const WarpgroupContext& wg, float (&acc)[kCount], float* sums) {
    register_fence(acc);
    const uint32_t from = smem_address(factors + 2 * wg.quad());
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float2 factor = load_shared_f32x2(from + 8 * i);
      sums[i] += factor.x * acc[i];
      sums[i + 1] += factor.y * acc[i + 1];
      sums[i + 2] += factor.x * acc[i + 2];
      sums[i + 3] += factor.y * acc[i + 3];
    }
  }
};

}  // namespace jax_moe::cuda
