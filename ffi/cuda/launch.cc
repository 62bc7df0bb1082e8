// What CUDA was told of kernels, so that it is not told again on every launch.
#include "launch.h"

#include <map>
#include <mutex>
#include <utility>

namespace jax_moe::cuda {

Status AllowSharedMemory(const char* name, const void* kernel, int bytes) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return CudaStatus(error, name);
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  // NOTE: the lock is held over the call, and a limit never shrinks: no other thread can lower it before the launch.
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = allowed[{kernel, device}];
  if (limit >= bytes) return {};
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) limit = bytes;
  return CudaStatus(error, name);
}

}  // namespace jax_moe::cuda
