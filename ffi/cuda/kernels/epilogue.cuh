// What a math warpgroup does with its 64 x 256 float32 sums: SwiGLU and 1x128 requantisation to e4m3 (GEMM1), or bf16
// (GEMM2). Both go through swizzled shared memory, so that a row leaves in 16-byte pieces and tail rows are predicated.
// Sums are held as wgmma leaves them (wgmma_sm90.cuh): sums[half][4 j + ...], half 0 and 1 = columns 0-127 and 128-255.
#pragma once
#include "activation.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {

inline constexpr int kWarpgroupRows = 64;
inline constexpr int kStagingTileBytes = kWarpgroupRows * 128;  // 64 rows of 128 bytes

// Where a warpgroup stands: its thread, its rows of the tile.
struct WarpgroupContext {
  int index;         // of the math warpgroup
  int thread;        // 0..127
  int rows;          // valid rows of these 64, 1..64
  int64_t row0;      // first permuted row
  uint32_t staging;  // its shared memory

  DEVICE int warp() const { return thread / 32; }
  DEVICE int lane() const { return thread % 32; }
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

// h[row, 128 n + c] = e4m3(a / s), s = h_scale[n, row] = the scale of the 128 values a = activation(gate, up).
struct ActivationEpilogue {
  uint8_t* h;            // [rows, I]
  float* h_scale;        // [I/128, scale_stride]
  int64_t intermediate;  // I
  int64_t scale_stride;

  static constexpr int kStagingBytes = kStagingTileBytes;

  // sums[0]: up, sums[1]: gate.
  template <class Activation>
  DEVICE void run(const WarpgroupContext& wg, float (&sums)[2][64], int column) const {
    float amax[2] = {0.f, 0.f};  // of fragment_row and + 8
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float a = Activation::apply(sums[1][i], sums[0][i]);
      sums[0][i] = a;
      amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(a));
    }
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      amax[r] = fmaxf(amax[r], __shfl_xor_sync(~0u, amax[r], 1));
      amax[r] = fmaxf(amax[r], __shfl_xor_sync(~0u, amax[r], 2));
      const float scale = block_scale(amax[r]);
      inverse[r] = 1.f / scale;
      const int row = wg.fragment_row() + 8 * r;
      if (wg.lane() % 4 == 0 && row < wg.rows) h_scale[column * scale_stride + wg.row0 + row] = scale;
    }
    wg.sync();  // the last tile's staged rows have been read
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* a = &sums[0][4 * j + 2 * r];
        const uint32_t at = WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, j / 2);
        store_shared_u16(at + j % 2 * 8 + wg.lane() % 4 * 2, to_e4m3x2(a[0] * inverse[r], a[1] * inverse[r]));
      }
    }
    wg.sync();
    wg.store_rows(wg.staging, h + wg.row0 * intermediate + column * 128, intermediate);
  }
};

// y2[row, 256 n + c] = bf16(sum).
struct Bf16Epilogue {
  uint16_t* y2;    // [rows, H]
  int64_t hidden;  // H

  static constexpr int kStagingBytes = 2 * kStagingTileBytes;

  template <class Activation>
  DEVICE void run(const WarpgroupContext& wg, float (&sums)[2][64], int column) const {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {  // 64 columns = 128 bytes a row
      const int64_t first = column * 256 + chunk * 64;
      if (first >= hidden) return;  // the second half of the last tile when H is an odd multiple of 128
      // Two buffers: the barrier below has every thread past its reads of the buffer before last.
      const uint32_t buffer = wg.staging + chunk % 2 * kStagingTileBytes;
      const float* s = &sums[chunk / 2][chunk % 2 * 32];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = wg.warp() * 16 + wg.lane() % 16, piece = 2 * i + wg.lane() / 16;
        store_matrix_x4(WarpgroupContext::swizzled(buffer, row, piece), to_bf16x2(s[8 * i], s[8 * i + 1]),
                        to_bf16x2(s[8 * i + 2], s[8 * i + 3]), to_bf16x2(s[8 * i + 4], s[8 * i + 5]),
                        to_bf16x2(s[8 * i + 6], s[8 * i + 7]));
      }
      wg.sync();
      wg.store_rows(buffer, reinterpret_cast<uint8_t*>(y2 + wg.row0 * hidden + first), hidden * 2);
    }
  }
};

}  // namespace jax_moe::cuda
