// The call's bf16 tokens to e4m3 with 1x128 scales, once each. CTAs of the first route kernel that the routing has no
// use for do it on the side.
#pragma once
#include "fp8.cuh"

namespace jax_moe::cuda {

struct QuantizeTokens {
  const uint16_t* x;   // bf16 [T, H]
  uint8_t* codes;      // e4m3 [T, H]
  float* scales;       // [T, scale_pitch]
  int64_t num_blocks;  // T * k_blocks
  int k_blocks;        // H / 128
  int scale_pitch;     // at least k_blocks

  // By all threads of `ctas` CTAs, of which this is number `cta`. 16 lanes a block.
  DEVICE void run(int cta, int ctas) const {
    constexpr int kInFlight = 4;
    const int64_t step = int64_t(ctas) * blockDim.x / 16;
    // Blocks of a warp's first half: whole warps stay together.
    for (int64_t base = (int64_t(cta) * blockDim.x + threadIdx.x) / 32 * 2; base < num_blocks;
         base += kInFlight * step) {
      const int64_t first = base + threadIdx.x % 32 / 16;
      const int piece = threadIdx.x % 16;  // 8 elements
      uint4 v[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t block = first + i * step;
        v[i] = block < num_blocks ? __ldcg(reinterpret_cast<const uint4*>(x) + block * 16 + piece)
                                  : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (base + i * step >= num_blocks) break;
        const int64_t block = first + i * step;
        float scale;
        const uint2 out = quantize_bf16(v[i], scale);
        if (block >= num_blocks) continue;
        *(reinterpret_cast<uint2*>(codes) + block * 16 + piece) = out;
        if (piece == 0) scales[block / k_blocks * scale_pitch + block % k_blocks] = scale;
      }
    }
  }
};

inline constexpr int kQuantizeThreads = 256;
__global__ void quantize_tokens(const __grid_constant__ QuantizeTokens tokens);

}  // namespace jax_moe::cuda
