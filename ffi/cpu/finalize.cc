// Weighted sum of each token's rows, in slot order.
#include "float8.h"
#include "parallel.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

// output[hidden] = bf16(sum over slots with a row of weight * y2[row]).
template <class Isa>
JAX_MOE_INLINE void SumRowsOn(const int32_t* rows, const int32_t* packed, int64_t top_k, const uint16_t* y2,
                              int64_t hidden, uint16_t* output) {
  for (int64_t first = 0; first < hidden; first += kScaleBlock) {
    float sum[kScaleBlock] = {};
    for (int64_t k = 0; k < top_k; ++k) {
      if (rows[k] < 0) continue;  // NOTE: skipped, not multiplied by 0: nobody's NaN gets in
      const float weight = FloatFromBfloat16(uint16_t(packed[k]));
      const uint16_t* y = y2 + rows[k] * hidden + first;
      for (int i = 0; i < kScaleBlock; ++i) sum[i] += weight * FloatFromBfloat16(y[i]);
    }
    for (int i = 0; i < kScaleBlock; ++i) output[first + i] = Bfloat16FromFloat(sum[i]);
  }
}
JAX_MOE_DISPATCH(void, SumRows,
                 (const int32_t* rows, const int32_t* packed, int64_t top_k, const uint16_t* y2, int64_t hidden,
                  uint16_t* output),
                 (rows, packed, top_k, y2, hidden, output))

}  // namespace

void Finalize(const Call& call) {
  const int64_t top_k = call.problem.top_k, hidden = call.problem.hidden_size;
  const auto* topk_ids = static_cast<const int32_t*>(call.buffers.topk_ids.data);
  auto* output = static_cast<uint16_t*>(call.buffers.output.data);
  Parallel(call.problem.num_tokens, top_k * hidden, [&](WorkQueue& tokens) {
    for (int64_t t; tokens.Next(&t);)
      SumRows(call.workspace.expanded_idx_to_permuted_idx + t * top_k, topk_ids + t * top_k, top_k, call.workspace.y2,
              hidden, output + t * hidden);
  });
}

}  // namespace jax_moe::cpu
