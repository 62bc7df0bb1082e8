// The call's bf16 tokens to e4m3 with 1x128 scales, once each. CTAs of the first route kernel that the routing has no
// use for do it on the side.
#pragma once
#include "fp8.cuh"

namespace jax_moe::cuda {

struct QuantizeTokens {
  const uint16_t* x;   // bf16 [num_blocks, 128]; null: nothing to do
  uint8_t* codes;      // e4m3 [num_blocks, 128]
  float* scales;       // [num_blocks]
  int64_t num_blocks;  // T * H / 128

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
        v[i] =
            block < num_blocks ? __ldg(reinterpret_cast<const uint4*>(x) + block * 16 + piece) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (base + i * step >= num_blocks) break;
        const int64_t block = first + i * step;
        float scale;
        const uint2 out = quantize_bf16(v[i], scale);
        if (block >= num_blocks) continue;
        *(reinterpret_cast<uint2*>(codes) + block * 16 + piece) = out;
        if (piece == 0) scales[block] = scale;
      }
    }
  }
};

}  // namespace jax_moe::cuda
