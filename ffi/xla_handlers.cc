// The XLA custom call: the only file that sees XLA. Operands are JAX_MOE_INPUTS and results JAX_MOE_OUTPUTS, in order;
// absent ones have no elements. Sizes are read from buffer dimensions, so that a module exported with a symbolic number
// of tokens works; only options are attributes.
#include "xla_handlers.h"

#include <exception>
#include <iterator>
#include <sstream>
#include <string_view>

#include "moe.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_moe {
namespace {

// The attributes, all i64.
struct Attributes {
  int64_t num_experts, fp8_quantization_type, activation_type, weight_layout, use_shuffled_weight, do_finalize;
  int64_t hidden_states_scale_token_major;  // [T, H/128] instead of [H/128, T]
};

}  // namespace
}  // namespace jax_moe

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_moe::Attributes, ffi::StructMember<int64_t>("num_experts"),
                                      ffi::StructMember<int64_t>("fp8_quantization_type"),
                                      ffi::StructMember<int64_t>("activation_type"),
                                      ffi::StructMember<int64_t>("weight_layout"),
                                      ffi::StructMember<int64_t>("use_shuffled_weight"),
                                      ffi::StructMember<int64_t>("do_finalize"),
                                      ffi::StructMember<int64_t>("hidden_states_scale_token_major"));

