// What CUDA was told of kernels, so that it is not told again on every launch.
#include "launch.h"

#include <mutex>
#include <set>
#include <utility>

#include "select.h"

namespace jax_moe::cuda {

Status AllowSharedMemory(const char* name, const void* kernel) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return CudaStatus(error, name);
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  // NOTE: the lock is held over the calls: a thread that finds the kernel in the set finds it allowed.
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return {};
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return CudaStatus(error, name);
  const int bytes = kMaxSharedBytes - int(attributes.sharedSizeBytes);  // less what it has statically
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return CudaStatus(error, name);
}

}  // namespace jax_moe::cuda
