// Permute: bf16 tokens to e4m3 with 1x128 scales, and the scales of every permuted row in the [H/128, rows] order that
// GEMM1's TMA reads. The token rows themselves are not copied: GEMM1 gathers them.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kQuantizeBlocksPerCta = kQuantizeThreads / 16;  // 16 threads a block of 128 elements
inline constexpr int kPermuteThreads = 128;                          // one permuted row a thread
inline constexpr int kPermuteBlocksPerCta = 8;                       // scale blocks a thread

// x [num_blocks * 128] bf16 -> codes [num_blocks * 128] e4m3, scales [num_blocks].
__global__ void quantize_activations(const uint16_t* x, uint8_t* codes, float* scales, int64_t num_blocks);

struct PermuteScalesParameters {
  const float* scales;  // element (block, token) at block * block_stride + token * token_stride
  int64_t block_stride, token_stride;
  const int32_t* permuted_idx_to_token;  // [rows]
  const int32_t* num_rows;               // on the device
  int num_blocks;                        // H / 128
  float* permuted_scales;                // [H/128, scale_stride]
  int64_t scale_stride;
};
// Grid: ceil(most rows / kPermuteThreads) * ceil(num_blocks / kPermuteBlocksPerCta) CTAs, blocks fastest.
__global__ void permute_scales(const __grid_constant__ PermuteScalesParameters p);

}  // namespace jax_moe::cuda
