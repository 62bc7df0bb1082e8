// The C++ contract, in one page: what a call is (Problem), where its arrays are (Buffers), how it ends (Status), and
// the functions of a backend. jax_moe/problem.py states the same fields, enums and buffer order; AbiText() is compared
// with it when the extension is loaded, so that the two cannot drift apart.
// Notation: T = num_tokens, K = top_k, H = hidden_size, I = intermediate_size, L = local_num_experts.
#pragma once
#include <cstdint>
#include <string>

namespace jax_moe {

enum class DataType : int64_t { kNone = 0, kFloat8E4M3 = 1, kBFloat16 = 2, kFloat32 = 3 };
enum class Fp8QuantizationType : int64_t { kNoneFp8 = 0, kDeepSeekFp8 = 1, kMxFp8 = 2 };
enum class ActivationType : int64_t { kSwiglu = 3, kGeglu = 4, kRelu2 = 6, kIdentity = 7 };
enum class WeightLayout : int64_t { kMajorK = 0, kMajorMn = 1, kBlockMajorK = 2 };

// Of the float types that arrays apart from the weights may have; 0 for others.
inline int64_t ElementBytes(int64_t dtype) {
  return dtype == int64_t(DataType::kFloat32) ? 4 : dtype == int64_t(DataType::kBFloat16) ? 2 : 0;
}

// Columns that share one scale with DeepSeekFp8 (float32), also the K extent of a step of the GEMMs; and with MxFp8
// (E8M0: byte b is 2^(b - 127), 255 is NaN).
inline constexpr int64_t kScaleBlock = 128;
inline constexpr int64_t kMxScaleBlock = 32;
inline constexpr int64_t kMaxTopK = 32;

// One line a field: everything that a backend has to know of a call. All are int64 so that Python can hand them over
// as one list. hidden_states_scale_*_stride count elements: [H/128, T] has block stride T and token stride 1.
// weights_scale_rows share a weight scale: 128, with MxFp8 1 or 32. local_expert_offset is used when
// Buffers::local_expert_offset is null. topk_weights_dtype kNone: topk_ids are packed. batch_invariant: a token's bits
// depend on nothing of the other tokens, their number included. enable_pdl: kernels may overlap the one before.
#define JAX_MOE_PROBLEM_FIELDS(FIELD)     \
  FIELD(num_tokens)                       \
  FIELD(hidden_size)                      \
  FIELD(intermediate_size)                \
  FIELD(num_experts)                      \
  FIELD(top_k)                            \
  FIELD(local_num_experts)                \
  FIELD(local_expert_offset)              \
  FIELD(topk_weights_dtype)               \
  FIELD(hidden_states_dtype)              \
  FIELD(hidden_states_scale_block_stride) \
  FIELD(hidden_states_scale_token_stride) \
  FIELD(weights_scale_rows)               \
  FIELD(fp8_quantization_type)            \
  FIELD(activation_type)                  \
  FIELD(weight_layout)                    \
  FIELD(use_shuffled_weight)              \
  FIELD(has_gemm1_lora_delta)             \
  FIELD(do_finalize)                      \
  FIELD(batch_invariant)                  \
  FIELD(enable_pdl)

// Operands then results, in the order of the XLA custom call. Absent arrays have null data and zero bytes.
// M = 2I (gated: up rows, then gate rows) or I. Shapes of weights are those of MajorK; BlockMajorK is [L, K/128, rows,
// 128]. Scales are those of DeepSeekFp8. MxFp8, all E8M0 bytes: hidden_states_scale [T, H/32], strided; weights
// [L, rows / weights_scale_rows, K/32]; gemm1_activation_scale [I/128, scale_stride(), 4], four where a float32 is.
#define JAX_MOE_INPUTS(BUFFER)                                                                         \
  BUFFER(topk_ids)            /* int32 [T, K]: packed (id << 16) | bf16, or ids beside topk_weights */ \
  BUFFER(topk_weights)        /* bf16 or f32 [T, K], or absent                                      */ \
  BUFFER(hidden_states)       /* e4m3 or bf16 [T, H]                                                */ \
  BUFFER(hidden_states_scale) /* f32 [H/128, T], strided; absent with bf16                          */ \
  BUFFER(gemm1_weights)       /* e4m3 [L, M, H]                                                     */ \
  BUFFER(gemm1_weights_scale) /* f32 [L, M/128, H/128]                                              */ \
  BUFFER(gemm2_weights)       /* e4m3 [L, H, I]                                                     */ \
  BUFFER(gemm2_weights_scale) /* f32 [L, H/128, I/128]                                              */ \
  BUFFER(gemm1_lora_delta)    /* bf16 [T, K, M] in slot order and original row order, or absent     */ \
  BUFFER(gemm1_alpha)         /* f32 [L], or absent: 1                                              */ \
  BUFFER(gemm1_beta)          /* f32 [L], or absent: 0                                              */ \
  BUFFER(gemm1_clamp_limit)   /* f32 [L], or absent: no clamp                                       */ \
  BUFFER(local_expert_offset) /* int32 [], absent: Problem's value                                  */
#define JAX_MOE_OUTPUTS(BUFFER)                                                                    \
  BUFFER(output)                       /* bf16 [T, H], with do_finalize                        */  \
  BUFFER(gemm2_output)                 /* bf16 [T*K, H], without                               */  \
  BUFFER(expert_weights)               /* bf16 [T, K], without do_finalize, packed ids only    */  \
  BUFFER(expanded_idx_to_permuted_idx) /* int32 [T*K], without do_finalize or with LoRA        */  \
  BUFFER(gemm1_activation_output)      /* e4m3 [T*K, I], with LoRA                             */  \
  BUFFER(gemm1_activation_scale)       /* f32 [I/128, scale_stride()], with LoRA                */ \
  BUFFER(workspace)                    /* uint8 [WorkspaceSize], undefined before and after    */

struct Problem {
#define FIELD(name) int64_t name = 0;
  JAX_MOE_PROBLEM_FIELDS(FIELD)
#undef FIELD

