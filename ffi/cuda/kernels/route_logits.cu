// Keys of a token's experts, the top_k of them by repeated warp maxima, then the weights, one slot a lane.
// NOTE: sums are made in the same order as in ffi/cpu/route_logits.cc: 32 partial sums, then halves onto halves.
#include "route_logits.cuh"

namespace jax_moe::cuda {
namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr uint32_t kGone = 0;  // less than the code of any key
constexpr uint32_t kNan = 1;   // less than that of -inf

DEVICE uint32_t to_code(float key) {
  if (key != key) return kNan;
  const uint32_t bits = __float_as_uint(key + 0.f);  // NOTE: -0 becomes 0, with which it ties
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float to_key(uint32_t code) {
  if (code == kNan) return __uint_as_float(0x7FFFFFFFu);
  return __uint_as_float(code & 0x80000000u ? code & 0x7FFFFFFFu : ~code);
}

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}
// NaN only if all are.
DEVICE float warp_max(float v) { return to_key(__reduce_max_sync(kAllLanes, to_code(v))); }

DEVICE float sigmoid(float x) { return __frcp_rn(1.f + expf(-x)); }

DEVICE float load_f32(const void* p, int64_t i) { return __ldg(static_cast<const float*>(p) + i); }
DEVICE float load_bf16(const void* p, int64_t i) {
  return __uint_as_float(uint32_t(__ldg(static_cast<const unsigned short*>(p) + i)) << 16);
}
DEVICE float load(const void* p, bool is_f32, int64_t i) { return is_f32 ? load_f32(p, i) : load_bf16(p, i); }

// x[j] = element first + j * 32 + lane, for the `count` elements from `first` on; 0 behind them.
template <int kPerLane>
DEVICE void load_row(float (&x)[kPerLane], const void* p, bool is_f32, int64_t first, int count) {
  const int lane = threadIdx.x % 32;
  if (is_f32) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = j * 32 + lane < count ? load_f32(p, first + j * 32 + lane) : 0.f;
  } else {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = j * 32 + lane < count ? load_bf16(p, first + j * 32 + lane) : 0.f;
  }
}

// Codes that a warp takes the greatest of, one after the other; among equals the one of the smallest index.
// NOTE: codes are never changed by index, which would put them into memory: what comes after the last one is compared.
template <int kPerLane>
struct Ranking {
  uint32_t code[kPerLane];  // of index j * 32 + lane
  uint32_t best = ~0u;      // of this lane, greater than any code at first
  unsigned best_index = ~0u;

  // This lane's next one.
  DEVICE void advance() {
    uint32_t next = kGone;
    unsigned next_index = ~0u;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const unsigned index = j * 32 + threadIdx.x % 32;
      const bool is_left = code[j] < best || (code[j] == best && index > best_index);
      if (is_left && code[j] > next) {
        next = code[j];
        next_index = index;
      }
    }
    best = next;
    best_index = next_index;
  }
  // The index taken, and its code. Follows advance(). NOTE: there has to be one left.
  DEVICE int take(uint32_t& taken) {
    taken = __reduce_max_sync(kAllLanes, best);
    const unsigned index = __reduce_min_sync(kAllLanes, best == taken ? best_index : ~0u);
    if (index == best_index) advance();
    return int(index);
  }
};

template <int kPerLane>
DEVICE void make_keys(const RouteLogitsParameters& p, float (&x)[kPerLane]) {
  const int lane = threadIdx.x % 32;
  switch (p.method) {
    case RoutingMethod::kDefault:
    case RoutingMethod::kRenormalizeNaive: {
      float top = -INFINITY, sum = 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (j * 32 + lane < p.num_experts) top = fmaxf(top, x[j]);
      top = warp_max(top);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        x[j] = j * 32 + lane < p.num_experts ? expf(x[j] - top) : 0.f;
        sum += x[j];
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) x[j] /= sum;
      return;
    }
    case RoutingMethod::kDeepSeekV3:
    case RoutingMethod::kSigmoidRenorm:
    case RoutingMethod::kMiniMax2:
    case RoutingMethod::kSigmoid:
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) x[j] = sigmoid(x[j]);
      if (p.bias) {
        float bias[kPerLane];
        load_row(bias, p.bias, p.bias_is_f32, 0, p.num_experts);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) x[j] += bias[j];
      }
      return;
    case RoutingMethod::kRenormalize:
    case RoutingMethod::kLlama4:
    case RoutingMethod::kTopK:
      return;
  }
}

