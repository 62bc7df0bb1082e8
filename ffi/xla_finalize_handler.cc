// The XLA custom call that finalises apart. Operands are gemm2_output bf16 [R, H], expert_weights bf16 or f32 [T, K]
// and expanded_idx_to_permuted_idx s32 [T*K]; the result is bf16 [T, H]. Sizes are read from buffer dimensions, so that
// a module exported with a symbolic number of tokens works; there are no attributes.
#include <exception>

#include "finalize.h"
#include "xla/ffi/api/ffi.h"
#include "xla_handlers.h"
#include "xla_status.h"

namespace ffi = xla::ffi;

namespace jax_moe {
namespace {

constexpr char kTarget[] = "jax_moe.finalize.v1";
constexpr char kFunction[] = "finalize: ";

using ffi::AnyBuffer;

// Both platforms: reads the call, then runs `finalize(problem, buffers)`. Nothing is thrown into XLA.
template <class Finalize>
ffi::Error Handle(const AnyBuffer& rows, const AnyBuffer& weights, const AnyBuffer& row_of, AnyBuffer& output,
                  Finalize finalize) try {
  const auto invalid = [](const char* text) { return ffi::Error::InvalidArgument(kFunction + std::string(text)); };
  const auto from = rows.dimensions(), slots = weights.dimensions(), to = output.dimensions();
  if (from.size() != 2 || slots.size() != 2 || row_of.dimensions().size() != 1 || to.size() != 2)
    return invalid("expanded_idx_to_permuted_idx must have 1 dimension and the other arrays 2");
  if (rows.element_type() != ffi::DataType::BF16 || output.element_type() != ffi::DataType::BF16)
    return invalid("gemm2_output and output must be of type BF16");
  if (row_of.element_type() != ffi::DataType::S32) return invalid("expanded_idx_to_permuted_idx must be of type S32");
  if (to[0] != slots[0] || to[1] != from[1]) return invalid("output must be [num_tokens, hidden_size]");
  FinalizeProblem p;
  p.num_tokens = slots[0];
  p.top_k = slots[1];
  p.hidden_size = from[1];
  p.num_rows = from[0];
  p.weights_dtype = FloatType(weights.element_type());
  return ToError(kFunction, finalize(p, FinalizeBuffers{Place(rows), Place(weights), Place(row_of), Place(output)}));
} catch (const std::exception& e) {
  return ffi::Error::Internal(kFunction + std::string(e.what()));
}

ffi::Error HandleCpu(AnyBuffer rows, AnyBuffer weights, AnyBuffer row_of, ffi::Result<AnyBuffer> output) {
  return Handle(rows, weights, row_of, *output, cpu::FinalizeRows);
}

XLA_FFI_DEFINE_HANDLER(kCpuHandler, HandleCpu,
                       ffi::Ffi::Bind().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>());

#if JAX_MOE_HAS_CUDA
ffi::Error HandleCuda(void* stream, int32_t device, AnyBuffer rows, AnyBuffer weights, AnyBuffer row_of,
                      ffi::Result<AnyBuffer> output) {
  return Handle(rows, weights, row_of, *output, [&](const FinalizeProblem& problem, const FinalizeBuffers& buffers) {
    return cuda::FinalizeRows(problem, buffers, device, stream);
  });
}

// Launches only, so that XLA may capture it into a CUDA graph.
XLA_FFI_DEFINE_HANDLER(kCudaHandler, HandleCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Ret<AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});
#else
ffi::Error HandleCuda(ffi::RemainingArgs, ffi::RemainingRets) { return NoCudaError(kFunction); }

XLA_FFI_DEFINE_HANDLER(kCudaHandler, HandleCuda, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
#endif

}  // namespace

std::vector<Registration> FinalizeRegistrations() {
  return {{"cpu", kTarget, reinterpret_cast<void*>(kCpuHandler)},
          {"CUDA", kTarget, reinterpret_cast<void*>(kCudaHandler)}};
}

}  // namespace jax_moe
