// The C entry point for tests/emulated_finalize.py: jax_moe::cuda::FinalizeRows on the emulated machine.
#include <cstdio>

#include "../../ffi/finalize.h"
#include "machine.h"

// Returns the StatusCode and its message. `fields`, `pointers` and `sizes` are in the order of finalize.h.
extern "C" int emulated_finalize(const int64_t* fields, void** pointers, const int64_t* sizes, unsigned seed,
                                 char* message, int message_bytes) {
  jax_moe::FinalizeProblem problem;
#define FIELD(name) problem.name = *fields++;
  JAX_MOE_FINALIZE_FIELDS(FIELD)
#undef FIELD
  jax_moe::FinalizeBuffers buffers;
#define BUFFER(name) buffers.name = {*pointers++, *sizes++};
  JAX_MOE_FINALIZE_BUFFERS(BUFFER)
#undef BUFFER
  emulation::settings.seed = seed;
  const jax_moe::Status status = jax_moe::cuda::FinalizeRows(problem, buffers, 0, nullptr);
  std::snprintf(message, message_bytes, "%s", status.message.c_str());
  return int(status.code);
}
