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
#include "xla_status.h"

namespace ffi = xla::ffi;

namespace jax_moe {
namespace {

// The attributes, all i64.
struct Attributes {
  int64_t num_experts, fp8_quantization_type, activation_type, weight_layout, use_shuffled_weight, do_finalize;
  int64_t batch_invariant, enable_pdl;
  int64_t hidden_states_scale_token_major;  // [T, H/128] instead of [H/128, T]; with MxFp8 H/32

  bool block_major_k() const { return weight_layout == int64_t(WeightLayout::kBlockMajorK); }
  bool mx() const { return fp8_quantization_type == int64_t(Fp8QuantizationType::kMxFp8); }
};

}  // namespace
}  // namespace jax_moe

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_moe::Attributes, ffi::StructMember<int64_t>("num_experts"), ffi::StructMember<int64_t>("fp8_quantization_type"),
    ffi::StructMember<int64_t>("activation_type"), ffi::StructMember<int64_t>("weight_layout"),
    ffi::StructMember<int64_t>("use_shuffled_weight"), ffi::StructMember<int64_t>("do_finalize"),
    ffi::StructMember<int64_t>("batch_invariant"), ffi::StructMember<int64_t>("enable_pdl"),
    ffi::StructMember<int64_t>("hidden_states_scale_token_major"));

