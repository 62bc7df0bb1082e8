// Launches a kernel on a stream with its shared memory, and turns CUDA errors into Status. The only place that knows
// cudaLaunchKernelEx.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "../moe.h"

namespace jax_moe::cuda {

inline Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status::Internal(std::string(what) + ": CUDA error " + std::to_string(int(error)) + ", " +
                          cudaGetErrorString(error));
}

// Lets a kernel have all the dynamic shared memory of a CTA on the current device. CUDA is asked once a device.
Status AllowSharedMemory(const char* name, const void* kernel);

// Where a call's launches go, and whether they may overlap at all.
struct LaunchStream {
  cudaStream_t handle;
  bool may_overlap;
  LaunchStream(cudaStream_t handle, bool may_overlap = true) : handle(handle), may_overlap(may_overlap) {}
};

struct LaunchShape {
  unsigned grid;
  unsigned threads;
  unsigned shared_bytes = 0;  // dynamic
  // Programmatic dependent launch: CTAs may start before the kernel before has ended, and wait for it themselves.
  bool overlap_previous = false;
};

// Arguments are converted to the kernel's parameter types, as in a <<<>>> launch.
template <class... Parameters, class... Arguments>
Status Launch(const char* name, void (*kernel)(Parameters...), LaunchShape shape, LaunchStream stream,
              Arguments&&... arguments) {
  // NOTE: 48 KiB are there unasked, less what the kernel has statically.
  if (shape.shared_bytes > 40 * 1024)
    if (Status s = AllowSharedMemory(name, reinterpret_cast<const void*>(kernel)); !s.ok()) return s;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream.handle;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = shape.overlap_previous && stream.may_overlap ? 1 : 0;
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace jax_moe::cuda
