// A call on the CPU: checks, then the stages in order. Keeps no state, lets no exception out, and gives the same bits
// for every number of threads and in every floating-point environment.
#include <cfenv>
#include <exception>

#include "stages.h"

namespace jax_moe::cpu {
namespace {

// Round to nearest with subnormals, whatever the caller's thread has set (XLA flushes subnormals to zero). Threads
// started in its scope inherit it.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace

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
    if (stages & kGemm2) Gemm2(call);
    if ((stages & kFinalize) && problem.do_finalize) Finalize(call);
  } catch (const std::exception& e) {
    return Status::Internal(std::string("the CPU backend failed: ") + e.what());
  }
  return {};
}

}  // namespace jax_moe::cpu
