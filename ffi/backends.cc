// Chooses the backend. A build without CUDA kernels says so here.
#include "backends.h"

#if JAX_MOE_HAS_CUDA
#define JAX_MOE_ON_CUDA(call) cuda::call
#else
#define JAX_MOE_ON_CUDA(call) CheckCudaBuild()
#endif

namespace jax_moe {

Status CheckCudaBuild() {
  if (JAX_MOE_HAS_CUDA) return {};
  return Status::Unsupported(
      "this build has no CUDA kernels; reinstall it where a CUDA compiler works (JAX_MOE_CUDA=ON says why none does)");
}

Status Forward(const Problem& problem, const Buffers& buffers, int device, [[maybe_unused]] void* stream, int stages) {
  if (device == kOnCpu) return cpu::Forward(problem, buffers, stages);
  return JAX_MOE_ON_CUDA(Forward(problem, buffers, device, stream, stages));
}

Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers, int device,
                   [[maybe_unused]] void* stream) {
  if (device == kOnCpu) return cpu::RouteLogits(problem, buffers);
  return JAX_MOE_ON_CUDA(RouteLogits(problem, buffers, device, stream));
}

Status FinalizeRows(const FinalizeProblem& problem, const FinalizeBuffers& buffers, int device,
                    [[maybe_unused]] void* stream) {
  if (device == kOnCpu) return cpu::FinalizeRows(problem, buffers);
  return JAX_MOE_ON_CUDA(FinalizeRows(problem, buffers, device, stream));
}

Status Explain([[maybe_unused]] const Problem& problem, [[maybe_unused]] int num_sms,
               [[maybe_unused]] std::string* text) {
#if JAX_MOE_HAS_CUDA
  *text = cuda::Explain(problem, num_sms);
#endif
  return CheckCudaBuild();
}

Status LaunchedStages([[maybe_unused]] const Problem& problem, [[maybe_unused]] int num_sms,
                      [[maybe_unused]] int* stages) {
#if JAX_MOE_HAS_CUDA
  *stages = cuda::LaunchedStages(problem, num_sms);
#endif
  return CheckCudaBuild();
}

}  // namespace jax_moe
