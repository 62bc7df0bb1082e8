// Asks the CUDA runtime about driver and devices, with every failure put in words.
#include "device.h"

#include <cuda_runtime.h>

#include <atomic>
#include <iterator>

#include "launch.h"

namespace jax_moe::cuda {
namespace {

constexpr const char* kCpuPath = "; pass CPU arrays to use the CPU backend";

std::string Version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

// Devices that were found to be Hopper GPUs, which cannot change.
std::atomic<bool> is_known_hopper[64];

// Why no device answers, with the driver's and the runtime's version.
std::string NoDevice(cudaError_t error) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no CUDA driver is installed";
  if (error == cudaErrorInsufficientDriver || driver / 1000 < runtime / 1000)
    return "the CUDA driver serves CUDA " + Version(driver) + " and this build needs CUDA " + Version(runtime) +
           "; update the driver, or build with a CUDA " + std::to_string(driver / 1000) + ".x toolkit";
  return std::string("CUDA error ") + std::to_string(int(error)) + ", " + cudaGetErrorString(error);
}

}  // namespace

DeviceReport ReportDevices() {
  DeviceReport report;
  cudaDriverGetVersion(&report.driver_version);
  cudaRuntimeGetVersion(&report.runtime_version);
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    report.error = NoDevice(error);
    cudaGetLastError();  // a machine without a GPU is no error of a later call
    return report;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, i); error != cudaSuccess) {
      report.error = CudaStatus(error, "cudaGetDeviceProperties").message;
      return report;
    }
    report.gpus.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                           int64_t(properties.totalGlobalMem)});
  }
  if (count == 0) report.error = "the CUDA driver lists no GPU";
  return report;
}

Status CheckDevice(int device, int* num_sms) {
  const bool has_entry = device >= 0 && device < int(std::size(is_known_hopper));
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && has_entry && is_known_hopper[device].load(std::memory_order_relaxed)) return {};
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) cudaGetLastError();  // told below; not for a later call to find
  if (error == cudaErrorInvalidDevice)
    return Status::Invalid("device must be a CUDA device, got " + std::to_string(device));
  if (error != cudaSuccess) return Status::Unsupported(NoDevice(error) + kCpuPath);
  if (major != 9 || minor != 0)
    return Status::Unsupported("the CUDA kernels must run on a Hopper GPU (compute capability 9.0), got " +
                               std::to_string(major) + "." + std::to_string(minor) + kCpuPath);
  if (has_entry) is_known_hopper[device].store(true, std::memory_order_relaxed);
  return {};
}

// NOTE: also when it is current already: a thread's first cudaSetDevice gives it the context that tensor maps need.
DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  status_ = CudaStatus(cudaGetDevice(&current), "cudaGetDevice");
  if (status_.ok()) status_ = CudaStatus(cudaSetDevice(device), "cudaSetDevice");
  if (status_.ok() && current != device) previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace jax_moe::cuda
