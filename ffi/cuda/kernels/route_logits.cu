// Keys of a token's experts, the top_k of them by repeated warp maxima, then the weights, one slot a lane.
// NOTE: sums are made in the same order as in ffi/cpu/route_logits.cc: 32 partial sums, then halves onto halves.
#include "route_logits.cuh"

namespace jax_moe::cuda {
namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr uint32_t kGone = 0;  // less than the code of any key
constexpr uint32_t kNan = 1;   // less than that of -inf

DEVICE uint32_t to_code(float key) {
  const uint32_t bits = __float_as_uint(key + 0.f);  // NOTE: -0 becomes 0, with which it ties
  const uint32_t code = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  return key != key ? kNan : code;
}
DEVICE float to_key(uint32_t code) {
  if (code == kNan) return __uint_as_float(0x7FFFFFFFu);
  return __uint_as_float(code & 0x80000000u ? code & 0x7FFFFFFFu : ~code);
}

// Of the first `count` lanes, for them; those behind bring 0.
DEVICE float warp_sum(float v, int count) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2)
    if (d < 8 || count > 8) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}
// NaN only if all are.
DEVICE float warp_max(float v) { return to_key(__reduce_max_sync(kAllLanes, to_code(v))); }

DEVICE float sigmoid(float x) { return __frcp_rn(1.f + expf(-x)); }

// The sigmoids of all, bit by bit. NOTE: these are the steps of __frcp_rn, which asks each element whether its
// reciprocal is denormal; here the warp asks once.
template <int kCount>
DEVICE void to_sigmoids(float (&x)[kCount]) {
  bool plain = true;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    x[j] = 1.f + expf(-x[j]);
    plain &= x[j] < 0x1p126f;
  }
  if (__all_sync(kAllLanes, plain)) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float r = approximate_reciprocal(x[j]);
      x[j] = __fmaf_rn(r, __fmaf_rn(-x[j], r, 1.f), r);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = __frcp_rn(x[j]);
  }
}

// x / by of all, likewise; 0 <= x <= 1 <= by <= 2^11, or NaN.
template <int kCount>
DEVICE void divide(float (&x)[kCount], float by) {
  bool plain = true;
#pragma unroll
  for (int j = 0; j < kCount; ++j) plain &= x[j] == 0.f || x[j] > 0x1p-80f;
  if (__all_sync(kAllLanes, plain)) {
    const float r = __frcp_rn(by);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float q = __fmul_rn(x[j], r);
      x[j] = __fmaf_rn(__fmaf_rn(-by, q, x[j]), r, q);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = __fdiv_rn(x[j], by);
  }
}

// A row of f32 or bf16, every 32nd element to a lane. NOTE: what comes from memory is shifted where it is used, so that
// a second row is asked for before the first is there. Read past L1: the kernel that writes it may have overlapped.
template <int kPerLane>
struct Row {
  uint32_t bits[kPerLane];
  int shift;

  DEVICE void load(const void* p, bool is_f32, int64_t first, int count, float absent) {
    const int lane = threadIdx.x % 32, left = count - lane;
    shift = is_f32 ? 0 : 16;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) bits[j] = __float_as_uint(absent) >> shift;
    if (is_f32)
      load_as(static_cast<const uint32_t*>(p) + first + lane, left);
    else
      load_as(static_cast<const uint16_t*>(p) + first + lane, left);
  }
  DEVICE float at(int j) const { return __uint_as_float(bits[j] << shift); }

 private:
  template <class T>
  DEVICE void load_as(const T* from, int left) {
    hide(from);  // one address, not one for each element
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (j * 32 < left) bits[j] = __ldcg(from + j * 32);
  }
};

// An expert's code, then its index inverted: of equal codes the smaller index has the greater rank.
DEVICE uint64_t to_rank(uint32_t code, uint32_t index) { return uint64_t(code) << 32 | (~index & 0xFFFFu); }
DEVICE uint32_t code_of(uint64_t rank) { return uint32_t(rank >> 32); }
DEVICE int index_of(uint64_t rank) { return int(~uint32_t(rank) & 0xFFFFu); }

