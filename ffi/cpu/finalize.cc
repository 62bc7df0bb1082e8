// Weighted sum of each token's rows, in slot order: the last stage of a call, and a function of its own.
#include "../finalize.h"

#include <exception>

#include "float8.h"
#include "float_environment.h"
#include "parallel.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

// What is summed: slot p = t * top_k + k of token t has the weight weights[p] and the row rows[p] of y2, or no row.
struct Slots {
  int64_t num_tokens, top_k, columns, num_rows;
  const uint16_t* y2;  // bf16 [num_rows, y2_stride], as many of them as columns
  int64_t y2_stride;
  const int32_t* rows;  // [num_tokens * top_k]
  const void* weights;  // likewise, of weights_dtype; kNone: packed with their ids
  DataType weights_dtype;
};

float Weight(const Slots& s, int64_t slot) {
  switch (s.weights_dtype) {
    case DataType::kFloat32:
      return static_cast<const float*>(s.weights)[slot];
    case DataType::kBFloat16:
      return FloatFromBfloat16(static_cast<const uint16_t*>(s.weights)[slot]);
    default:
      return FloatFromBfloat16(uint16_t(static_cast<const int32_t*>(s.weights)[slot]));
  }
}

// output[columns] = bf16(sum over the slots of a token with a row, in order, of weight * y2[row]).
template <class Isa>
JAX_MOE_INLINE void SumRowsOn(const Slots& s, const int32_t* rows, const float* weights, uint16_t* output) {
  for (int64_t first = 0; first < s.columns; first += kScaleBlock) {
    float sum[kScaleBlock] = {};
    for (int64_t k = 0; k < s.top_k; ++k) {
      // NOTE: skipped, not multiplied by 0: nobody's NaN gets in.
      if (rows[k] < 0 || rows[k] >= s.num_rows) continue;
      const uint16_t* y = s.y2 + rows[k] * s.y2_stride + first;
      for (int i = 0; i < kScaleBlock; ++i) sum[i] += weights[k] * FloatFromBfloat16(y[i]);
    }
    for (int i = 0; i < kScaleBlock; ++i) output[first + i] = Bfloat16FromFloat(sum[i]);
  }
}
JAX_MOE_DISPATCH(void, SumRows, (const Slots& s, const int32_t* rows, const float* weights, uint16_t* output),
                 (s, rows, weights, output))

void SumTokens(const Slots& s, uint16_t* output, int64_t output_stride) {
  Parallel(s.num_tokens, s.top_k * s.columns, [&](WorkQueue& tokens) {
    for (int64_t t; tokens.Next(&t);) {
      float weights[kMaxTopK];
      for (int64_t k = 0; k < s.top_k; ++k) weights[k] = Weight(s, t * s.top_k + k);
      SumRows(s, s.rows + t * s.top_k, weights, output + t * output_stride);
    }
  });
}

}  // namespace

void Finalize(const Call& call, Slab slab) {
  const Problem& p = call.problem;
  const auto dtype = DataType(p.topk_weights_dtype);
  const void* weights = dtype == DataType::kNone ? call.buffers.topk_ids.data : call.buffers.topk_weights.data;
  SumTokens({p.num_tokens, p.top_k, slab.columns, p.expanded_rows(), call.workspace.y2, call.workspace.y2_columns,
             call.workspace.expanded_idx_to_permuted_idx, weights, dtype},
            static_cast<uint16_t*>(call.buffers.output.data) + slab.first, p.hidden_size);
}

Status FinalizeRows(const FinalizeProblem& p, const FinalizeBuffers& b) try {
  if (Status s = CheckFinalize(p, b); !s.ok()) return s;
  const DefaultFloatEnvironment environment;
  SumTokens({p.num_tokens, p.top_k, p.hidden_size, p.num_rows, static_cast<const uint16_t*>(b.gemm2_output.data),
             p.hidden_size, static_cast<const int32_t*>(b.expanded_idx_to_permuted_idx.data), b.expert_weights.data,
             DataType(p.weights_dtype)},
            static_cast<uint16_t*>(b.output.data), p.hidden_size);
  return {};
} catch (const std::exception& e) {
  return Status::Internal(std::string("the CPU backend failed: ") + e.what());
}

}  // namespace jax_moe::cpu
