// A call on the CPU: checks, then the stages in order. Keeps no state, lets no exception out, and gives the same bits
// for every number of threads and in every floating-point environment.
#include <exception>

#include "float_environment.h"
#include "stages.h"

namespace jax_moe::cpu {

Status Forward(const Problem& problem, const Buffers& buffers, int stages) {
  if (Status s = CheckBuffers(problem, buffers); !s.ok()) return s;
  if (problem.num_tokens == 0) return {};
  const DefaultFloatEnvironment environment;
  const Workspace workspace = CarveWorkspace(problem, buffers);
  const Call call{problem, buffers, workspace};
  try {
    if (stages & kRoute) Route(call);
    if (stages & kPermute) Permute(call);
    if (stages & kGemm1) Gemm1(call);
    for (int64_t first = 0; first < problem.hidden_size; first += workspace.y2_columns) {
      const Slab slab = workspace.slab(problem, first);
      if (stages & kGemm2) Gemm2(call, slab);
      if ((stages & kFinalize) && problem.do_finalize) Finalize(call, slab);
    }
  } catch (const std::exception& e) {
    return Status::Internal(std::string("the CPU backend failed: ") + e.what());
  }
  return {};
}

}  // namespace jax_moe::cpu
