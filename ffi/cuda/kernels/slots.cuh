// What the caller says of a slot (token t, k): its local expert and its routing weight. Ids are never used as indices
// before they are checked here, so any bit pattern is safe. Read past L1: a kernel may start before the caller's one
// that wrote them has ended.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

struct SlotExperts {
  const int32_t* topk_ids;             // [T * K], (id << 16) | bf16 when packed, else ids
  const int32_t* local_expert_offset;  // on the device, or null: `offset`
  int64_t offset;
  bool packed;
  int num_experts;
  int local_num_experts;  // L

  DEVICE int64_t first_local() const { return local_expert_offset ? int64_t(__ldcg(local_expert_offset)) : offset; }

  // The local expert of an element of topk_ids, or -1; `first` is first_local().
  DEVICE int local_expert(int element, int64_t first) const {
    const int64_t id = packed ? element >> 16 : element, local = id - first;
    return id >= 0 && id < num_experts && local >= 0 && local < local_num_experts ? int(local) : -1;
  }
};

// Where a slot's routing weight is: the low 16 bits of a packed id (bf16), or an array of its own.
enum class WeightsType { kPacked, kBFloat16, kFloat32 };

struct SlotWeights {
  const void* weights;  // [T * K] of `type`
  WeightsType type;

  DEVICE float at(int64_t slot) const {
    switch (type) {
      case WeightsType::kPacked:
        return __uint_as_float(uint32_t(__ldcg(static_cast<const int32_t*>(weights) + slot)) << 16);
      case WeightsType::kBFloat16:
        return __uint_as_float(uint32_t(__ldcg(static_cast<const uint16_t*>(weights) + slot)) << 16);
      default:
        return __ldcg(static_cast<const float*>(weights) + slot);
    }
  }
};

}  // namespace jax_moe::cuda
