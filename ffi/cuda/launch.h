// Launches a kernel on a stream with its shared memory, and turns CUDA errors into Status. The only place that knows
// cudaLaunchKernelEx. A kernel's shared-memory limit is raised on every launch that needs it: the call is cheap, legal
// in capture, and needs no per-device state.
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

struct LaunchShape {
  unsigned grid;
  unsigned threads;
  unsigned shared_bytes = 0;
};

// Arguments are converted to the kernel's parameter types, as in a <<<>>> launch.
template <class... Parameters, class... Arguments>
Status Launch(const char* name, void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
              Arguments&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    if (error != cudaSuccess) return CudaStatus(error, name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace jax_moe::cuda
