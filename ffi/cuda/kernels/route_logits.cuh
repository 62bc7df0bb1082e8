// Routing from logits: one warp a token, the keys of all experts in registers, expert j * 32 + lane in register j of a
// lane. Keys are compared as codes: uint32 in the order of the keys, so that one warp reduction finds the greatest.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr int kRouteLogitsWarps = 4;  // tokens of a CTA

enum class RoutingKey : int { kLogit, kSoftmax, kSigmoid };  // before the bias

struct RouteLogitsParameters {
  const void* logits;  // f32 or bf16 [num_tokens, num_experts]
  const void* bias;    // f32 or bf16 [num_experts], or null
  int32_t* ids;        // [num_tokens, top_k]
  float* weights;      // [num_tokens, top_k]
  int num_tokens;
  int num_experts;
  int top_k;
  RoutingKey key;
  bool logits_are_f32;
  bool bias_is_f32;
  // A slot's value is its key without the bias, or
  bool value_is_sigmoid;    // the sigmoid of that,
  bool value_is_power;      // or e to the power of the key, less the token's greatest. Its weight is the value, or
  bool weights_are_shares;  // value * factor / (sum of the token's values + epsilon); always of powers
  float factor;
  float epsilon;
  int num_groups;  // 1: experts are not grouped
  int num_kept_groups;
  int group_size;
  int group_lane_bits;     // 2^that lanes look for a group's best two keys, 32 / num_groups at most,
  int group_steps;         // at so many keys each
  uint32_t group_inverse;  // ceil(2^22 / group_size)
  int shared_words;        // of dynamic shared memory, for a warp
};

// For up to as many experts as the name says.
__global__ void route_logits_128(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_256(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_512(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_1024(const __grid_constant__ RouteLogitsParameters p);
__global__ void route_logits_2048(const __grid_constant__ RouteLogitsParameters p);

}  // namespace jax_moe::cuda
