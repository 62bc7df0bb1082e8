// The C entry point for tests/emulated_routing.py: jax_moe::cuda::RouteLogits on the emulated machine.
#include <cstdio>

#include "../../ffi/routing.h"
#include "machine.h"
#include "overlap.h"

// Returns the StatusCode and its message. `fields`, `pointers` and `sizes` are in the order of routing.h.
extern "C" int emulated_route_logits(const int64_t* fields, double routed_scaling_factor, void** pointers,
                                     const int64_t* sizes, unsigned seed, char* message, int message_bytes) {
  jax_moe::RoutingProblem problem;
#define FIELD(name) problem.name = *fields++;
  JAX_MOE_ROUTING_FIELDS(FIELD)
#undef FIELD
  problem.routed_scaling_factor = routed_scaling_factor;
  jax_moe::RoutingBuffers buffers;
#define BUFFER(name) buffers.name = {*pointers++, *sizes++};
  JAX_MOE_ROUTING_BUFFERS(BUFFER)
#undef BUFFER
  emulation::settings.seed = seed;
  emulation::launches = {};
  emulation::forget_earlier_kernels();
  const jax_moe::Status status = jax_moe::cuda::RouteLogits(problem, buffers, 0, nullptr);
  std::snprintf(message, message_bytes, "%s", status.message.c_str());
  return int(status.code);
}
