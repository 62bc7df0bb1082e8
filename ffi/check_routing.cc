// What is checked in C++ of a call that routes from logits: only what could corrupt memory or never end. Full checks
// with their words are in jax_moe/routing_problem.py.
#include "routing.h"

namespace jax_moe {
namespace {

Status CheckFields(const RoutingProblem& p) {
  if (p.method < int64_t(RoutingMethodType::kDefault) || p.method > int64_t(RoutingMethodType::kSigmoid))
    return Status::Invalid("routing_method_type must be in [0, 8], got " + std::to_string(p.method));
  if (p.num_experts < 1 || p.num_experts > kMaxRoutedExperts)
    return Status::Invalid("num_experts must be in [1, 2048], got " + std::to_string(p.num_experts));
  if (p.top_k < 1 || p.top_k > kMaxTopK || p.top_k > p.num_experts)
    return Status::Invalid("top_k must be in [1, min(num_experts, 32)], got " + std::to_string(p.top_k));
  if (p.num_tokens < 0 || p.num_tokens > ((int64_t(1) << 31) - 1024) / p.top_k)
    return Status::Invalid("num_tokens * top_k must be in [0, 2^31 - 1024]");
  if (p.n_group < 1 || p.num_experts % p.n_group || (p.n_group > 1 && p.group_size() < 2))
    return Status::Invalid("n_group must divide num_experts into groups of at least 2");
  if (p.n_group > 1 && !p.is(RoutingMethodType::kDeepSeekV3))
    return Status::Invalid("n_group must be 1 but with DeepSeekV3");
  if (p.topk_group < 1 || p.topk_group > p.n_group || p.top_k > p.topk_group * p.group_size())
    return Status::Invalid("topk_group must be in [1, n_group], and its groups must hold top_k experts");
  if (ElementBytes(p.logits_dtype) == 0) return Status::Invalid("routing_logits must be bfloat16 or float32");
  if (ElementBytes(p.bias_dtype) == 0 && p.bias_dtype != int64_t(DataType::kNone))
    return Status::Invalid("routing_bias must be bfloat16 or float32");
  return {};
}

}  // namespace

Status CheckRouting(const RoutingProblem& p, const RoutingBuffers& b) {
  if (Status s = CheckFields(p); !s.ok()) return s;
  const struct {
    const char* name;
    const Buffer& buffer;
    int64_t count, element_bytes;
  } expected[] = {
      {"routing_logits", b.routing_logits, p.num_tokens * p.num_experts, ElementBytes(p.logits_dtype)},
      {"routing_bias", b.routing_bias, p.reads_bias() ? p.num_experts : 0, ElementBytes(p.bias_dtype)},
      {"topk_ids", b.topk_ids, p.num_tokens * p.top_k, 4},
      {"topk_weights", b.topk_weights, p.num_tokens * p.top_k, 4},
  };
  for (const auto& e : expected)
    if (Status s = CheckBuffer(e.name, e.buffer, e.count * e.element_bytes, e.element_bytes); !s.ok()) return s;
  return {};
}

std::string RoutingAbiText() {
  std::string text = "routing fields:";
#define FIELD(name) text += " " #name;
  JAX_MOE_ROUTING_FIELDS(FIELD)
#undef FIELD
#define BUFFER(name) text += " " #name;
  text += "\nrouting buffers:";
  JAX_MOE_ROUTING_BUFFERS(BUFFER)
#undef BUFFER
  const auto value = [&](const char* name, RoutingMethodType method) {
    text += std::string(" ") + name + "=" + std::to_string(int64_t(method));
  };
  text += "\nrouting methods:";
  value("Default", RoutingMethodType::kDefault);
  value("Renormalize", RoutingMethodType::kRenormalize);
  value("DeepSeekV3", RoutingMethodType::kDeepSeekV3);
  value("Llama4", RoutingMethodType::kLlama4);
  value("RenormalizeNaive", RoutingMethodType::kRenormalizeNaive);
  value("TopK", RoutingMethodType::kTopK);
  value("SigmoidRenorm", RoutingMethodType::kSigmoidRenorm);
  value("MiniMax2", RoutingMethodType::kMiniMax2);
  value("Sigmoid", RoutingMethodType::kSigmoid);
  return text;
}

}  // namespace jax_moe