DEVICE void order(uint64_t& high, uint64_t& low) {
  const uint64_t a = high, b = low;
  const bool right = a > b;
  high = right ? a : b;
  low = right ? b : a;
}
// The greatest first, by merging sorted parts of 1, 2, 4 and so on (Batcher).
template <int kCount>
DEVICE void sort(uint64_t* v) {
#pragma unroll
  for (int part = 1; part < kCount; part *= 2) {
#pragma unroll
    for (int apart = part; apart > 0; apart /= 2) {
#pragma unroll
      for (int i = 0; i + apart < kCount; ++i) {
        const int j = i + apart;
        if (i >= apart % part && (i - apart % part) / apart % 2 == 0 && i / (2 * part) == j / (2 * part))
          order(v[i], v[j]);
      }
    }
  }
}

// The count greatest ranks of all lanes, one after the other, to the lanes of that number. `v`: in descending order.
template <int kCount>
DEVICE uint64_t take_greatest(uint64_t (&v)[kCount], int count) {
  const unsigned me = 1u << threadIdx.x % 32;
  uint64_t mine = 0;
  uint32_t greatest = __reduce_max_sync(kAllLanes, code_of(v[0]));
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const uint64_t first = v[0];
    const bool ties = code_of(first) == greatest;
    unsigned takers = __ballot_sync(kAllLanes, ties);
    if (takers & (takers - 1)) {
      const uint32_t last = __reduce_max_sync(kAllLanes, ties ? uint32_t(first) : 0);
      takers = __ballot_sync(kAllLanes, ties && uint32_t(first) == last);
    }
    const bool taken = takers == me;  // NOTE: several, of no expert, take nothing
    if (taken) v[0] = v[1];
    const uint32_t next = __reduce_max_sync(kAllLanes, code_of(v[0]));
    const uint32_t low = __shfl_sync(kAllLanes, uint32_t(first), 31 - __clz(takers));
    if (me == 1u << k) mine = uint64_t(greatest) << 32 | low;
    if (taken) {
#pragma unroll
      for (int i = 1; i + 1 < kCount; ++i) v[i] = v[i + 1];
      v[kCount - 1] = 0;
    }
    greatest = next;
  }
  return mine;
}

// The ranks of the top_k greatest codes, code j of a lane being of index j * 32 + lane.
template <int kPerLane>
DEVICE uint64_t choose(const uint32_t (&code)[kPerLane], int top_k) {
  constexpr int kSorted = kPerLane < 8 ? kPerLane : 8;  // at a time
  uint64_t mine = 0;
#pragma unroll
  for (int first = 0; first < kPerLane; first += kSorted) {
    uint64_t v[kSorted + 1];
#pragma unroll
    for (int i = 0; i < kSorted; ++i) v[i] = to_rank(code[first + i], (first + i) * 32 + threadIdx.x % 32);
    sort<kSorted>(v);
    v[kSorted] = mine;  // of those before
    if (first > 0)
#pragma unroll
      for (int i = kSorted; i > 0; --i) order(v[i - 1], v[i]);
    mine = take_greatest(v, top_k);
  }
  return mine;
}

// Shares of a softmax over all experts; x of those that are not there is -inf.
template <int kPerLane>
DEVICE void to_softmax(float (&x)[kPerLane]) {
  float top = -INFINITY, sum = 0.f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) top = fmaxf(top, x[j]);
  top = warp_max(top);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    x[j] = expf(x[j] - top);
    sum += x[j];
  }
  divide(x, warp_sum(sum, 32));
}

// `unbiased`: num_experts of this warp, where there is a bias; they get the keys without it.
template <int kPerLane>
DEVICE void make_keys(const RouteLogitsParameters& p, int64_t row, float (&x)[kPerLane], float* unbiased) {
  const bool softmax = p.key == RoutingKey::kSoftmax;
  Row<kPerLane> logits, bias;
  logits.load(p.logits, p.logits_are_f32, row, p.num_experts, softmax ? -INFINITY : 0.f);
  if (p.bias) bias.load(p.bias, p.bias_is_f32, 0, p.num_experts, 0.f);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = logits.at(j);
  if (softmax) to_softmax(x);
  if (p.key == RoutingKey::kSigmoid) to_sigmoids(x);
  if (!p.bias) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j * 32 < p.num_experts - lane) unbiased[j * 32 + lane] = x[j];
    x[j] += bias.at(j);
  }
  __syncwarp();
}

