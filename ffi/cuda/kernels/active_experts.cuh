// What the decode kernels know of routing: the experts that a small call needs, in ascending order, and the tokens that
// name each. Two warps make the two parts from the ids, in shared memory, without waiting for each other: whoever
// streams weights needs only the experts. Nothing here loops over slots: at one token this is a visible part of a call.
#pragma once
#include "../../workspace.h"
#include "slots.cuh"

namespace jax_moe::cuda {

inline constexpr int kSlotsPerLane = kMaxDecodeSlots / 32;
inline constexpr int kWordsPerLane = kMaxDecodeExperts / 32 / 32;
static_assert(kMaxDecodeSlots % 32 == 0 && kMaxDecodeExperts % 1024 == 0 && kMaxDecodeTokens <= 16, "whole warps");

// Local expert of each slot, -1 for none; lane l has slots l, l + 32, ... NOTE: all ids are asked for at once.
DEVICE void load_slot_experts(const SlotExperts& slots, int num_slots, int (&expert)[kSlotsPerLane]) {
  const int lane = threadIdx.x % 32;
  const int64_t first = slots.first_local();
  int32_t id[kSlotsPerLane];
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r) id[r] = __ldcg(slots.topk_ids + min(lane + 32 * r, num_slots - 1));
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r) {
    const int found = slots.local_expert(id[r], first);
    expert[r] = lane + 32 * r < num_slots ? found : -1;
  }
}

struct ActiveExperts {
  int count;
  int32_t expert[kMaxDecodeSlots];         // [count] local experts, ascending
  uint32_t named[kMaxDecodeExperts / 32];  // a bit an expert
  int32_t before[kMaxDecodeExperts / 32];  // bits in the words before

  // By one whole warp; published to that warp. ranks[r] = place in `expert` of the expert of this lane's slots, or -1.
  DEVICE void build(const int (&experts)[kSlotsPerLane], int (&ranks)[kSlotsPerLane]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int w = 0; w < kWordsPerLane; ++w) named[lane * kWordsPerLane + w] = 0;
    __syncwarp();
    bool leads[kSlotsPerLane];  // whichever slot comes first
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r) {
      const uint32_t bit = 1u << (experts[r] & 31);
      leads[r] = experts[r] >= 0 && !(atomicOr(&named[experts[r] / 32], bit) & bit);
    }
    __syncwarp();
    int mine = 0;
#pragma unroll
    for (int w = 0; w < kWordsPerLane; ++w) mine += __popc(named[lane * kWordsPerLane + w]);
    int sum = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += below;
    }
    if (lane == 31) count = sum;
    sum -= mine;
#pragma unroll
    for (int w = 0; w < kWordsPerLane; ++w) {
      before[lane * kWordsPerLane + w] = sum;
      sum += __popc(named[lane * kWordsPerLane + w]);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r) {
      ranks[r] = -1;
      if (experts[r] < 0) continue;
      const int word = experts[r] / 32;
      ranks[r] = before[word] + __popc(named[word] & ((1u << experts[r] % 32) - 1));
      if (leads[r]) expert[ranks[r]] = experts[r];
    }
    __syncwarp();
  }
};

// A token that names an expert more than once counts once, with the sum of the weights.
struct ActiveTokens {
  ActiveExperts experts;
  uint32_t tokens[kMaxDecodeSlots];                 // of an expert: a bit a token
  int16_t slot[kMaxDecodeSlots][kMaxDecodeTokens];  // of an expert and a token that names it: the first such slot
  DEVICE bool names(int a, int token) const { return tokens[a] >> token & 1; }  // token < 32

  // By one whole warp; published to that warp. `weight` (may be null) gets, at a * num_tokens + token, the sum of the
  // weights of the token's slots that name expert a.
  DEVICE void build(const SlotExperts& slots, const SlotWeights& weights, float* weight, int num_tokens, int top_k) {
    const int lane = threadIdx.x % 32, num_slots = num_tokens * top_k;
    int expert[kSlotsPerLane], ranks[kSlotsPerLane];
    float slot_weight[kSlotsPerLane];
    load_slot_experts(slots, num_slots, expert);
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r)
      slot_weight[r] = weight && lane + 32 * r < num_slots ? weights.at(lane + 32 * r) : 0.f;
    experts.build(expert, ranks);
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r) tokens[lane + 32 * r] = 0;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r) {
      if (32 * r >= num_slots) break;
      const int i = lane + 32 * r, token = i / top_k;
      const bool named_before = ranks[r] >= 0 && names(ranks[r], token);
      const unsigned alike = __match_any_sync(~0u, ranks[r] < 0 ? -1 : ranks[r] * kMaxDecodeTokens + token);
      const bool first = ranks[r] >= 0 && !named_before && __ffs(alike) - 1 == lane;
      __syncwarp();
      if (first) {
        atomicOr(&tokens[ranks[r]], 1u << token);
        slot[ranks[r]][token] = int16_t(i);
        if (weight) weight[ranks[r] * num_tokens + token] = slot_weight[r];
      }
      __syncwarp();
      // Repeated names, one after the other.
      for (unsigned rest = __ballot_sync(~0u, weight && ranks[r] >= 0 && !first); rest != 0; rest &= rest - 1) {
        if (__ffs(rest) - 1 == lane) weight[ranks[r] * num_tokens + token] += slot_weight[r];
        __syncwarp();
      }
    }
  }
};

}  // namespace jax_moe::cuda