namespace jax_moe {
namespace {

constexpr char kTarget[] = "jax_moe.fp8_block_scale_routed_moe.v1";
constexpr char kFunction[] = "fp8_block_scale_routed_moe: ";

// What an array must be: one of the element types, and the rank. An optional one may be of shape [0] and any type
// instead.
enum class Kind { kRequired, kOptional, kWeights };  // weights have one more dimension in BlockMajorK
struct Type {
  ffi::DataType dtypes[2];  // INVALID where there is one only
  size_t rank;
  Kind kind = Kind::kRequired;
};
namespace types {
constexpr auto S32 = ffi::DataType::S32, F32 = ffi::DataType::F32, BF16 = ffi::DataType::BF16, U8 = ffi::DataType::U8,
               F8 = ffi::DataType::F8E4M3FN, E8M0 = ffi::DataType::F8E8M0FNU;
constexpr Type topk_ids{{S32}, 2};
constexpr Type topk_weights{{BF16, F32}, 2, Kind::kOptional};
constexpr Type hidden_states{{F8, BF16}, 2};
constexpr Type hidden_states_scale{{F32}, 2, Kind::kOptional};
constexpr Type gemm1_weights{{F8}, 3, Kind::kWeights};
constexpr Type gemm1_weights_scale{{F32}, 3};
constexpr Type gemm2_weights{{F8}, 3, Kind::kWeights};
constexpr Type gemm2_weights_scale{{F32}, 3};
constexpr Type gemm1_lora_delta{{BF16}, 3, Kind::kOptional};
constexpr Type gemm1_alpha{{F32}, 1};
constexpr Type gemm1_beta{{F32}, 1};
constexpr Type gemm1_clamp_limit{{F32}, 1};
constexpr Type local_expert_offset{{S32}, 0};
constexpr Type output{{BF16}, 2, Kind::kOptional};
constexpr Type gemm2_output{{BF16}, 2, Kind::kOptional};
constexpr Type expert_weights{{BF16}, 2, Kind::kOptional};
constexpr Type expanded_idx_to_permuted_idx{{S32}, 1};
constexpr Type gemm1_activation_output{{U8}, 2, Kind::kOptional};
constexpr Type gemm1_activation_scale{{F32}, 2, Kind::kOptional};
constexpr Type workspace{{U8}, 1};
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

Type TypeOf(const Slot& slot, bool mx) {
  if (!mx) return slot.type;
  const std::string_view name = slot.name;
  if (name == "hidden_states_scale" || name == "gemm1_weights_scale" || name == "gemm2_weights_scale")
    return {{types::U8, types::E8M0}, slot.type.rank, slot.type.kind};
  if (name == "gemm1_activation_scale") return {{types::U8}, 3, slot.type.kind};
  return slot.type;
}

template <class... Words>
ffi::Error Invalid(const Words&... words) {
  std::ostringstream text;
  text << kFunction;
  (text << ... << words);
  return ffi::Error::InvalidArgument(text.str());
}

// Whether an array of these dimensions says that the call has no such array.
bool IsAbsent(ffi::AnyBuffer::Dimensions dimensions) { return dimensions.size() == 1 && dimensions[0] == 0; }

// Checks type and rank of one array and writes down where it is.
ffi::Error Place(const Slot& slot, const ffi::AnyBuffer& array, const Attributes& attributes, Buffers& buffers) {
  const Type type = TypeOf(slot, attributes.mx());
  const auto dimensions = array.dimensions();
  if (type.kind == Kind::kOptional && IsAbsent(dimensions)) return ffi::Error::Success();
  const ffi::DataType dtype = array.element_type(), other = type.dtypes[1];
  if (dtype != type.dtypes[0] && (other == ffi::DataType::INVALID || dtype != other)) {
    if (other != ffi::DataType::INVALID)
      return Invalid(slot.name, " must be of type ", type.dtypes[0], " or ", other, ", got ", dtype);
    return Invalid(slot.name, " must be of type ", type.dtypes[0], ", got ", dtype);
  }
  const size_t rank = type.rank + (type.kind == Kind::kWeights && attributes.block_major_k());
  if (dimensions.size() != rank) return Invalid(slot.name, " must have ", rank, " dimensions, got ", dimensions.size());
  if (array.element_count() > 0)
    buffers.*slot.member = {array.untyped_data(), static_cast<int64_t>(array.size_bytes())};
  return ffi::Error::Success();
}

ffi::Error PlaceAll(ffi::RemainingArgs operands, ffi::RemainingRets results, const Attributes& attributes,
                    Buffers& buffers) {
  if (operands.size() != std::size(kOperands) || results.size() != std::size(kResults))
    return Invalid("the custom call must have ", std::size(kOperands), " operands and ", std::size(kResults),
                   " results, got ", operands.size(), " and ", results.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    const auto array = operands.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    if (ffi::Error error = Place(kOperands[i], *array, attributes, buffers); error.failure()) return error;
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto array = results.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    if (ffi::Error error = Place(kResults[i], **array, attributes, buffers); error.failure()) return error;
  }
  return ffi::Error::Success();
}

// The contract's value for an operand's element type.
int64_t ToDataType(ffi::DataType dtype) {
  return int64_t(dtype == types::F8     ? DataType::kFloat8E4M3
                 : dtype == types::BF16 ? DataType::kBFloat16
                                        : DataType::kFloat32);
}

// Position in JAX_MOE_INPUTS.
constexpr size_t Operand(std::string_view name) {
  size_t i = 0;
  while (kOperands[i].name != name) ++i;
  return i;
}

// The problem that checked operands and the attributes state.
Problem Describe(ffi::RemainingArgs operands, const Attributes& attributes) {
  const ffi::AnyBuffer ids = *operands.get<ffi::AnyBuffer>(Operand("topk_ids"));
  const ffi::AnyBuffer weights = *operands.get<ffi::AnyBuffer>(Operand("topk_weights"));
  const ffi::AnyBuffer x = *operands.get<ffi::AnyBuffer>(Operand("hidden_states"));
  const ffi::AnyBuffer gemm1 = *operands.get<ffi::AnyBuffer>(Operand("gemm1_weights"));
  const ffi::AnyBuffer scale = *operands.get<ffi::AnyBuffer>(Operand("gemm1_weights_scale"));
  const ffi::AnyBuffer lora = *operands.get<ffi::AnyBuffer>(Operand("gemm1_lora_delta"));
  const bool token_major = attributes.hidden_states_scale_token_major != 0;
  Problem p;
  p.num_tokens = ids.dimensions()[0];
  p.hidden_size = x.dimensions()[1];
  p.num_experts = attributes.num_experts;
  p.top_k = ids.dimensions()[1];
  p.local_num_experts = gemm1.dimensions()[0];
  p.local_expert_offset = 0;  // the operand states it
  p.topk_weights_dtype = IsAbsent(weights.dimensions()) ? int64_t(DataType::kNone) : ToDataType(weights.element_type());
  p.hidden_states_dtype = ToDataType(x.element_type());
  p.fp8_quantization_type = attributes.fp8_quantization_type;
  p.hidden_states_scale_block_stride = token_major ? 1 : p.num_tokens;
  p.hidden_states_scale_token_stride = token_major ? p.hidden_size / p.scale_block() : 1;
  p.activation_type = attributes.activation_type;
  p.weight_layout = attributes.weight_layout;
  p.use_shuffled_weight = attributes.use_shuffled_weight;
  p.has_gemm1_lora_delta = !IsAbsent(lora.dimensions());
  p.do_finalize = attributes.do_finalize;
  p.batch_invariant = attributes.batch_invariant;
  p.enable_pdl = attributes.enable_pdl;
  const int64_t rows = gemm1.dimensions()[p.block_major_k() ? 2 : 1];
  p.intermediate_size = p.gated() ? rows / 2 : rows;
  // Division without a rest, or 0, which is refused.
  const int64_t scale_rows = scale.dimensions()[1];
  p.weights_scale_rows = scale_rows > 0 && rows % scale_rows == 0 ? rows / scale_rows : 0;
  return p;
}

// Both platforms: reads the call, then runs `forward(problem, buffers)`. Nothing is thrown into XLA.
template <class Forward>
ffi::Error Handle(ffi::RemainingArgs operands, ffi::RemainingRets results, const Attributes& attributes,
                  Forward forward) try {
  Buffers buffers;
  if (ffi::Error error = PlaceAll(operands, results, attributes, buffers); error.failure()) return error;
  const Problem problem = Describe(operands, attributes);
  if (problem.num_tokens == 0) return ffi::Error::Success();
  return ToError(kFunction, forward(problem, buffers));
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
#else
ffi::Error HandleCuda(ffi::Dictionary, ffi::RemainingArgs, ffi::RemainingRets) { return NoCudaError(kFunction); }

XLA_FFI_DEFINE_HANDLER(kCudaHandler, HandleCuda, ffi::Ffi::Bind().Attrs().RemainingArgs().RemainingRets());
#endif

}  // namespace

std::vector<Registration> Registrations() {
  return {{"cpu", kTarget, reinterpret_cast<void*>(kCpuHandler)},
          {"CUDA", kTarget, reinterpret_cast<void*>(kCudaHandler)}};
}

FfiApiVersion CompiledFfiApiVersion() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace jax_moe
