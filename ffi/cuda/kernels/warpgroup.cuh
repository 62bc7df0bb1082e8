// A math warpgroup and its 128 float32 sums a thread. Tiles of many tokens are wide: tokens on the M side of wgmma,
// this warpgroup has 64 of them times all 256 weight rows. Tiles of few are narrow: weight rows on the M side, this
// warpgroup has 64 of each half times all tokens, in a few sizes.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr int kHalfRows = 128;      // weight rows of a half of a tile, one scale block
inline constexpr int kWarpgroupRows = 64;  // of the M side
inline constexpr int kMathWarpgroups = 2;

struct WarpgroupContext {
  static constexpr int kBothBarrier = 1 + kMathWarpgroups, kTurnBarrier = kBothBarrier + 1;

  int index;          // of the math warpgroup
  int thread;         // 0..127
  int tokens;         // of a narrow tile; of a wide one those of this warpgroup
  int stored;         // of those, whose results are: all, or none
  int row0;           // permuted row of the first of them
  uint32_t staging;   // its shared memory; those of the warpgroups are neighbours
  int staging_bytes;  // of one
  bool leads;         // whether the other warpgroup waits for this one's next products

  DEVICE int warp() const { return thread / 32; }
  DEVICE int lane() const { return thread % 32; }
  DEVICE int quad() const { return thread % 4; }                        // of a fragment's columns
  DEVICE int fragment_row() const { return warp() * 16 + lane() / 4; }  // of the 64, and + 8
  // Arrivals: the 128 threads of this warpgroup, or those of both. Publishes what they wrote. Barrier 0 is the CTA's.
  DEVICE void sync() const { named_barrier_sync(1 + index, 128); }
  DEVICE void sync_both() const { named_barrier_sync(kBothBarrier, kMathWarpgroups * 128); }
  // The second warpgroup begins a wide tile when the first has asked for its first products, so that from there on they
  // take turns: one adds its sums while tensor cores have the other's wgmmas.
  DEVICE void let_other_begin() const { named_barrier_arrive(kTurnBarrier, kMathWarpgroups * 128, leads); }
  DEVICE void wait_for_other() const { named_barrier_sync(kTurnBarrier, kMathWarpgroups * 128); }
  // Rows of 128 bytes in pieces of 16, swizzled by row: no bank conflicts for fragments nor for rows.
  static DEVICE uint32_t swizzled(uint32_t base, int row, int piece) {
    return base + row * 128 + ((piece ^ (row & 7)) << 4);
  }
};

// Which output columns weight rows are, as they come into shared memory.
enum class Order {
  kPlain,   // column = row; of GEMM2
  kFours,   // shuffled, or zipped: row n of 16 is column 2 n (n < 8) or 2 (n - 8) + 1
  kEights,  // shuffled, MxFp8: row n of 32 is column 4 (n % 8) + n / 8
  kTurns    // shuffled, MxFp8, gated: as kEights, of columns whose even ones are up and whose odd ones are gate
};

}  // namespace jax_moe::cuda
