// Quantises tokens once each, and copies their scales to permuted order.
#include "fp8.cuh"
#include "permute.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_activations(const uint16_t* x, uint8_t* codes, float* scales, int64_t num_blocks) {
  const int64_t block = int64_t(blockIdx.x) * kQuantizeBlocksPerCta + threadIdx.x / 16;
  const int piece = threadIdx.x % 16;  // 8 elements
  const bool valid = block < num_blocks;
  const uint4 v = valid ? __ldg(reinterpret_cast<const uint4*>(x) + block * 16 + piece) : make_uint4(0, 0, 0, 0);
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fmaxf(fabsf(bf16_lo(pairs[i])), fabsf(bf16_hi(pairs[i]))));
#pragma unroll
  for (int d = 8; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  if (!valid) return;
  // NOTE: IEEE division, so that tokens quantised by the caller (same rule) give the same codes.
  const float scale = block_scale(amax);
  uint2 out;
  out.x = to_e4m3x2(__fdiv_rn(bf16_lo(v.x), scale), __fdiv_rn(bf16_hi(v.x), scale)) |
          uint32_t(to_e4m3x2(__fdiv_rn(bf16_lo(v.y), scale), __fdiv_rn(bf16_hi(v.y), scale))) << 16;
  out.y = to_e4m3x2(__fdiv_rn(bf16_lo(v.z), scale), __fdiv_rn(bf16_hi(v.z), scale)) |
          uint32_t(to_e4m3x2(__fdiv_rn(bf16_lo(v.w), scale), __fdiv_rn(bf16_hi(v.w), scale))) << 16;
  *(reinterpret_cast<uint2*>(codes) + block * 16 + piece) = out;
  if (piece == 0) scales[block] = scale;
}

__global__ void __launch_bounds__(kPermuteThreads) permute_scales(const __grid_constant__ PermuteScalesParameters p) {
  const int groups = (p.num_blocks + kPermuteBlocksPerCta - 1) / kPermuteBlocksPerCta;
  const int64_t row = int64_t(blockIdx.x / groups) * kPermuteThreads + threadIdx.x;
  if (row >= __ldg(p.num_rows)) return;
  const float* from = p.scales + __ldg(p.permuted_idx_to_token + row) * p.token_stride;
  const int first = blockIdx.x % groups * kPermuteBlocksPerCta;
#pragma unroll
  for (int i = 0; i < kPermuteBlocksPerCta; ++i) {
    const int block = first + i;
    if (block < p.num_blocks) p.permuted_scales[block * p.scale_stride + row] = __ldg(from + block * p.block_stride);
  }
}

}  // namespace jax_moe::cuda
