// Round to nearest with subnormals, whatever the caller's thread has set (XLA flushes subnormals to zero), so that
// results are the same under every caller.
#pragma once
#include <cfenv>

namespace jax_moe::cpu {

// While it lives. Threads started in its scope inherit it.
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

}  // namespace jax_moe::cpu
