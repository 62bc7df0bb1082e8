// What the extension module hands to XLA: one target name, a handler for each platform. No XLA types, so that module.cc
// need not see XLA.
#pragma once
#include <string>
#include <vector>

namespace jax_moe {

struct Registration {
  std::string platform;  // "cpu" or "CUDA"
  std::string target;
  void* handler;  // XLA_FFI_Handler*
};
std::vector<Registration> Registrations();

// The XLA FFI API that the handlers were compiled against.
struct FfiApiVersion {
  int major, minor;
};
FfiApiVersion CompiledFfiApiVersion();

}  // namespace jax_moe
