// Weighted sum of a token's rows, 8 columns a thread, 8 rows in flight.
#include "../../moe.h"
#include "finalize.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kFinalizeThreads) finalize(const __grid_constant__ FinalizeParameters p) {
  constexpr int kInFlight = 8;
  const int chunks = (p.columns + kFinalizeColumnsPerCta - 1) / kFinalizeColumnsPerCta;
  const int64_t token = blockIdx.x / chunks;
  const int column = int(blockIdx.x % chunks) * kFinalizeColumnsPerCta + threadIdx.x * 8, lane = threadIdx.x % 32;
  // Lane i has the row and the weight of slot i. NOTE: read before the wait: this kernel starts when the GEMMs' has
  // waited for the route.
  static_assert(kMaxTopK <= 32, "a lane a slot");
  int row = -1;
  float weight = 0.f;
  if (lane < p.top_k) {
    row = __ldcg(p.expanded_idx_to_permuted_idx + token * p.top_k + lane);
    weight = p.weights.at(token * p.top_k + lane);
    if (unsigned(row) >= unsigned(p.num_rows)) row = -1;
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  const bool inside = column < p.columns;  // NOTE: no return: the lanes outside still have slots for the others
  float sum[8] = {};
  for (int first = 0; first < p.top_k; first += kInFlight) {
    uint4 y[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int y_row = __shfl_sync(~0u, row, first + i);
      y[i] = make_uint4(0, 0, 0, 0);
      if (inside && y_row >= 0)
        y[i] = __ldcs(reinterpret_cast<const uint4*>(p.y2 + int64_t(y_row) * p.y2_stride + column));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int y_row = __shfl_sync(~0u, row, first + i);
      const float y_weight = __shfl_sync(~0u, weight, first + i);
      if (y_row < 0) continue;  // NOTE: skipped, not multiplied by 0: nobody's NaN gets in
      const uint32_t pairs[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[2 * j] += y_weight * bf16_lo(pairs[j]);
        sum[2 * j + 1] += y_weight * bf16_hi(pairs[j]);
      }
    }
  }
  if (!inside) return;
  uint4 out;
  out.x = to_bf16x2(sum[0], sum[1]);
  out.y = to_bf16x2(sum[2], sum[3]);
  out.z = to_bf16x2(sum[4], sum[5]);
  out.w = to_bf16x2(sum[6], sum[7]);
  *reinterpret_cast<uint4*>(p.output + token * p.output_stride + column) = out;
}

}  // namespace jax_moe::cuda
