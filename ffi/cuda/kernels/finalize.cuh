// Finalize: output[t] = bf16(sum over slots k, in order, of weight[t, k] * y2[row(t, k)]); slots without a row are
// skipped, a token without rows gets zeros. The order is fixed, so the result is the same on every run.
#pragma once
#include "slots.cuh"

namespace jax_moe::cuda {

inline constexpr int kFinalizeThreads = 128;
inline constexpr int kFinalizeColumns = kFinalizeThreads * 8;  // at a time

// Of a CTA: more than it sums at a time where tokens alone make CTAs enough.
constexpr int finalize_columns_per_cta(int64_t num_tokens) {
  return num_tokens < 1024 ? kFinalizeColumns : 4 * kFinalizeColumns;
}

struct FinalizeParameters {
  uint16_t* y2;                                 // bf16 [num_rows, y2_stride], columns of them
  const int32_t* expanded_idx_to_permuted_idx;  // [T * K]
  SlotWeights weights;
  uint16_t* output;  // bf16 [T, output_stride], likewise
  int top_k;
  int columns, columns_per_cta;
  int y2_stride, output_stride;
  int num_rows;  // a row outside [0, num_rows) is none
  // Scratch in L2 that nobody reads after this kernel: y2, and h's rows of h_bytes unless that is null.
  bool discards_y2;
  uint8_t* h;
  int h_bytes;
};

// The grid: so many CTAs a token, columns fastest.
constexpr int64_t finalize_ctas(int64_t num_tokens, int64_t columns) {
  const int columns_per_cta = finalize_columns_per_cta(num_tokens);
  return num_tokens * ((columns + columns_per_cta - 1) / columns_per_cta);
}
__global__ void finalize(const __grid_constant__ FinalizeParameters p);

}  // namespace jax_moe::cuda
