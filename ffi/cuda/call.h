// What the launch code of a call shares: the problem, its buffers, and the parameters that several kernels take alike.
#pragma once
#include <cuda_runtime.h>

#include "../workspace.h"
#include "kernels/activation.cuh"
#include "kernels/quantize.cuh"
#include "kernels/slots.cuh"
#include "launch.h"
#include "select.h"

namespace jax_moe::cuda {

inline const float* Floats(const Buffer& buffer) { return static_cast<const float*>(buffer.data); }

struct Call {
  const Problem& p;
  const Buffers& buffers;
  const Workspace& workspace;
  const Config& config;
  LaunchStream stream;  // NOTE: every launch of the call goes there, so that enable_pdl is honoured by each

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
  // MxFp8: whether the four scales of a token and 128 columns are a word of memory.
  bool token_scales_are_words() const {
    return p.hidden_states_scale_block_stride == 1 && p.hidden_states_scale_token_stride % kMxScales == 0 &&
           reinterpret_cast<uintptr_t>(buffers.hidden_states_scale.data) % kMxScales == 0;
  }
  // bf16 tokens, to workspace.x and x_scale with rows of scale_pitch scales, or to x_values.
  QuantizeTokens quantize_tokens(int scale_pitch) const {
    const int k_blocks = int(p.hidden_size / kScaleBlock);
    return {static_cast<const uint16_t*>(buffers.hidden_states.data),
            workspace.x,
            workspace.x_scale,
            int(p.num_tokens),
            k_blocks,
            scale_pitch,
            p.mx(),
            config.tokens_are_values ? workspace.x_values : nullptr};
  }
  ActivationChoice activation() const {
    return {ActivationType(p.activation_type), Floats(buffers.gemm1_alpha), Floats(buffers.gemm1_beta),
            Floats(buffers.gemm1_clamp_limit)};
  }
};

}  // namespace jax_moe::cuda
