// The five stages of a call on the CPU, each complete on its own: they meet only in the workspace. Any of them may
// throw std::bad_alloc (a worker thread's panel); forward.cc turns that into a Status.
#pragma once
#include "../workspace.h"

namespace jax_moe::cpu {

struct Call {
  const Problem& problem;
  const Buffers& buffers;
  const Workspace& workspace;
};

void Route(const Call& call);    // the row of every expanded index, the row blocks of every expert, expert_weights
void Permute(const Call& call);  // bf16 hidden_states to e4m3, and the scales of every permuted row
void Gemm1(const Call& call);    // h = e4m3(activation(x gemm1_weights^T))
void Gemm2(const Call& call, Slab slab);     // y2 = bf16(h gemm2_weights^T), in some columns
void Finalize(const Call& call, Slab slab);  // output = weighted sums of y2, in those columns

// The e4m3 codes of hidden_states, [T, H].
inline const uint8_t* QuantizedHiddenStates(const Call& call) {
  return call.problem.hidden_states_are_bf16() ? call.workspace.x
                                               : static_cast<const uint8_t*>(call.buffers.hidden_states.data);
}

}  // namespace jax_moe::cpu