namespace jax_moe {
namespace {

constexpr char kTarget[] = "jax_moe.fp8_block_scale_routed_moe.v1";
constexpr char kFunction[] = "fp8_block_scale_routed_moe: ";

// Element type and rank of each operand and result, by its name in moe.h. Optional ones may be of shape [0] instead.
struct Type {
  ffi::DataType dtype;
  size_t rank;
  bool optional = false;
};
namespace types {
constexpr ffi::DataType kFloat8OrBFloat16 = ffi::DataType::INVALID;
constexpr Type topk_ids{ffi::DataType::S32, 2};
constexpr Type hidden_states{kFloat8OrBFloat16, 2};
constexpr Type hidden_states_scale{ffi::DataType::F32, 2, true};
constexpr Type gemm1_weights{ffi::DataType::F8E4M3FN, 3};
constexpr Type gemm1_weights_scale{ffi::DataType::F32, 3};
constexpr Type gemm2_weights{ffi::DataType::F8E4M3FN, 3};
constexpr Type gemm2_weights_scale{ffi::DataType::F32, 3};
constexpr Type local_expert_offset{ffi::DataType::S32, 0};
constexpr Type output{ffi::DataType::BF16, 2, true};
constexpr Type gemm2_output{ffi::DataType::BF16, 2, true};
constexpr Type expert_weights{ffi::DataType::BF16, 2, true};
constexpr Type expanded_idx_to_permuted_idx{ffi::DataType::S32, 1, true};
constexpr Type workspace{ffi::DataType::U8, 1};
}  // namespace types

struct Slot {
  const char* name;
  Buffer Buffers::* member;
  Type type;
};
#define BUFFER(name) {#name, &Buffers::name, types::name},
constexpr Slot kOperands[] = {JAX_MOE_INPUTS(BUFFER)};
constexpr Slot kResults[] = {JAX_MOE_OUTPUTS(BUFFER)};
#undef BUFFER

template <class... Words>
ffi::Error Invalid(const Words&... words) {
  std::ostringstream text;
  text << kFunction;
  (text << ... << words);
  return ffi::Error::InvalidArgument(text.str());
}

ffi::Error ToError(const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return ffi::Error::InvalidArgument(kFunction + status.message);
    case StatusCode::kUnsupported:
      return ffi::Error(ffi::ErrorCode::kUnimplemented, kFunction + status.message);
    case StatusCode::kInternal:
      break;
  }
  return ffi::Error::Internal(kFunction + status.message);
}

// Checks type and rank of one array and writes down where it is.
ffi::Error Place(const Slot& slot, const ffi::AnyBuffer& array, Buffers& buffers) {
  const ffi::DataType dtype = array.element_type();
  if (slot.type.dtype == types::kFloat8OrBFloat16) {
    if (dtype != ffi::DataType::F8E4M3FN && dtype != ffi::DataType::BF16)
      return Invalid(slot.name, " must be of type F8E4M3FN or BF16, got ", dtype);
  } else if (dtype != slot.type.dtype) {
    return Invalid(slot.name, " must be of type ", slot.type.dtype, ", got ", dtype);
  }
  const auto dimensions = array.dimensions();
  const bool absent = slot.type.optional && dimensions.size() == 1 && dimensions[0] == 0;
  if (!absent && dimensions.size() != slot.type.rank)
    return Invalid(slot.name, " must have ", slot.type.rank, " dimensions, got ", dimensions.size());
  if (array.element_count() > 0)
    buffers.*slot.member = {array.untyped_data(), static_cast<int64_t>(array.size_bytes())};
  return ffi::Error::Success();
}

ffi::Error PlaceAll(ffi::RemainingArgs operands, ffi::RemainingRets results, Buffers& buffers) {
  if (operands.size() != std::size(kOperands) || results.size() != std::size(kResults))
    return Invalid("the custom call must have ", std::size(kOperands), " operands and ", std::size(kResults),
                   " results, got ", operands.size(), " and ", results.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    const auto array = operands.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    if (ffi::Error error = Place(kOperands[i], *array, buffers); error.failure()) return error;
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto array = results.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    if (ffi::Error error = Place(kResults[i], **array, buffers); error.failure()) return error;
  }
  return ffi::Error::Success();
}

// The problem that checked operands and the attributes state.
Problem Describe(ffi::RemainingArgs operands, const Attributes& attributes) {
  enum { kTopkIds = 0, kHiddenStates = 1, kGemm1Weights = 3 };  // positions in JAX_MOE_INPUTS
  static_assert(std::string_view(kOperands[kTopkIds].name) == "topk_ids" &&
                std::string_view(kOperands[kHiddenStates].name) == "hidden_states" &&
                std::string_view(kOperands[kGemm1Weights].name) == "gemm1_weights");
  const ffi::AnyBuffer ids = *operands.get<ffi::AnyBuffer>(kTopkIds);
  const ffi::AnyBuffer x = *operands.get<ffi::AnyBuffer>(kHiddenStates);
  const ffi::AnyBuffer gemm1 = *operands.get<ffi::AnyBuffer>(kGemm1Weights);
  const bool bf16 = x.element_type() == ffi::DataType::BF16;
  const bool token_major = attributes.hidden_states_scale_token_major != 0;
  Problem p;
  p.num_tokens = ids.dimensions()[0];
  p.hidden_size = x.dimensions()[1];
  p.intermediate_size = gemm1.dimensions()[1] / 2;
  p.num_experts = attributes.num_experts;
  p.top_k = ids.dimensions()[1];
  p.local_num_experts = gemm1.dimensions()[0];
  p.local_expert_offset = 0;  // the operand states it
  p.hidden_states_dtype = int64_t(bf16 ? DataType::kBFloat16 : DataType::kFloat8E4M3);
  p.hidden_states_scale_block_stride = token_major ? 1 : p.num_tokens;
  p.hidden_states_scale_token_stride = token_major ? p.hidden_size / kScaleBlock : 1;
  p.fp8_quantization_type = attributes.fp8_quantization_type;
  p.activation_type = attributes.activation_type;
  p.weight_layout = attributes.weight_layout;
  p.use_shuffled_weight = attributes.use_shuffled_weight;
  p.do_finalize = attributes.do_finalize;
  return p;
}

// Both platforms: reads the call, then runs `forward(problem, buffers)`. Nothing is thrown into XLA.
template <class Forward>
ffi::Error Handle(ffi::RemainingArgs operands, ffi::RemainingRets results, const Attributes& attributes,
                  Forward forward) try {
  Buffers buffers;
  if (ffi::Error error = PlaceAll(operands, results, buffers); error.failure()) return error;
  const Problem problem = Describe(operands, attributes);
  if (problem.num_tokens == 0) return ffi::Error::Success();
  return ToError(forward(problem, buffers));
} catch (const std::exception& e) {
  return ffi::Error::Internal(kFunction + std::string(e.what()));
}

ffi::Error HandleCpu(Attributes attributes, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  return Handle(operands, results, attributes,
                [](const Problem& problem, const Buffers& buffers) { return cpu::Forward(problem, buffers); });
}

XLA_FFI_DEFINE_HANDLER(kCpuHandler, HandleCpu, ffi::Ffi::Bind().Attrs<Attributes>().RemainingArgs().RemainingRets());

#if JAX_MOE_HAS_CUDA
ffi::Error HandleCuda(void* stream, int32_t device, Attributes attributes, ffi::RemainingArgs operands,
                      ffi::RemainingRets results) {
  return Handle(operands, results, attributes, [&](const Problem& problem, const Buffers& buffers) {
    return cuda::Forward(problem, buffers, device, stream);
  });
}

// Launches only, so that XLA may capture it into a CUDA graph.
XLA_FFI_DEFINE_HANDLER(kCudaHandler, HandleCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<Attributes>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace

std::vector<Registration> Registrations() {
  std::vector<Registration> result = {{"cpu", kTarget, reinterpret_cast<void*>(kCpuHandler)}};
#if JAX_MOE_HAS_CUDA
  result.push_back({"CUDA", kTarget, reinterpret_cast<void*>(kCudaHandler)});
#endif
  return result;
}

FfiApiVersion CompiledFfiApiVersion() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace jax_moe
