// Routing from logits on the GPU: checks, then one launch.
#include "../routing.h"
#include "device.h"
#include "kernels/route_logits.cuh"
#include "launch.h"

namespace jax_moe::cuda {
namespace {

// How keys and weights come from logits.
void SetMethod(const RoutingProblem& p, RouteLogitsParameters* r) {
  using Method = RoutingMethodType;
  const bool scaled = p.is(Method::kDeepSeekV3) || p.is(Method::kMiniMax2);
  r->key = RoutingKey::kSigmoid;
  if (p.is(Method::kDefault) || p.is(Method::kRenormalizeNaive)) r->key = RoutingKey::kSoftmax;
  if (p.is(Method::kRenormalize) || p.is(Method::kLlama4) || p.is(Method::kTopK)) r->key = RoutingKey::kLogit;
  r->value_is_sigmoid = p.is(Method::kLlama4);
  r->value_is_power = p.is(Method::kRenormalize);
  r->weights_are_shares = scaled || p.is(Method::kRenormalize) || p.is(Method::kRenormalizeNaive) ||
                          (p.is(Method::kSigmoidRenorm) && p.norm_topk_prob != 0);
  r->factor = scaled ? float(p.routed_scaling_factor) : 1.f;
  r->epsilon = scaled ? 1e-20f : 0.f;
}

RouteLogitsParameters Parameters(const RoutingProblem& p, const RoutingBuffers& b) {
  RouteLogitsParameters r{};
  SetMethod(p, &r);
  r.logits = b.routing_logits.data;
  r.bias = p.reads_bias() ? b.routing_bias.data : nullptr;
  r.ids = static_cast<int32_t*>(b.topk_ids.data);
  r.weights = static_cast<float*>(b.topk_weights.data);
  r.num_tokens = int(p.num_tokens);
  r.num_experts = int(p.num_experts);
  r.top_k = int(p.top_k);
  r.logits_are_f32 = p.logits_dtype == int64_t(DataType::kFloat32);
  r.bias_is_f32 = p.bias_dtype == int64_t(DataType::kFloat32);
  r.num_groups = p.topk_group < p.n_group ? int(p.n_group) : 1;  // all kept: as if there were none
  r.num_kept_groups = int(p.topk_group);
  r.group_size = int(p.group_size());
  while (r.num_groups << (r.group_lane_bits + 1) <= 32) ++r.group_lane_bits;
  r.group_steps = ((r.group_size - 1) >> r.group_lane_bits) + 1;
  r.group_inverse = ((1u << 22) + unsigned(r.group_size) - 1) / unsigned(r.group_size);
  const int unbiased = p.reads_bias() ? r.num_experts : 0, codes = r.num_experts + r.num_groups;
  r.shared_words = unbiased + (r.num_groups > 1 ? codes : 0);
  return r;
}

}  // namespace

Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers, int device, void* stream) {
  if (Status s = CheckRouting(problem, buffers); !s.ok()) return s;
  int num_sms = 0;
  if (Status s = CheckDevice(device, &num_sms); !s.ok()) return s;
  if (problem.num_tokens == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();

  const RouteLogitsParameters parameters = Parameters(problem, buffers);
  const LaunchShape shape{unsigned((problem.num_tokens + kRouteLogitsWarps - 1) / kRouteLogitsWarps),
                          kRouteLogitsWarps * 32, unsigned(kRouteLogitsWarps * parameters.shared_words * 4), true};
  const auto kernel = problem.num_experts <= 128    ? route_logits_128
                      : problem.num_experts <= 256  ? route_logits_256
                      : problem.num_experts <= 512  ? route_logits_512
                      : problem.num_experts <= 1024 ? route_logits_1024
                                                    : route_logits_2048;
  const LaunchStream launches(static_cast<cudaStream_t>(stream), problem.enable_pdl != 0);
  return Launch("route_logits", kernel, shape, launches, parameters);
}

}  // namespace jax_moe::cuda
