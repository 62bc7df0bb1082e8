// Tensor maps for TMA: two-dimensional arrays, boxes, 128-byte swizzle or none. Encoded on the host for every call from
// the current pointers and passed by value, which is what stream capture needs.
#pragma once
#include <cuda.h>

#include "../moe.h"

namespace jax_moe::cuda {

// uint8 [rows, columns], boxes of box_rows x 128, swizzled so that wgmma reads them without bank conflicts.
Status EncodeBytes(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows);
// float32 [rows, columns] with rows `stride` elements apart, boxes of 1 x box_columns.
Status EncodeScales(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_columns);

}  // namespace jax_moe::cuda
