// What the decode kernels know of routing: the experts that a small call needs, in ascending order, and the rows of
// each: one for every token that names it. Two warps make the two parts from the ids, in shared memory, without waiting
// for each other: the producer needs only the experts.
#pragma once
#include "../../workspace.h"
#include "slots.cuh"

namespace jax_moe::cuda {

inline constexpr int kSlotsPerLane = kMaxDecodeSlots / 32;
static_assert(kMaxDecodeSlots % 32 == 0, "whole warps");

// Local expert of each slot, -1 for none; lane l has slots l, l + 32, ...
DEVICE void load_slot_experts(const SlotExperts& slots, int num_slots, int (&expert)[kSlotsPerLane]) {
  const int lane = threadIdx.x % 32;
  const int64_t first = slots.first_local();
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r) {
    const int i = lane + 32 * r;
    expert[r] = i < num_slots ? slots.local_expert(__ldg(slots.topk_ids + i), first) : -1;
  }
}

struct ActiveExperts {
  int count;
  int32_t expert[kMaxDecodeSlots];  // [count] local experts, ascending

  // By one whole warp; published to that warp. ranks[r] = place in `expert` of this lane's slots, -1 for none.
  DEVICE void build(const int (&experts)[kSlotsPerLane], int num_slots, int (&ranks)[kSlotsPerLane]) {
    const int lane = threadIdx.x % 32;
    unsigned leaders[kSlotsPerLane];  // lanes whose slot is the first to name its expert
    bool leads[kSlotsPerLane];
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r) {
      leads[r] = false, leaders[r] = 0, ranks[r] = experts[r] < 0 ? -1 : 0;
      if (32 * r >= num_slots) continue;
      const unsigned peers = __match_any_sync(~0u, experts[r]);
      leads[r] = experts[r] >= 0 && __ffs(peers) - 1 == lane;
#pragma unroll
      for (int before = 0; before < r; ++before) {
        for (unsigned rest = leaders[before]; rest != 0; rest &= rest - 1)
          leads[r] &= __shfl_sync(~0u, experts[before], __ffs(rest) - 1) != experts[r];
      }
      leaders[r] = __ballot_sync(~0u, leads[r]);
    }
    int total = 0;
#pragma unroll
    for (int source = 0; source < kSlotsPerLane; ++source) {
      total += __popc(leaders[source]);
      for (unsigned rest = leaders[source]; rest != 0; rest &= rest - 1) {
        const int other = __shfl_sync(~0u, experts[source], __ffs(rest) - 1);
#pragma unroll
        for (int r = 0; r < kSlotsPerLane; ++r) ranks[r] += other < experts[r];
      }
    }
#pragma unroll
    for (int r = 0; r < kSlotsPerLane; ++r)
      if (leads[r]) expert[ranks[r]] = experts[r];
    if (lane == 0) count = total;
    __syncwarp();
  }
};

// Rows, sorted by expert, then by token. A token that names an expert more than once has one row there.
struct ActiveRows {
  ActiveExperts experts;
  int16_t begin[kMaxDecodeSlots + 1];              // [count + 1] first row of an expert
  int16_t token[kMaxDecodeSlots];                  // of a row
  int16_t slot[kMaxDecodeSlots];                   // of a row: the first of the token's that name the expert
  int16_t row[kMaxDecodeSlots][kMaxDecodeTokens];  // of an expert and a token, or -1
  float weight[kMaxDecodeSlots];                   // of a row: the sum over all slots that it stands for
  int16_t rank[kMaxDecodeSlots];                   // of a slot's expert; + kRepeated: not the token's first
  static constexpr int kRepeated = 0x4000;

  // By one whole warp; published to that warp. Without `with_weights`, `weight` is left alone.
  DEVICE void build(const SlotExperts& slots, const SlotWeights& weights, bool with_weights, int num_tokens, int top_k);
};

DEVICE void ActiveRows::build(const SlotExperts& slots, const SlotWeights& weights, bool with_weights, int num_tokens,
                              int top_k) {
  const int lane = threadIdx.x % 32, num_slots = num_tokens * top_k;
  int expert[kSlotsPerLane], ranks[kSlotsPerLane];
  load_slot_experts(slots, num_slots, expert);
  experts.build(expert, num_slots, ranks);
  for (int i = lane; i < experts.count * kMaxDecodeTokens; i += 32)
    row[i / kMaxDecodeTokens][i % kMaxDecodeTokens] = -1;
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r) {
    const int i = lane + 32 * r;
    if (i < num_slots) rank[i] = int16_t(ranks[r]);
  }
  __syncwarp();
  bool repeated[kSlotsPerLane];
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r) {
    const int i = lane + 32 * r;
    repeated[r] = false;
    if (i >= num_slots || ranks[r] < 0) continue;
    for (int j = i / top_k * top_k; j < i; ++j) repeated[r] |= rank[j] == ranks[r];
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r)
    if (repeated[r]) rank[lane + 32 * r] = int16_t(ranks[r] + kRepeated);
  __syncwarp();
  // Rows before a rank's, and before a slot's.
  for (int a = lane; a <= experts.count; a += 32) {
    int before = 0;
    for (int j = 0; j < num_slots; ++j) before += rank[j] >= 0 && rank[j] < a;
    begin[a] = int16_t(before);
  }
#pragma unroll
  for (int r = 0; r < kSlotsPerLane; ++r) {
    const int i = lane + 32 * r;
    if (i >= num_slots || ranks[r] < 0 || repeated[r]) continue;
    int at = 0;
    for (int j = 0; j < num_slots; ++j) at += rank[j] >= 0 && (rank[j] < ranks[r] || (rank[j] == ranks[r] && j < i));
    token[at] = int16_t(i / top_k);
    slot[at] = int16_t(i);
    row[ranks[r]][i / top_k] = int16_t(at);
    if (!with_weights) continue;
    float sum = weights.at(i);
    for (int j = i + 1; j < (i / top_k + 1) * top_k; ++j)
      if (rank[j] == ranks[r] + kRepeated) sum += weights.at(j);
    weight[at] = sum;
  }
  __syncwarp();
}

}  // namespace jax_moe::cuda
