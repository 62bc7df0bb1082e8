// Finalize: output[t] = bf16(sum over slots k, in order, of weight[t, k] * y2[row(t, k)]); slots without a row are
// skipped, a token without rows gets zeros. The order is fixed, so the result is the same on every run.
#pragma once
#include "slots.cuh"

namespace jax_moe::cuda {

inline constexpr int kFinalizeThreads = 128;
inline constexpr int kFinalizeColumnsPerCta = kFinalizeThreads * 8;

struct FinalizeParameters {
  const uint16_t* y2;                           // bf16 [num_rows, y2_stride], columns of them
  const int32_t* expanded_idx_to_permuted_idx;  // [T * K]
  SlotWeights weights;
  uint16_t* output;  // bf16 [T, output_stride], likewise
  int top_k;
  int columns;
  int y2_stride, output_stride;
  int num_rows;  // a row outside [0, num_rows) is none
};

// Grid: T * ceil(columns / kFinalizeColumnsPerCta) CTAs, columns fastest.
__global__ void finalize(const __grid_constant__ FinalizeParameters p);

}  // namespace jax_moe::cuda
