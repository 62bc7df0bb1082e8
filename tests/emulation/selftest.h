// How the kernels of the selftests are launched.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <map>
#include <string>

#include "guarded_memory.h"
#include "machine.h"

namespace selftest {

// What the launch ends with, empty when it went through.
template <class Parameter, class Argument>
std::string Launch(unsigned ctas, unsigned threads, unsigned shared_bytes, void (*kernel)(Parameter),
                   Argument argument) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameter(argument));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
template <class Parameter, class Argument>
std::string Launch(unsigned threads, unsigned shared_bytes, void (*kernel)(Parameter), Argument argument) {
  return Launch(1, threads, shared_bytes, kernel, argument);
}

const std::map<std::string, std::string (*)()>& MultiplyTests();
const std::map<std::string, std::string (*)()>& DecodeTests();
const std::map<std::string, std::string (*)()>& OverlapTests();
const std::map<std::string, std::string (*)()>& CounterTests();
const std::map<std::string, std::string (*)()>& RegisterTests();

}  // namespace selftest
