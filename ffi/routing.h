// The contract of routing from logits: what a call is (RoutingProblem), where its arrays are (RoutingBuffers), and the
// function of each backend. jax_moe/routing_problem.py states the same fields, buffers and methods; RoutingAbiText() is
// compared with it when the extension is loaded. T = num_tokens, E = num_experts, K = top_k.
#pragma once
#include "moe.h"

namespace jax_moe {

enum class RoutingMethodType : int64_t {
  kDefault = 0,
  kRenormalize = 1,
  kDeepSeekV3 = 2,
  kLlama4 = 3,
  kRenormalizeNaive = 4,
  kTopK = 5,
  kSigmoidRenorm = 6,
  kMiniMax2 = 7,
  kSigmoid = 8,
};

inline constexpr int64_t kMaxRoutedExperts = 2048;

// One line a field. bias_dtype kNone: no bias. n_group and topk_group are 1 where experts are not grouped.
// enable_pdl: the kernel may start before the one before it has ended.
#define JAX_MOE_ROUTING_FIELDS(FIELD) \
  FIELD(num_tokens)                   \
  FIELD(num_experts)                  \
  FIELD(top_k)                        \
  FIELD(method)                       \
  FIELD(n_group)                      \
  FIELD(topk_group)                   \
  FIELD(norm_topk_prob)               \
  FIELD(logits_dtype)                 \
  FIELD(bias_dtype)                   \
  FIELD(enable_pdl)

// Operands then results, in the order of the XLA custom call. Only DeepSeekV3 and MiniMax2 read the bias.
#define JAX_MOE_ROUTING_BUFFERS(BUFFER)                                        \
  BUFFER(routing_logits) /* bf16 or f32 [T, E]                              */ \
  BUFFER(routing_bias)   /* bf16 or f32 [E], or absent: 0                   */ \
  BUFFER(topk_ids)       /* int32 [T, K], in descending order of the key    */ \
  BUFFER(topk_weights)   /* f32 [T, K]                                      */

struct RoutingProblem {
#define FIELD(name) int64_t name = 0;
  JAX_MOE_ROUTING_FIELDS(FIELD)
#undef FIELD
  double routed_scaling_factor = 1;

  bool is(RoutingMethodType type) const { return method == int64_t(type); }
  // Whether the key is a biased sigmoid, which then is not the weight.
  bool reads_bias() const {
    return (is(RoutingMethodType::kDeepSeekV3) || is(RoutingMethodType::kMiniMax2)) &&
           bias_dtype != int64_t(DataType::kNone);
  }
  int64_t group_size() const { return num_experts / n_group; }
};

struct RoutingBuffers {
#define BUFFER(name) Buffer name;
  JAX_MOE_ROUTING_BUFFERS(BUFFER)
#undef BUFFER
};

// Shared by the backends (ffi/check_routing.cc).
Status CheckRouting(const RoutingProblem& problem, const RoutingBuffers& buffers);
std::string RoutingAbiText();  // fields, buffers and methods, for routing_problem.py

namespace cpu {
Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t of `device`. One launch: no workspace, no allocation, no synchronisation, capturable.
Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers, int device, void* stream);
}  // namespace cuda

}  // namespace jax_moe