// Takes out all experts but those of the groups whose two greatest keys have the greatest sums. `codes`: num_experts +
// num_groups of this warp.
template <int kPerLane>
DEVICE void keep_best_groups(const RouteLogitsParameters& p, uint32_t (&code)[kPerLane], uint32_t* codes) {
  const int lane = threadIdx.x % 32, left = p.num_experts - lane;
  uint32_t *scores = codes + p.num_experts, *kept = codes;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (j * 32 < left) codes[j * 32 + lane] = code[j];
  __syncwarp();

  const int lanes = 1 << p.group_lane_bits, first = lane & (lanes - 1), in_round = lane >> p.group_lane_bits;
  for (int round = 0; round < p.num_groups; round += 32 >> p.group_lane_bits) {
    const int group = round + in_round;
    uint32_t high = kGone, low = kGone;
    if (group < p.num_groups) {
      int step = in_round < p.group_steps ? in_round : 0;  // groups start apart, so that their lanes read other banks
#pragma unroll 8
      for (int i = 0; i < p.group_steps; ++i) {
        const int index = step * lanes + first;
        const uint32_t code = index < p.group_size ? codes[group * p.group_size + index] : kGone;
        low = max(low, min(high, code));
        high = max(high, code);
        if (++step == p.group_steps) step = 0;
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

  // A group is kept if fewer than num_kept_groups come before it.
  for (int group = lane; group < p.num_groups; group += 32) {
    const uint32_t score = scores[group];
    int before = 0;
#pragma unroll 8
    for (int other = 0; other < p.num_groups; ++other)
      before += scores[other] > score || (scores[other] == score && other < group);
    kept[group] = before < p.num_kept_groups;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t expert = min(j * 32 + lane, p.num_experts - 1);
    // NOTE: the product below is expert / group_size, exactly, for experts and sizes below 2^11.
    if (!kept[expert * p.group_inverse >> 22]) code[j] = kGone;
  }
}

// The weight of this lane's slot from its value. Lanes from top_k on bring nothing.
DEVICE float make_weight(const RouteLogitsParameters& p, float value) {
  if (!p.weights_are_shares) return value;
  if (p.value_is_power) value = expf(value - __shfl_sync(kAllLanes, value, 0));
  const float sum = warp_sum(int(threadIdx.x % 32) < p.top_k ? value : 0.f, p.top_k);
  return value * p.factor / (sum + p.epsilon);
}

template <int kMaxExperts>
DEVICE void route_token(const RouteLogitsParameters& p) {
  constexpr int kPerLane = kMaxExperts / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = int64_t(blockIdx.x) * kRouteLogitsWarps + warp, row = token * p.num_experts;
  // NOTE: before the wait: the kernels that read ids wait for this one first, and so for what it waits for.
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (token >= p.num_tokens) return;

  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory()) + warp * p.shared_words;
  float* unbiased = reinterpret_cast<float*>(shared);
  uint32_t code[kPerLane];
  {
    float x[kPerLane];
    make_keys(p, row, x, unbiased);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) code[j] = j * 32 < p.num_experts - lane ? to_code(x[j]) : kGone;
  }
  if (p.num_groups > 1) keep_best_groups(p, code, shared + (p.bias ? p.num_experts : 0));

  const uint64_t rank = choose(code, p.top_k);
  const bool mine = lane < p.top_k;
  const int expert = index_of(rank);
  float value = p.bias && mine ? unbiased[expert] : to_key(code_of(rank));
  if (p.value_is_sigmoid) value = sigmoid(value);
  const float weight = make_weight(p, value);
  if (mine) {
    p.ids[token * p.top_k + lane] = expert;
    p.weights[token * p.top_k + lane] = weight;
  }
}

}  // namespace

__global__ void __launch_bounds__(kRouteLogitsWarps * 32)
    route_logits_128(const __grid_constant__ RouteLogitsParameters p) {
  route_token<128>(p);
}
__global__ void __launch_bounds__(kRouteLogitsWarps * 32)
    route_logits_256(const __grid_constant__ RouteLogitsParameters p) {
  route_token<256>(p);
}
__global__ void __launch_bounds__(kRouteLogitsWarps * 32, 8)  // NOTE: unbound, it would get 56 registers, too few
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
