// What the launch code of a call shares: the problem, its buffers, and the parameters that several kernels take alike.
#pragma once
#include <cuda_runtime.h>

#include "../workspace.h"
#include "kernels/activation.cuh"
#include "kernels/slots.cuh"
#include "select.h"

namespace jax_moe::cuda {

inline const float* Floats(const Buffer& buffer) { return static_cast<const float*>(buffer.data); }

struct Call {
  const Problem& p;
  const Buffers& buffers;
  const Workspace& workspace;
  const Config& config;
  cudaStream_t stream;

  SlotExperts slot_experts() const {
    return {static_cast<const int32_t*>(buffers.topk_ids.data),
            static_cast<const int32_t*>(buffers.local_expert_offset.data),
            p.local_expert_offset,
            p.topk_weights_dtype == int64_t(DataType::kNone),
            int(p.num_experts),
            int(p.local_num_experts)};
  }
  SlotWeights slot_weights() const {
    if (p.topk_weights_dtype == int64_t(DataType::kNone)) return {buffers.topk_ids.data, WeightsType::kPacked};
    const bool bf16 = p.topk_weights_dtype == int64_t(DataType::kBFloat16);
    return {buffers.topk_weights.data, bf16 ? WeightsType::kBFloat16 : WeightsType::kFloat32};
  }
  ActivationChoice activation() const {
    return {ActivationType(p.activation_type), Floats(buffers.gemm1_alpha), Floats(buffers.gemm1_beta),
            Floats(buffers.gemm1_clamp_limit)};
  }
};

}  // namespace jax_moe::cuda
