// Weighted sum of each token's rows, in slot order.
#include "float8.h"
#include "parallel.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

// weights = those of the expanded indices [first, first + top_k).
void ReadWeights(const Call& call, int64_t first, float* weights) {
  const auto* packed = static_cast<const int32_t*>(call.buffers.topk_ids.data);
  const void* given = call.buffers.topk_weights.data;
  const auto dtype = DataType(call.problem.topk_weights_dtype);
  for (int64_t i = first; i < first + call.problem.top_k; ++i)
    *weights++ = dtype == DataType::kFloat32    ? static_cast<const float*>(given)[i]
                 : dtype == DataType::kBFloat16 ? FloatFromBfloat16(static_cast<const uint16_t*>(given)[i])
                                                : FloatFromBfloat16(uint16_t(packed[i]));
}

// output[hidden] = bf16(sum over slots with a row of weight * y2[row]).
template <class Isa>
JAX_MOE_INLINE void SumRowsOn(const int32_t* rows, const float* weights, int64_t top_k, const uint16_t* y2,
                              int64_t hidden, uint16_t* output) {
  for (int64_t first = 0; first < hidden; first += kScaleBlock) {
    float sum[kScaleBlock] = {};
    for (int64_t k = 0; k < top_k; ++k) {
      if (rows[k] < 0) continue;  // NOTE: skipped, not multiplied by 0: nobody's NaN gets in
      const uint16_t* y = y2 + rows[k] * hidden + first;
      for (int i = 0; i < kScaleBlock; ++i) sum[i] += weights[k] * FloatFromBfloat16(y[i]);
    }
    for (int i = 0; i < kScaleBlock; ++i) output[first + i] = Bfloat16FromFloat(sum[i]);
  }
}
JAX_MOE_DISPATCH(void, SumRows,
                 (const int32_t* rows, const float* weights, int64_t top_k, const uint16_t* y2, int64_t hidden,
                  uint16_t* output),
                 (rows, weights, top_k, y2, hidden, output))

}  // namespace

void Finalize(const Call& call) {
  const int64_t top_k = call.problem.top_k, hidden = call.problem.hidden_size;
  auto* output = static_cast<uint16_t*>(call.buffers.output.data);
  Parallel(call.problem.num_tokens, top_k * hidden, [&](WorkQueue& tokens) {
    for (int64_t t; tokens.Next(&t);) {
      float weights[kMaxTopK];
      ReadWeights(call, t * top_k, weights);
      SumRows(call.workspace.expanded_idx_to_permuted_idx + t * top_k, weights, top_k, call.workspace.y2, hidden,
              output + t * hidden);
    }
  });
}

}  // namespace jax_moe::cpu
