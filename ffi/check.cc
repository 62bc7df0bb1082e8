// What is checked of a call in C++: only what could corrupt memory (sizes, alignment) or compute something else than
// was asked (options that this build does not have). Full argument checks with their words are in jax_moe/problem.py.
#include <cstring>

#include "moe.h"

namespace jax_moe {

Status CheckBuffer(const char* name, const Buffer& buffer, int64_t bytes, int64_t alignment) {
  if (bytes == 0) return {};
  if (buffer.data == nullptr || buffer.bytes < bytes)
    return Status::Invalid(std::string(name) + " must hold " + std::to_string(bytes) + " bytes, got " +
                           std::to_string(buffer.data ? buffer.bytes : 0));
  if (reinterpret_cast<uintptr_t>(buffer.data) % alignment != 0)
    return Status::Invalid(std::string(name) + " must be aligned to " + std::to_string(alignment) + " bytes");
  return {};
}

namespace {

constexpr int64_t kAlignment = 16;  // TMA, cp.async and 16-byte stores

Status CheckOptions(const Problem& p) {
  const auto is = [](int64_t value, auto... members) { return ((value == int64_t(members)) || ...); };
  if (!is(p.fp8_quantization_type, Fp8QuantizationType::kDeepSeekFp8, Fp8QuantizationType::kMxFp8))
    return Status::Invalid("fp8_quantization_type must be DeepSeekFp8 or MxFp8");
  if (!is(p.activation_type, ActivationType::kSwiglu, ActivationType::kGeglu, ActivationType::kRelu2,
          ActivationType::kIdentity))
    return Status::Invalid("activation_type must be Swiglu, Geglu, Relu2 or Identity");
  if (!is(p.weight_layout, WeightLayout::kMajorK, WeightLayout::kBlockMajorK))
    return Status::Invalid("weight_layout must be MajorK or BlockMajorK");
  if (p.mx() && p.block_major_k()) return Status::Invalid("weight_layout must be MajorK with MxFp8");
  if (p.mx() ? !is(p.weights_scale_rows, 1, 32) : !is(p.weights_scale_rows, kScaleBlock))
    return Status::Invalid("weights_scale_rows must be 128 with DeepSeekFp8 and 1 or 32 with MxFp8");
  if (!is(p.hidden_states_dtype, DataType::kFloat8E4M3, DataType::kBFloat16))
    return Status::Invalid("hidden_states must be float8_e4m3fn or bfloat16");
  if (!is(p.topk_weights_dtype, DataType::kNone, DataType::kBFloat16, DataType::kFloat32))
    return Status::Invalid("topk_weights must be bfloat16 or float32");
  return {};
}

Status CheckSizes(const Problem& p) {
  const bool positive = p.num_tokens >= 0 && p.hidden_size > 0 && p.intermediate_size > 0 && p.local_num_experts > 0;
  if (!positive || p.hidden_size % kScaleBlock || p.intermediate_size % kScaleBlock)
    return Status::Invalid("hidden_size and intermediate_size must be positive multiples of 128");
  if (p.top_k < 1 || p.top_k > kMaxTopK || p.num_experts > 32767 || p.local_num_experts > p.num_experts)
    return Status::Invalid("top_k must be in [1, 32] and local_num_experts in [1, num_experts]");
  // Permuted rows, weight rows and column blocks are 32-bit in the kernels; byte offsets are 64-bit everywhere.
  const int64_t limit = (int64_t(1) << 31) - 1024;
  if (p.num_tokens > limit / p.top_k || p.hidden_size > limit / 2 || p.intermediate_size > limit / 2 ||
      p.gemm1_rows() > limit / p.local_num_experts || p.hidden_size > limit / p.local_num_experts)
    return Status::Invalid("num_tokens * top_k and the weight rows of all experts must be below 2^31");
  return {};
}

}  // namespace

Status CheckBuffers(const Problem& p, const Buffers& b) {
  if (Status s = CheckOptions(p); !s.ok()) return s;
  if (Status s = CheckSizes(p); !s.ok()) return s;
  const int64_t T = p.num_tokens, H = p.hidden_size, I = p.intermediate_size, L = p.local_num_experts;
  const int64_t M = p.gemm1_rows(), rows = p.expanded_rows();
  const int64_t h_blocks = H / p.scale_block(), i_blocks = I / p.scale_block();
  const int64_t scale_bytes = p.mx() ? 1 : 4, weights_scale_alignment = p.mx() ? kAlignment : 4;
  const int64_t x_bytes = p.hidden_states_are_bf16() ? 2 : 1;
  const int64_t scale_elements =
      T == 0 || p.hidden_states_are_bf16()
          ? 0
          : (h_blocks - 1) * p.hidden_states_scale_block_stride + (T - 1) * p.hidden_states_scale_token_stride + 1;
  if (p.hidden_states_scale_block_stride < 0 || p.hidden_states_scale_token_stride < 0)
    return Status::Invalid("hidden_states_scale must have non-negative strides");
  const int64_t weight_bytes = ElementBytes(p.topk_weights_dtype);
  const bool finalize = p.do_finalize, lora = p.has_gemm1_lora_delta;
  const auto per_expert = [&](const Buffer& b) { return b.data ? L * 4 : 0; };
  const struct {
    const char* name;
    const Buffer& buffer;
    int64_t bytes, alignment;
  } expected[] = {
      {"topk_ids", b.topk_ids, rows * 4, 4},
      {"topk_weights", b.topk_weights, rows * weight_bytes, weight_bytes},
      {"hidden_states", b.hidden_states, T * H * x_bytes, kAlignment},
      {"hidden_states_scale", b.hidden_states_scale, scale_elements * scale_bytes, scale_bytes},
      {"gemm1_weights", b.gemm1_weights, L * M * H, kAlignment},
      {"gemm1_weights_scale", b.gemm1_weights_scale, L * (M / p.weights_scale_rows) * h_blocks * scale_bytes,
       weights_scale_alignment},
      {"gemm2_weights", b.gemm2_weights, L * H * I, kAlignment},
      {"gemm2_weights_scale", b.gemm2_weights_scale, L * (H / p.weights_scale_rows) * i_blocks * scale_bytes,
       weights_scale_alignment},
      {"gemm1_lora_delta", b.gemm1_lora_delta, lora ? rows * M * 2 : 0, kAlignment},
      {"gemm1_alpha", b.gemm1_alpha, per_expert(b.gemm1_alpha), 4},
      {"gemm1_beta", b.gemm1_beta, per_expert(b.gemm1_beta), 4},
      {"gemm1_clamp_limit", b.gemm1_clamp_limit, per_expert(b.gemm1_clamp_limit), 4},
      {"local_expert_offset", b.local_expert_offset, b.local_expert_offset.data ? 4 : 0, 4},
      {"output", b.output, finalize ? T * H * 2 : 0, kAlignment},
      {"gemm2_output", b.gemm2_output, finalize ? 0 : rows * H * 2, kAlignment},
      {"expert_weights", b.expert_weights, finalize || weight_bytes ? 0 : rows * 2, 2},
      {"expanded_idx_to_permuted_idx", b.expanded_idx_to_permuted_idx, finalize && !lora ? 0 : rows * 4, 4},
      {"gemm1_activation_output", b.gemm1_activation_output, lora ? rows * I : 0, kAlignment},
      {"gemm1_activation_scale", b.gemm1_activation_scale, lora ? I / kScaleBlock * p.scale_stride() * 4 : 0,
       kAlignment},
      {"workspace", b.workspace, T == 0 ? 0 : WorkspaceSize(p).at(T), 1},
  };
  for (const auto& e : expected)
    if (Status s = CheckBuffer(e.name, e.buffer, e.bytes, e.alignment); !s.ok()) return s;
  return {};
}

std::string AbiText() {
  std::string text = "fields:";
#define FIELD(name) text += " " #name;
  JAX_MOE_PROBLEM_FIELDS(FIELD)
#undef FIELD
#define BUFFER(name) text += " " #name;
  text += "\ninputs:";
  JAX_MOE_INPUTS(BUFFER)
  text += "\noutputs:";
  JAX_MOE_OUTPUTS(BUFFER)
#undef BUFFER
  const auto value = [&](const char* name, auto v) {
    text += std::string(" ") + name + "=" + std::to_string(int64_t(v));
  };
  text += "\nenums:";
  value("DataType.NONE", DataType::kNone);
  value("DataType.FLOAT8_E4M3", DataType::kFloat8E4M3);
  value("DataType.BFLOAT16", DataType::kBFloat16);
  value("DataType.FLOAT32", DataType::kFloat32);
  value("Fp8QuantizationType.NoneFp8", Fp8QuantizationType::kNoneFp8);
  value("Fp8QuantizationType.DeepSeekFp8", Fp8QuantizationType::kDeepSeekFp8);
  value("Fp8QuantizationType.MxFp8", Fp8QuantizationType::kMxFp8);
  value("ActivationType.Swiglu", ActivationType::kSwiglu);
  value("ActivationType.Geglu", ActivationType::kGeglu);
  value("ActivationType.Relu2", ActivationType::kRelu2);
  value("ActivationType.Identity", ActivationType::kIdentity);
  value("WeightLayout.MajorK", WeightLayout::kMajorK);
  value("WeightLayout.MajorMn", WeightLayout::kMajorMn);
  value("WeightLayout.BlockMajorK", WeightLayout::kBlockMajorK);
  return text;
}

}  // namespace jax_moe
