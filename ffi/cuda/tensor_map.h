// Tensor maps for TMA: arrays and boxes of bytes, 128-byte swizzle. Encoded on the host for every call from the current
// pointers and passed by value, which is what stream capture needs.
#pragma once
#include <cuda.h>

#include "../moe.h"

namespace jax_moe::cuda {

// uint8 [rows, columns], boxes of box_rows x 128, swizzled so that wgmma reads them without bank conflicts. l2_bytes:
// 128 or 256, that L2 reads from memory at a time; with 256 the neighbour of a box comes too.
Status EncodeBytes(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, int l2_bytes);
// uint8 [rows, columns], boxes of box_rows x 128, multiples of 16, at (column, 0, 0, row / 16); swizzled likewise.
// zipped: of every 16 rows the even ones land before the odd ones, as shuffled weights are in memory.
Status EncodeWeights(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, bool zipped,
                     int l2_bytes);
// The same in boxes of box_rows rows and two of the row's 128 bytes, its neighbours, at (0, 0, column / 128, 0, row /
// 16): eight rows of the first, the same eight of the second, and so on. What is past a row's end lands as zeros.
Status EncodePairs(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, bool zipped,
                   int l2_bytes);
// uint8 [chunks][rows][128], rows and chunks so many bytes apart, in boxes of box_chunks x box_rows x 128, swizzled.
// L2 reads 128 bytes at a time.
Status EncodeChunks(CUtensorMap* map, const void* data, int64_t rows, int64_t chunks, int64_t row_bytes,
                    int64_t chunk_bytes, int box_rows, int box_chunks);

}  // namespace jax_moe::cuda
