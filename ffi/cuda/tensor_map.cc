// Encodes tensor maps through the driver, found at run time so that nothing links to libcuda.
#include "tensor_map.h"

#include <cuda_runtime.h>

#include "launch.h"

namespace jax_moe::cuda {
namespace {

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

struct Driver {
  EncodeFunction encode = nullptr;
  Status status;
};

// Looked up once a process; the same for all devices.
const Driver& GetDriver() {
  static const Driver driver = [] {
    Driver d;
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    d.status = CudaStatus(error, "looking up cuTensorMapEncodeTiled");
    if (d.status.ok() && (result != cudaDriverEntryPointSuccess || function == nullptr))
      d.status = Status::Unsupported("the CUDA driver has no cuTensorMapEncodeTiled; install driver 525 or newer");
    d.encode = reinterpret_cast<EncodeFunction>(function);
    return d;
  }();
  return driver;
}

Status Encode(CUtensorMap* map, CUtensorMapDataType type, const void* data, cuuint64_t columns, cuuint64_t rows,
              cuuint64_t stride_bytes, cuuint32_t box_columns, cuuint32_t box_rows, CUtensorMapSwizzle swizzle) {
  const Driver& driver = GetDriver();
  if (!driver.status.ok()) return driver.status;
  const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {stride_bytes};
  const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  const CUresult result =
      driver.encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return Status::Internal("cuTensorMapEncodeTiled: error " + std::to_string(int(result)) + " for " +
                          std::to_string(rows) + " x " + std::to_string(columns));
}

}  // namespace

Status EncodeBytes(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows) {
  return Encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, data, columns, rows, columns, 128, box_rows,
                CU_TENSOR_MAP_SWIZZLE_128B);
}

Status EncodeScales(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t stride,
                    int box_columns) {
  return Encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data, columns, rows, stride * 4, box_columns, 1,
                CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace jax_moe::cuda
