// Weighted sum of a token's rows, 8 columns a thread at a time; few rows take several of those at a time, so
// that as many bytes are in flight.
#include "../../moe.h"
#include "finalize.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {
namespace {

// A token's rows: lane i has the row and the weight of slot i, `slots` a bit for each slot that has a row.
struct TokenRows {
  int row;
  float weight;
  unsigned slots;
};

// Sums kRows rows at a time over kSteps times kFinalizeColumns columns at a time, of [column, end), by whole warps.
template <int kRows, int kSteps>
DEVICE void sum_rows(const FinalizeParameters& p, const TokenRows& rows, uint16_t* output, int column, int end) {
  for (; column < end; column += kSteps * kFinalizeColumns) {
    float sum[kSteps][8] = {};
    // NOTE: a slot without a row is skipped, not multiplied by 0: nobody's NaN gets in.
    for (unsigned slots = rows.slots; slots != 0;) {
      uint4 y[kRows][kSteps];
      int slot[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i, slots &= slots - 1) {
        slot[i] = __ffs(int(slots)) - 1;
        if (slot[i] < 0) continue;
        const uint16_t* from = p.y2 + int64_t(__shfl_sync(~0u, rows.row, slot[i])) * p.y2_stride;
#pragma unroll
        for (int j = 0; j < kSteps; ++j)
          if (const int at = column + j * kFinalizeColumns + 8 * int(threadIdx.x); at < end)
            y[i][j] = __ldcs(reinterpret_cast<const uint4*>(from + at));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (slot[i] < 0) continue;
        const float weight = __shfl_sync(~0u, rows.weight, slot[i]);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          const uint32_t pairs[4] = {y[i][j].x, y[i][j].y, y[i][j].z, y[i][j].w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            sum[j][2 * k] += weight * bf16_lo(pairs[k]);
            sum[j][2 * k + 1] += weight * bf16_hi(pairs[k]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int at = column + j * kFinalizeColumns + 8 * int(threadIdx.x);
      if (at >= end) continue;
      uint4 out;
      out.x = to_bf16x2(sum[j][0], sum[j][1]);
      out.y = to_bf16x2(sum[j][2], sum[j][3]);
      out.z = to_bf16x2(sum[j][4], sum[j][5]);
      out.w = to_bf16x2(sum[j][6], sum[j][7]);
      *reinterpret_cast<uint4*>(output + at) = out;
    }
  }
}

// What L2 need not write to memory: of each row the columns that this warp has read, and h.
DEVICE void discard_rows(const FinalizeParameters& p, const TokenRows& rows, int column, int end) {
  constexpr int kLine = 64;  // columns
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncwarp();
  for (int first = 0; first < p.top_k; first += 8) {  // four lanes a slot
    const int slot = first + lane / 4;
    const bool has_row = slot < 32 && (rows.slots >> slot & 1);
    const int64_t row = __shfl_sync(~0u, rows.row, slot % 32);
    if (!has_row) continue;
    if (p.discards_y2)
      for (int at = column + 4 * kLine * warp + kLine * (lane % 4); at < end; at += kFinalizeColumns)
        discard_line(p.y2 + row * p.y2_stride + at);
    if (column == 0 && p.h != nullptr)
      for (int at = 128 * (4 * warp + lane % 4); at < p.h_bytes; at += 128 * 16)
        discard_line(p.h + row * p.h_bytes + at);
  }
}

}  // namespace

__global__ void __launch_bounds__(kFinalizeThreads, 8) finalize(const __grid_constant__ FinalizeParameters p) {
  const int parts = (p.columns + p.columns_per_cta - 1) / p.columns_per_cta, lane = threadIdx.x % 32;
  const int64_t token = blockIdx.x / parts;
  const int column = int(blockIdx.x % parts) * p.columns_per_cta, end = min(column + p.columns_per_cta, p.columns);
  // NOTE: read before the wait: this kernel starts when the GEMMs' has waited for the route.
  static_assert(kMaxTopK <= 32, "a lane a slot");
  TokenRows rows{-1, 0.f, 0};
  if (lane < p.top_k) {
    rows.row = __ldcg(p.expanded_idx_to_permuted_idx + token * p.top_k + lane);
    rows.weight = p.weights.at(token * p.top_k + lane);
  }
  rows.slots = __ballot_sync(~0u, unsigned(rows.row) < unsigned(p.num_rows));
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint16_t* output = p.output + token * p.output_stride;
  if (__popc(rows.slots) <= 2)
    sum_rows<2, 2>(p, rows, output, column, end);
  else
    sum_rows<8, 1>(p, rows, output, column, end);
  if (p.discards_y2 || p.h != nullptr) discard_rows(p, rows, column, end);
}

}  // namespace jax_moe::cuda
