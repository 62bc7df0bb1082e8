// The XLA custom call that routes from logits. Operands are routing_logits [T, E] and routing_bias [E] or, absent, [0];
// results are topk_ids int32 [T, K] and topk_weights f32 [T, K]. Sizes are read from buffer dimensions, so that a
// module exported with a symbolic number of tokens works; only options are attributes.
#include <exception>

#include "routing.h"
#include "xla/ffi/api/ffi.h"
#include "xla_handlers.h"
#include "xla_status.h"

namespace ffi = xla::ffi;

namespace jax_moe {
namespace {

struct RouteAttributes {
  int64_t method, n_group, topk_group, norm_topk_prob, enable_pdl;
  double routed_scaling_factor;
};

}  // namespace
}  // namespace jax_moe

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_moe::RouteAttributes, ffi::StructMember<int64_t>("method"),
                                      ffi::StructMember<int64_t>("n_group"), ffi::StructMember<int64_t>("topk_group"),
                                      ffi::StructMember<int64_t>("norm_topk_prob"),
                                      ffi::StructMember<int64_t>("enable_pdl"),
                                      ffi::StructMember<double>("routed_scaling_factor"));

namespace jax_moe {
namespace {

constexpr char kTarget[] = "jax_moe.route_logits.v1";
constexpr char kFunction[] = "route: ";

using ffi::AnyBuffer;

// Both platforms: reads the call, then runs `route(problem, buffers)`. Nothing is thrown into XLA.
template <class Route>
ffi::Error Handle(const RouteAttributes& attributes, const AnyBuffer& logits, const AnyBuffer& bias, AnyBuffer& ids,
                  AnyBuffer& weights, Route route) try {
  const auto invalid = [](const char* text) { return ffi::Error::InvalidArgument(kFunction + std::string(text)); };
  const auto rows = logits.dimensions(), slots = ids.dimensions(), values = weights.dimensions();
  if (rows.size() != 2 || bias.dimensions().size() != 1)
    return invalid("routing_logits must have 2 dimensions and routing_bias 1");
  if (ids.element_type() != ffi::DataType::S32 || weights.element_type() != ffi::DataType::F32)
    return invalid("topk_ids must be of type S32 and topk_weights of type F32");
  if (slots.size() != 2 || values.size() != 2 || slots[0] != rows[0] || values[0] != rows[0] || values[1] != slots[1])
    return invalid("topk_ids and topk_weights must be [num_tokens, top_k]");
  RoutingProblem p;
  p.num_tokens = rows[0];
  p.num_experts = rows[1];
  p.top_k = slots[1];
  p.method = attributes.method;
  p.n_group = attributes.n_group;
  p.topk_group = attributes.topk_group;
  p.norm_topk_prob = attributes.norm_topk_prob;
  p.enable_pdl = attributes.enable_pdl;
  p.logits_dtype = FloatType(logits.element_type());
  p.bias_dtype = bias.element_count() == 0 ? int64_t(DataType::kNone) : FloatType(bias.element_type());
  p.routed_scaling_factor = attributes.routed_scaling_factor;
  return ToError(kFunction, route(p, RoutingBuffers{Place(logits), Place(bias), Place(ids), Place(weights)}));
} catch (const std::exception& e) {
  return ffi::Error::Internal(kFunction + std::string(e.what()));
}

ffi::Error HandleCpu(RouteAttributes attributes, AnyBuffer logits, AnyBuffer bias, ffi::Result<AnyBuffer> ids,
                     ffi::Result<AnyBuffer> weights) {
  return Handle(attributes, logits, bias, *ids, *weights, cpu::RouteLogits);
}

XLA_FFI_DEFINE_HANDLER(
    kCpuHandler, HandleCpu,
    ffi::Ffi::Bind().Attrs<RouteAttributes>().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>());

#if JAX_MOE_HAS_CUDA
ffi::Error HandleCuda(void* stream, int32_t device, RouteAttributes attributes, AnyBuffer logits, AnyBuffer bias,
                      ffi::Result<AnyBuffer> ids, ffi::Result<AnyBuffer> weights) {
  return Handle(attributes, logits, bias, *ids, *weights,
                [&](const RoutingProblem& problem, const RoutingBuffers& buffers) {
                  return cuda::RouteLogits(problem, buffers, device, stream);
                });
}

// Launches only, so that XLA may capture it into a CUDA graph.
XLA_FFI_DEFINE_HANDLER(kCudaHandler, HandleCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<RouteAttributes>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});
#else
ffi::Error HandleCuda(ffi::Dictionary, ffi::RemainingArgs, ffi::RemainingRets) { return NoCudaError(kFunction); }

XLA_FFI_DEFINE_HANDLER(kCudaHandler, HandleCuda, ffi::Ffi::Bind().Attrs().RemainingArgs().RemainingRets());
#endif

}  // namespace

std::vector<Registration> RouteRegistrations() {
  return {{"cpu", kTarget, reinterpret_cast<void*>(kCpuHandler)},
          {"CUDA", kTarget, reinterpret_cast<void*>(kCudaHandler)}};
}

}  // namespace jax_moe