// Takes out all experts but those of the groups whose two greatest keys have the greatest sums. `codes`: num_experts +
// num_groups of this warp.
template <int kPerLane>
DEVICE void keep_best_groups(const RouteLogitsParameters& p, Ranking<kPerLane>& experts, uint32_t* codes) {
  constexpr uint32_t kKept = kGone;  // in place of a kept group's score
  const int lane = threadIdx.x % 32;
  uint32_t* scores = codes + p.num_experts;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (j * 32 + lane < p.num_experts) codes[j * 32 + lane] = experts.code[j];
  __syncwarp();

  const int lanes = p.lanes_per_group, first = lane & (lanes - 1), steps = (p.group_size + lanes - 1) / lanes;
  for (int round = 0; round < p.num_groups; round += 32 / lanes) {
    const int group = round + lane / lanes;
    uint32_t high = kGone, low = kGone;
    if (group < p.num_groups) {
      int step = group % steps;  // groups start apart, so that their lanes read other banks
      for (int i = 0; i < steps; ++i) {
        const int index = step * lanes + first;
        const uint32_t code = index < p.group_size ? codes[group * p.group_size + index] : kGone;
        low = max(low, min(high, code));
        high = max(high, code);
        if (++step == steps) step = 0;
      }
    }
    for (int d = lanes / 2; d > 0; d /= 2) {
      const uint32_t other_high = __shfl_xor_sync(kAllLanes, high, d);
      const uint32_t other_low = __shfl_xor_sync(kAllLanes, low, d);
      low = max(min(high, other_high), max(low, other_low));
      high = max(high, other_high);
    }
    if (first == 0 && group < p.num_groups) scores[group] = to_code(to_key(high) + to_key(low));
  }
  __syncwarp();

  Ranking<kPerLane / 2> groups;  // a group has at least two experts
#pragma unroll
  for (int j = 0; j < kPerLane / 2; ++j) groups.code[j] = j * 32 + lane < p.num_groups ? scores[j * 32 + lane] : kGone;
  groups.advance();
  __syncwarp();
  for (int i = 0; i < p.num_kept_groups; ++i) {
    uint32_t score;
    const int group = groups.take(score);
    if (lane == 0) scores[group] = kKept;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t expert = j * 32 + lane;
    // NOTE: the product below is expert / group_size, exactly, for experts and sizes below 2^11.
    if (expert < unsigned(p.num_experts) && scores[expert * p.group_inverse >> 22] != kKept) experts.code[j] = kGone;
  }
}

// The weight of this lane's slot from its value: the key, or the unbiased sigmoid. Lanes from top_k on bring nothing.
DEVICE float make_weight(const RouteLogitsParameters& p, float value) {
  const bool mine = int(threadIdx.x % 32) < p.top_k;
  switch (p.method) {
    case RoutingMethod::kRenormalize: {
      const float top = warp_max(mine ? value : -INFINITY);
      const float power = mine ? expf(value - top) : 0.f;
      return power / warp_sum(power);
    }
    case RoutingMethod::kLlama4:
      return sigmoid(value);
    case RoutingMethod::kDeepSeekV3:
    case RoutingMethod::kMiniMax2:
      return value * p.scaling_factor / (warp_sum(mine ? value : 0.f) + 1e-20f);
    case RoutingMethod::kSigmoidRenorm:
      if (!p.norm_topk_prob) return value;
      return value / warp_sum(mine ? value : 0.f);
    case RoutingMethod::kRenormalizeNaive:
      return value / warp_sum(mine ? value : 0.f);
    case RoutingMethod::kDefault:
    case RoutingMethod::kTopK:
    case RoutingMethod::kSigmoid:
      return value;
  }
  return value;
}

template <int kMaxExperts>
DEVICE void route_token(const RouteLogitsParameters& p) {
  constexpr int kPerLane = kMaxExperts / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = int64_t(blockIdx.x) * kRouteLogitsWarps + warp;
  if (token >= p.num_tokens) return;
  const int64_t row = token * p.num_experts;

  Ranking<kPerLane> experts;
  {
    float x[kPerLane];
    load_row(x, p.logits, p.logits_are_f32, row, p.num_experts);
    make_keys(p, x);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) experts.code[j] = j * 32 + lane < p.num_experts ? to_code(x[j]) : kGone;
  }
  if (p.num_groups > 1) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
    keep_best_groups(p, experts, shared + warp * (p.num_experts + p.num_groups));
  }

  experts.advance();
  int my_expert = 0;
  uint32_t my_code = kNan;
  for (int k = 0; k < p.top_k; ++k) {
    uint32_t code;
    const int expert = experts.take(code);
    if (lane == k) {
      my_expert = expert;
      my_code = code;
    }
  }
  const bool mine = lane < p.top_k;
  float value = to_key(my_code);
  if (p.bias && mine) value = sigmoid(load(p.logits, p.logits_are_f32, row + my_expert));
  const float weight = make_weight(p, value);
  if (mine) {
    p.ids[token * p.top_k + lane] = my_expert;
    p.weights[token * p.top_k + lane] = weight;
  }
}

}  // namespace

__global__ void __launch_bounds__(kRouteLogitsWarps * 32)
    route_logits_256(const __grid_constant__ RouteLogitsParameters p) {
  route_token<256>(p);
}
__global__ void __launch_bounds__(kRouteLogitsWarps * 32)
    route_logits_512(const __grid_constant__ RouteLogitsParameters p) {
  route_token<512>(p);
}
__global__ void __launch_bounds__(kRouteLogitsWarps * 32)
    route_logits_1024(const __grid_constant__ RouteLogitsParameters p) {
  route_token<1024>(p);
}
__global__ void __launch_bounds__(kRouteLogitsWarps * 32)
    route_logits_2048(const __grid_constant__ RouteLogitsParameters p) {
  route_token<2048>(p);
}

}  // namespace jax_moe::cuda
