// Routing from logits on the GPU: checks, then one launch.
#include "../routing.h"
#include "device.h"
#include "kernels/route_logits.cuh"
#include "launch.h"

namespace jax_moe::cuda {
namespace {

RouteLogitsParameters Parameters(const RoutingProblem& p, const RoutingBuffers& b) {
  RouteLogitsParameters r{};
  r.logits = b.routing_logits.data;
  r.bias = p.reads_bias() ? b.routing_bias.data : nullptr;
  r.ids = static_cast<int32_t*>(b.topk_ids.data);
  r.weights = static_cast<float*>(b.topk_weights.data);
  r.num_tokens = int(p.num_tokens);
  r.num_experts = int(p.num_experts);
  r.top_k = int(p.top_k);
  r.method = static_cast<RoutingMethod>(p.method);
  r.logits_are_f32 = p.logits_dtype == int64_t(DataType::kFloat32);
  r.bias_is_f32 = p.bias_dtype == int64_t(DataType::kFloat32);
  r.norm_topk_prob = p.norm_topk_prob != 0;
  r.scaling_factor = float(p.routed_scaling_factor);
  r.num_groups = p.topk_group < p.n_group ? int(p.n_group) : 1;  // all kept: as if there were none
  r.num_kept_groups = int(p.topk_group);
  r.group_size = int(p.group_size());
  r.lanes_per_group = 1;
  while (r.lanes_per_group * 2 * r.num_groups <= 32) r.lanes_per_group *= 2;
  r.group_inverse = ((1u << 22) + unsigned(r.group_size) - 1) / unsigned(r.group_size);
  return r;
}

}  // namespace

Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers, int device, void* stream) {
  static_assert(int(RoutingMethod::kDeepSeekV3) == int(RoutingMethodType::kDeepSeekV3) &&
                int(RoutingMethod::kSigmoidRenorm) == int(RoutingMethodType::kSigmoidRenorm) &&
                int(RoutingMethod::kSigmoid) == int(RoutingMethodType::kSigmoid));
  if (Status s = CheckRouting(problem, buffers); !s.ok()) return s;
  int num_sms = 0;
  if (Status s = CheckDevice(device, &num_sms); !s.ok()) return s;
  if (problem.num_tokens == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();

  const RouteLogitsParameters parameters = Parameters(problem, buffers);
  const int64_t words = parameters.num_groups > 1 ? problem.num_experts + problem.n_group : 0;
  const LaunchShape shape{unsigned((problem.num_tokens + kRouteLogitsWarps - 1) / kRouteLogitsWarps),
                          kRouteLogitsWarps * 32, unsigned(kRouteLogitsWarps * words * 4)};
  const auto kernel = problem.num_experts <= 256    ? route_logits_256
                      : problem.num_experts <= 512  ? route_logits_512
                      : problem.num_experts <= 1024 ? route_logits_1024
                                                    : route_logits_2048;
  return Launch("route_logits", kernel, shape, static_cast<cudaStream_t>(stream), parameters);
}

}  // namespace jax_moe::cuda
