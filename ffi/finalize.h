// The contract of finalising apart: the weighted sum of the rows that a call without do_finalize left. What a call is
// (FinalizeProblem), where its arrays are (FinalizeBuffers), and the function of each backend.
// jax_moe/finalize_problem.py states the same fields and buffers; FinalizeAbiText() is compared with it when the
// extension is loaded. T = num_tokens, K = top_k, H = hidden_size, R = num_rows.
#pragma once
#include "moe.h"

namespace jax_moe {

// One line a field. weights_dtype is a DataType.
#define JAX_MOE_FINALIZE_FIELDS(FIELD) \
  FIELD(num_tokens)                    \
  FIELD(top_k)                         \
  FIELD(hidden_size)                   \
  FIELD(num_rows)                      \
  FIELD(weights_dtype)

// Operands then the result, in the order of the XLA custom call. A slot whose row is not in [0, R) is skipped.
#define JAX_MOE_FINALIZE_BUFFERS(BUFFER)                           \
  BUFFER(gemm2_output)                 /* bf16 [R, H]           */ \
  BUFFER(expert_weights)               /* bf16 or f32 [T, K]    */ \
  BUFFER(expanded_idx_to_permuted_idx) /* int32 [T*K]           */ \
  BUFFER(output)                       /* bf16 [T, H]           */

struct FinalizeProblem {
#define FIELD(name) int64_t name = 0;
  JAX_MOE_FINALIZE_FIELDS(FIELD)
#undef FIELD
};

struct FinalizeBuffers {
#define BUFFER(name) Buffer name;
  JAX_MOE_FINALIZE_BUFFERS(BUFFER)
#undef BUFFER
};

// Shared by the backends (ffi/check_finalize.cc).
Status CheckFinalize(const FinalizeProblem& problem, const FinalizeBuffers& buffers);
std::string FinalizeAbiText();  // fields and buffers, for finalize_problem.py

namespace cpu {
Status FinalizeRows(const FinalizeProblem& problem, const FinalizeBuffers& buffers);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t of `device`. One launch: no workspace, no allocation, no synchronisation, capturable.
Status FinalizeRows(const FinalizeProblem& problem, const FinalizeBuffers& buffers, int device, void* stream);
}  // namespace cuda

}  // namespace jax_moe
