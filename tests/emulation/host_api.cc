// The CUDA runtime calls of the stand-in headers: one device, sm_90 in its limits, with settings.num_sms SMs.
#include <cstdio>
#include <map>

#include "machine.h"
#include "overlap.h"

namespace emulation {

Launches launches;

namespace {

constexpr int kMaxShared = 232448, kMaxSharedUnasked = 48 * 1024;
std::map<const void*, int> max_dynamic_bytes;

cudaError_t refuse(const char* why) {
  last_error = why;
  return cudaErrorInvalidConfiguration;
}

}  // namespace

cudaError_t set_kernel_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kMaxShared) return cudaErrorInvalidValue;
  max_dynamic_bytes[kernel] = value;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto allowed = max_dynamic_bytes.find(kernel);
  const int limit = allowed == max_dynamic_bytes.end() ? kMaxSharedUnasked : allowed->second;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
    return refuse("only one-dimensional launches are emulated");
  if (grid.x < 1 || grid.x > 0x7FFFFFFFu || block.x < 1 || block.x > 1024) return refuse("an illegal grid or block");
  if (config.dynamicSmemBytes > size_t(limit))
    return refuse("more dynamic shared memory than was asked for by cudaFuncSetAttribute");
  bool overlaps_previous = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization)
      return refuse("a launch attribute that is not emulated");
    overlaps_previous = config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  launches.all += 1;
  launches.overlapping += overlaps_previous;
  return run_grid(thread, grid, block, uint32_t(config.dynamicSmemBytes), overlaps_previous);
}

}  // namespace emulation

const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure || error == cudaErrorInvalidConfiguration) return emulation::last_error.c_str();
  return error == cudaSuccess ? "no error" : "invalid argument";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "emulated sm_90");
  properties->major = 9;
  properties->multiProcessorCount = emulation::settings.num_sms;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::settings.num_sms;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::kMaxShared;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  emulation::begin_kernel(false);  // it overlaps nothing, nor does a kernel after it overlap it
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
