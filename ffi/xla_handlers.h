// What the extension module hands to XLA: for each target name a handler for each platform. No XLA types, so that
// module.cc need not see XLA.
#pragma once
#include <string>
#include <vector>

namespace jax_moe {

struct Registration {
  std::string platform;  // "cpu" or "CUDA"
  std::string target;
  void* handler;  // XLA_FFI_Handler*
};
std::vector<Registration> Registrations();          // the mixture of experts: ffi/xla_handlers.cc
std::vector<Registration> RouteRegistrations();     // routing from logits: ffi/xla_route_handler.cc
std::vector<Registration> FinalizeRegistrations();  // finalising apart: ffi/xla_finalize_handler.cc

// The XLA FFI API that the handlers were compiled against.
struct FfiApiVersion {
  int major, minor;
};
FfiApiVersion CompiledFfiApiVersion();

}  // namespace jax_moe
