// What the machine has: driver, GPUs, and whether a device can run these kernels. Nothing here launches or allocates.
#pragma once
#include <string>
#include <vector>

#include "../moe.h"

namespace jax_moe::cuda {

struct DeviceReport {
  std::string error;       // why no GPU is listed, in words; empty when there are some
  int driver_version = 0;  // newest CUDA that the driver serves, 13000 = 13.0; 0: no driver
  int runtime_version = 0;
  struct Gpu {
    std::string name;
    int major, minor, num_sms;
    int64_t memory_bytes;
  };
  std::vector<Gpu> gpus;
};

DeviceReport ReportDevices();

// kUnsupported with the next step unless `device` is a Hopper GPU under a driver that serves this build.
Status CheckDevice(int device, int* num_sms);

// Makes `device` current and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  const Status& status() const { return status_; }

 private:
  int previous_ = -1;  // -1: nothing to restore
  Status status_;
};

}  // namespace jax_moe::cuda
