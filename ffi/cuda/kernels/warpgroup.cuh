// A math warpgroup and its 64 x 256 float32 sums as wgmma leaves them (wgmma_sm90.cuh): sums[half][4 j + ...], half 0
// and 1 = columns 0-127 and 128-255. Rows leave through swizzled shared memory, in predicated 16-byte pieces.
// The order of shuffled weights makes what a thread holds neighbours: four in 16 columns, or eight in 32.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr int kWarpgroupRows = 64;
inline constexpr int kStagingTileBytes = kWarpgroupRows * 128;  // 64 rows of 128 bytes

struct WarpgroupContext {
  int index;         // of the math warpgroup
  int thread;        // 0..127
  int rows;          // valid rows of these 64, 1..64
  int row0;          // first permuted row
  uint32_t staging;  // its shared memory

  DEVICE int warp() const { return thread / 32; }
  DEVICE int lane() const { return thread % 32; }
  DEVICE int quad() const { return thread % 4; }                        // of a fragment's columns
  DEVICE int fragment_row() const { return warp() * 16 + lane() / 4; }  // and + 8
  // Arrivals: the 128 threads of this warpgroup. Publishes its staging memory. Barrier 0 is the CTA's.
  DEVICE void sync() const { named_barrier_sync(1 + index, 128); }
  // 128-byte rows, 16-byte pieces swizzled by row: no bank conflicts for fragments nor for rows.
  static DEVICE uint32_t swizzled(uint32_t base, int row, int piece) {
    return base + row * 128 + ((piece ^ (row & 7)) << 4);
  }

  // Copies the staged 64 x 128 bytes to rows of `stride` bytes at `destination` (16-byte aligned).
  DEVICE void store_rows(uint32_t from, uint8_t* destination, int64_t stride) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int piece = i * 128 + thread, row = piece / 8, column = piece % 8;
      const uint4 v = load_shared_v4(swizzled(from, row, column));
      if (row < rows) *reinterpret_cast<uint4*>(destination + row * stride + column * 16) = v;
    }
  }
};

// Which columns of the matrix those of the sums are. Of fours, column n of 16 is 2 n (n < 8) or 2 (n - 8) + 1; of
// eights, column n of 32 is 4 (n % 8) + n / 8.
enum class Order { kPlain, kFours, kEights };

// The four sums of this thread in 16 columns of one of its two rows (r = 0: fragment_row, 1: + 8), in column order: at
// columns 16 group + 2 quad + {0, 1, 8, 9}, or of fours 16 group + 4 quad + {0, 1, 2, 3}.
template <Order kOrder>
DEVICE float4 fragment(const float (&sums)[64], int group, int r) {
  const float* low = &sums[8 * group + 2 * r];
  const float* high = low + 4;
  return kOrder == Order::kFours ? make_float4(low[0], high[0], low[1], high[1])
                                 : make_float4(low[0], low[1], high[0], high[1]);
}
// Where in the sums of eights the value at column 32 group + 8 quad + i is.
DEVICE constexpr int of_eights(int group, int i, int r) { return 16 * group + i % 4 * 4 + 2 * r + i / 4; }

}  // namespace jax_moe::cuda
