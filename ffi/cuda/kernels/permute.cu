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
  float scale;
  const uint2 out = quantize_bf16(v, scale);
  if (!valid) return;
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
