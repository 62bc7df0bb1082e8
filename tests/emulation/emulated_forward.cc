// The C entry points for tests/emulated.py: jax_moe::cuda::Forward of the real sources on the emulated machine.
#include <cstdio>

#include "../../ffi/workspace.h"
#include "guarded_memory.h"
#include "machine.h"
#include "overlap.h"

namespace {

jax_moe::Problem make_problem(const int64_t* fields) {
  jax_moe::Problem problem;
  int i = 0;
#define FIELD(name) problem.name = fields[i++];
  JAX_MOE_PROBLEM_FIELDS(FIELD)
#undef FIELD
  return problem;
}

}  // namespace

extern "C" {

// Returns the StatusCode and its message. `pointers` and `sizes` are in the order of JAX_MOE_INPUTS, JAX_MOE_OUTPUTS.
int emulated_forward(const int64_t* problem_fields, void** pointers, const int64_t* sizes, int stages, unsigned seed,
                     int num_sms, char* message, int message_bytes) {
  const jax_moe::Problem problem = make_problem(problem_fields);
  jax_moe::Buffers buffers;
  int i = 0;
#define BUFFER(name)                      \
  buffers.name = {pointers[i], sizes[i]}; \
  ++i;
  JAX_MOE_INPUTS(BUFFER)
  JAX_MOE_OUTPUTS(BUFFER)
#undef BUFFER
  emulation::settings.seed = seed;
  emulation::settings.num_sms = num_sms;
  emulation::forget_earlier_kernels();
  emulation::launches = {};
  const jax_moe::Status status = jax_moe::cuda::Forward(problem, buffers, 0, nullptr, stages);
  std::snprintf(message, message_bytes, "%s", status.message.c_str());
  return int(status.code);
}

int64_t emulated_workspace_bytes(const int64_t* problem_fields) {
  const jax_moe::Problem problem = make_problem(problem_fields);
  return jax_moe::WorkspaceSize(problem).at(problem.num_tokens);
}

// Of the last call: the kernels launched, or those of them that may overlap the one before.
int emulated_launches(int overlapping) {
  return overlapping ? emulation::launches.overlapping : emulation::launches.all;
}

void* emulated_allocate(int64_t bytes, int at_start, const char* name) {
  return emulation::allocate_guarded(bytes, at_start != 0, name);
}
int emulated_free(void* buffer) { return emulation::free_guarded(buffer); }

}  // extern "C"
