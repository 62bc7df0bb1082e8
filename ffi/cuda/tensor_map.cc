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

Status Encode(CUtensorMap* map, cuuint32_t rank, const void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
              const cuuint32_t* box, int l2_bytes) {
  const Driver& driver = GetDriver();
  if (!driver.status.ok()) return driver.status;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapL2promotion promotion =
      l2_bytes == 256 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const CUresult result = driver.encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, const_cast<void*>(data), sizes,
                                        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                        promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  std::string shape;
  for (cuuint32_t i = 0; i < rank; ++i) shape = std::to_string(sizes[i]) + (i ? " x " : "") + shape;
  return Status::Internal("cuTensorMapEncodeTiled: error " + std::to_string(int(result)) + " for " + shape);
}

}  // namespace

Status EncodeBytes(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, int l2_bytes) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns)};
  const cuuint32_t box[2] = {128, cuuint32_t(box_rows)};
  return Encode(map, 2, data, sizes, strides, box, l2_bytes);
}

Status EncodeWeights(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, bool zipped,
                     int l2_bytes) {
  const cuuint64_t row = cuuint64_t(columns), sizes[4] = {row, 8, 2, cuuint64_t(rows / 16)};
  const cuuint64_t strides[3] = {zipped ? 2 * row : row, zipped ? row : 8 * row, 16 * row};
  const cuuint32_t box[4] = {128, 8, 2, cuuint32_t(box_rows / 16)};
  return Encode(map, 4, data, sizes, strides, box, l2_bytes);
}

Status EncodePairs(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, bool zipped,
                   int l2_bytes) {
  const cuuint64_t row = cuuint64_t(columns), sizes[5] = {128, 8, row / 128, 2, cuuint64_t(rows / 16)};
  const cuuint64_t strides[4] = {zipped ? 2 * row : row, 128, zipped ? row : 8 * row, 16 * row};
  const cuuint32_t box[5] = {128, 8, 2, 2, cuuint32_t(box_rows / 16)};
  return Encode(map, 5, data, sizes, strides, box, l2_bytes);
}

Status EncodeChunks(CUtensorMap* map, const void* data, int64_t rows, int64_t chunks, int64_t row_bytes,
                    int64_t chunk_bytes, int box_rows, int box_chunks) {
  const cuuint64_t sizes[3] = {128, cuuint64_t(rows), cuuint64_t(chunks)};
  const cuuint64_t strides[2] = {cuuint64_t(row_bytes), cuuint64_t(chunk_bytes)};
  const cuuint32_t box[3] = {128, cuuint32_t(box_rows), cuuint32_t(box_chunks)};
  return Encode(map, 3, data, sizes, strides, box, 128);
}

}  // namespace jax_moe::cuda
