// Routing from logits: one warp a token, the keys of all experts in registers, expert j * 32 + lane in register j of a
// lane. Keys are compared as codes: uint32 in the order of the keys, so that one warp reduction finds the greatest.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr int kRouteLogitsWarps = 4;  // tokens of a CTA

// How keys and weights come from logits; the methods of routing.h, in its order.
enum class RoutingMethod : int {
  kDefault,
  kRenormalize,
  kDeepSeekV3,
  kLlama4,
  kRenormalizeNaive,
  kTopK,
  kSigmoidRenorm,
  kMiniMax2,
  kSigmoid
};

struct RouteLogitsParameters {
  const void* logits;  // f32 or bf16 [num_tokens, num_experts]
  const void* bias;    // f32 or bf16 [num_experts], or null
  int32_t* ids;        // [num_tokens, top_k]
  float* weights;      // [num_tokens, top_k]
  int num_tokens;
  int num_experts;
  int top_k;
  RoutingMethod method;
  bool logits_are_f32;
  bool bias_is_f32;
  bool norm_topk_prob;
  float scaling_factor;
  int num_groups;  // 1: experts are not grouped
  int num_kept_groups;
  int group_size;
  int lanes_per_group;     // lanes that look for a group's best two keys: a power of two, 32 / num_groups at most
  uint32_t group_inverse;  // ceil(2^22 / group_size)
};

// For up to as many experts as the name says. Dynamic shared memory with groups: num_experts + num_groups uint32 a
// warp.
__global__ void route_logits_256(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_512(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_1024(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_2048(const __grid_constant__ RouteLogitsParameters p);

}  // namespace jax_moe::cuda