  int64_t expanded_rows() const { return num_tokens * top_k; }
  bool hidden_states_are_bf16() const { return hidden_states_dtype == int64_t(DataType::kBFloat16); }
  bool gated() const {
    return activation_type == int64_t(ActivationType::kSwiglu) || activation_type == int64_t(ActivationType::kGeglu);
  }
  bool mx() const { return fp8_quantization_type == int64_t(Fp8QuantizationType::kMxFp8); }
  int64_t scale_block() const { return mx() ? kMxScaleBlock : kScaleBlock; }
  bool block_major_k() const { return weight_layout == int64_t(WeightLayout::kBlockMajorK); }
  int64_t gemm1_rows() const { return gated() ? 2 * intermediate_size : intermediate_size; }  // M
  // Row stride of the 4-byte scales of permuted rows: TMA wants multiples of 16 bytes.
  int64_t scale_stride() const { return (expanded_rows() + 3) / 4 * 4; }
};

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
};

struct Buffers {
#define BUFFER(name) Buffer name;
  JAX_MOE_INPUTS(BUFFER)
  JAX_MOE_OUTPUTS(BUFFER)
#undef BUFFER
};

// kInvalidArgument becomes ValueError (you are wrong), kUnsupported NotImplementedError (you are right, this build or
// device cannot), kInternal RuntimeError.
enum class StatusCode { kOk, kInvalidArgument, kUnsupported, kInternal };
struct Status {
  StatusCode code = StatusCode::kOk;
  std::string message;
  bool ok() const { return code == StatusCode::kOk; }
  static Status Invalid(std::string text) { return {StatusCode::kInvalidArgument, std::move(text)}; }
  static Status Unsupported(std::string text) { return {StatusCode::kUnsupported, std::move(text)}; }
  static Status Internal(std::string text) { return {StatusCode::kInternal, std::move(text)}; }
};

// A byte count that is affine in the number of tokens, so that a shape-polymorphic caller can state it.
struct AffineBytes {
  int64_t constant = 0;
  int64_t per_token = 0;
  int64_t at(int64_t num_tokens) const { return constant + per_token * num_tokens; }
};

// The stages of the op; a mask of them selects what a call launches (benchmarks time stages one by one).
enum Stage : int { kRoute = 1, kPermute = 2, kGemm1 = 4, kGemm2 = 8, kFinalize = 16, kAllStages = 31 };

// Shared by the backends (ffi/workspace.cc, ffi/check.cc).
AffineBytes WorkspaceSize(const Problem& problem);                    // the same for every backend and device
Status CheckBuffers(const Problem& problem, const Buffers& buffers);  // sizes that could corrupt memory, alignment
Status CheckBuffer(const char* name, const Buffer& buffer, int64_t bytes, int64_t alignment);  // of one array
std::string AbiText();  // fields, buffers and enums, for problem.py

namespace cpu {
Status Forward(const Problem& problem, const Buffers& buffers, int stages = kAllStages);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t of `device`. Launches only: no allocation, no synchronisation, capturable.
Status Forward(const Problem& problem, const Buffers& buffers, int device, void* stream, int stages = kAllStages);
// The kernels and tiles chosen for a problem, as text; needs no device.
std::string Explain(const Problem& problem, int num_sms);
// The stages that launch a kernel; needs no device.
int LaunchedStages(const Problem& problem, int num_sms);
}  // namespace cuda

}  // namespace jax_moe
