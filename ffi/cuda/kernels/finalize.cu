// Weighted sum of a token's rows, 8 columns a thread, 8 rows in flight.
#include "finalize.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kFinalizeThreads) finalize(const __grid_constant__ FinalizeParameters p) {
  constexpr int kInFlight = 8;
  const int chunks = (p.hidden + kFinalizeColumnsPerCta - 1) / kFinalizeColumnsPerCta;
  const int64_t token = blockIdx.x / chunks;
  const int column = int(blockIdx.x % chunks) * kFinalizeColumnsPerCta + threadIdx.x * 8;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (column >= p.hidden) return;
  const int32_t* rows = p.expanded_idx_to_permuted_idx + token * p.top_k;
  float sum[8] = {};
  for (int first = 0; first < p.top_k; first += kInFlight) {
    uint4 y[kInFlight];
    float weight[kInFlight];
    bool valid[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int slot = first + i;
      const int row = slot < p.top_k ? rows[slot] : -1;
      valid[i] = unsigned(row) < unsigned(p.num_rows);
      if (!valid[i]) continue;
      weight[i] = p.weights.at(token * p.top_k + slot);
      y[i] = __ldcs(reinterpret_cast<const uint4*>(p.y2 + int64_t(row) * p.hidden + column));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!valid[i]) continue;  // NOTE: skipped, not multiplied by 0: nobody's NaN gets in
      const uint32_t pairs[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[2 * j] += weight[i] * bf16_lo(pairs[j]);
        sum[2 * j + 1] += weight[i] * bf16_hi(pairs[j]);
      }
    }
  }
  uint4 out;
  out.x = to_bf16x2(sum[0], sum[1]);
  out.y = to_bf16x2(sum[2], sum[3]);
  out.z = to_bf16x2(sum[4], sum[5]);
  out.w = to_bf16x2(sum[6], sum[7]);
  *reinterpret_cast<uint4*>(p.output + token * p.hidden + column) = out;
}

}  // namespace jax_moe::cuda
