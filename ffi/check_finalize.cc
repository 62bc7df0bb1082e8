// What is checked in C++ of a call that finalises apart: only what could corrupt memory. Full checks with their words
// are in jax_moe/finalize_problem.py.
#include "finalize.h"

namespace jax_moe {
namespace {

constexpr int64_t kAlignment = 16;  // 16-byte loads and stores
constexpr int64_t kLimit = (int64_t(1) << 31) - 1024;

Status CheckFields(const FinalizeProblem& p) {
  if (p.hidden_size < 1 || p.hidden_size % kScaleBlock || p.hidden_size > kLimit)
    return Status::Invalid("hidden_size must be a positive multiple of 128");
  if (p.top_k < 1 || p.top_k > kMaxTopK)
    return Status::Invalid("top_k must be in [1, 32], got " + std::to_string(p.top_k));
  if (p.num_tokens < 0 || p.num_tokens > kLimit / p.top_k)
    return Status::Invalid("num_tokens * top_k must be in [0, 2^31 - 1024]");
  if (p.num_rows < 0 || p.num_rows > kLimit) return Status::Invalid("num_rows must be in [0, 2^31 - 1024]");
  if (ElementBytes(p.weights_dtype) == 0) return Status::Invalid("expert_weights must be bfloat16 or float32");
  return {};
}

}  // namespace

Status CheckFinalize(const FinalizeProblem& p, const FinalizeBuffers& b) {
  if (Status s = CheckFields(p); !s.ok()) return s;
  const int64_t slots = p.num_tokens * p.top_k, row_bytes = p.hidden_size * 2;
  const int64_t weight_bytes = ElementBytes(p.weights_dtype);
  const struct {
    const char* name;
    const Buffer& buffer;
    int64_t bytes, alignment;
  } expected[] = {
      {"gemm2_output", b.gemm2_output, p.num_rows * row_bytes, kAlignment},
      {"expert_weights", b.expert_weights, slots * weight_bytes, weight_bytes},
      {"expanded_idx_to_permuted_idx", b.expanded_idx_to_permuted_idx, slots * 4, 4},
      {"output", b.output, p.num_tokens * row_bytes, kAlignment},
  };
  for (const auto& e : expected)
    if (Status s = CheckBuffer(e.name, e.buffer, e.bytes, e.alignment); !s.ok()) return s;
  return {};
}

std::string FinalizeAbiText() {
  std::string text = "finalize fields:";
#define FIELD(name) text += " " #name;
  JAX_MOE_FINALIZE_FIELDS(FIELD)
#undef FIELD
#define BUFFER(name) text += " " #name;
  text += "\nfinalize buffers:";
  JAX_MOE_FINALIZE_BUFFERS(BUFFER)
#undef BUFFER
  return text;
}

}  // namespace jax_moe
