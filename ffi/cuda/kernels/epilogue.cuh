// What a math warpgroup does with its sums: activation and 1x128 requantisation to e4m3 (GEMM1), or bf16 (GEMM2).
// Everything before the one rounding is float32 in registers. Options are uniform branches here, outside the hot loop.
#pragma once
#include "activation.cuh"
#include "fp8.cuh"
#include "scheduler.cuh"
#include "warpgroup.cuh"

namespace jax_moe::cuda {

// gemm1_lora_delta, added before the activation; null `delta`: none.
struct LoraDelta {
  const uint16_t* delta;           // bf16 [T*K, M], original row order
  const int32_t* row_to_expanded;  // [T*K] permuted row -> slot
  int64_t stride;                  // M

  // sums += delta at columns [column, + 128).
  template <bool kShuffled>
  DEVICE void add(const WarpgroupContext& wg, float (&sums)[64], int64_t column) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = wg.fragment_row() + 8 * r;
      if (row >= wg.rows) continue;
      const uint16_t* from = delta + __ldcg(row_to_expanded + wg.row0 + row) * stride + column;
#pragma unroll
      for (int group = 0; group < 8; ++group) {
        float* low = &sums[8 * group + 2 * r];
        float* high = low + 4;
        if constexpr (kShuffled) {
          const uint2 v = __ldg(reinterpret_cast<const uint2*>(from + 16 * group + 4 * wg.quad()));
          low[0] += bf16_lo(v.x), high[0] += bf16_hi(v.x), low[1] += bf16_lo(v.y), high[1] += bf16_hi(v.y);
        } else {
          const uint32_t a = __ldg(reinterpret_cast<const uint32_t*>(from + 16 * group + 2 * wg.quad()));
          const uint32_t b = __ldg(reinterpret_cast<const uint32_t*>(from + 16 * group + 2 * wg.quad() + 8));
          low[0] += bf16_lo(a), low[1] += bf16_hi(a), high[0] += bf16_lo(b), high[1] += bf16_hi(b);
        }
      }
    }
  }
};

// h[row, c] = e4m3(a / s), s = h_scale[c / 128, row] = the scale of the 128 values a of that row and block.
struct ActivationEpilogue {
  uint8_t* h;            // [rows, I]
  float* h_scale;        // [I/128, scale_stride]
  int64_t intermediate;  // I
  int64_t scale_stride;
  ActivationChoice activation;
  LoraDelta lora;
  bool shuffled;

  static constexpr int kStagingBytes = kStagingTileBytes;

  DEVICE void run(const WarpgroupContext& wg, float (&sums)[2][64], const Tile& tile) const {
    if (shuffled)
      run_as<true>(wg, sums, tile);
    else
      run_as<false>(wg, sums, tile);
  }

 private:
  // Gated: sums[0] up, sums[1] gate of columns [128 n, + 128). Else: columns [256 n, + 256).
  template <bool kShuffled>
  DEVICE void run_as(const WarpgroupContext& wg, float (&sums)[2][64], const Tile& tile) const {
    with_activation(activation, tile.expert, [&](const auto& function) {
      constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
      const int64_t column = int64_t(tile.column) * (kGated ? 128 : 256);
      const bool second = kGated || column + 128 < intermediate;  // half of the last tile may be outside
      if (lora.delta) {
        lora.add<kShuffled>(wg, sums[0], column);
        if (second) lora.add<kShuffled>(wg, sums[1], column + (kGated ? intermediate : 128));
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = function(sums[1][i], sums[0][i]);
        requantise<kShuffled>(wg, sums[0], column);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !second) return;
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[half][i] = function(sums[half][i]);
          requantise<kShuffled>(wg, sums[half], column + 128 * half);
        }
      }
    });
  }

  // Stores 128 columns of activations from `column` on.
  template <bool kShuffled>
  DEVICE void requantise(const WarpgroupContext& wg, const float (&a)[64], int64_t column) const {
    float amax[2] = {0.f, 0.f};  // of fragment_row and + 8
#pragma unroll
    for (int i = 0; i < 64; ++i) amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(a[i]));
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      amax[r] = fmaxf(amax[r], __shfl_xor_sync(~0u, amax[r], 1));
      amax[r] = fmaxf(amax[r], __shfl_xor_sync(~0u, amax[r], 2));
      const float scale = block_scale(amax[r]);
      inverse[r] = 1.f / scale;
      const int row = wg.fragment_row() + 8 * r;
      if (wg.quad() == 0 && row < wg.rows) h_scale[column / 128 * scale_stride + wg.row0 + row] = scale;
    }
    wg.sync();  // rows staged before have been read
#pragma unroll
    for (int group = 0; group < 8; ++group) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = fragment<kShuffled>(a, group, r);
        const uint16_t low = to_e4m3x2(v.x * inverse[r], v.y * inverse[r]);
        const uint16_t high = to_e4m3x2(v.z * inverse[r], v.w * inverse[r]);
        const uint32_t at = WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, group);
        if constexpr (kShuffled) {
          store_shared_u32(at + 4 * wg.quad(), low | uint32_t(high) << 16);
        } else {
          store_shared_u16(at + 2 * wg.quad(), low);
          store_shared_u16(at + 2 * wg.quad() + 8, high);
        }
      }
    }
    wg.sync();
    wg.store_rows(wg.staging, h + wg.row0 * intermediate + column, intermediate);
  }
};

// y2[row, 256 n + c] = bf16(sum).
struct Bf16Epilogue {
  uint16_t* y2;    // [rows, H]
  int64_t hidden;  // H
  bool shuffled;

  static constexpr int kStagingBytes = 2 * kStagingTileBytes;

  DEVICE void run(const WarpgroupContext& wg, float (&sums)[2][64], const Tile& tile) const {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {  // 64 columns = 128 bytes a row
      const int64_t first = int64_t(tile.column) * 256 + chunk * 64;
      if (first >= hidden) return;  // the second half of the last tile when H is an odd multiple of 128
      // Two buffers: the barrier below has every thread past its reads of the buffer before last.
      const uint32_t buffer = wg.staging + chunk % 2 * kStagingTileBytes;
      if (shuffled)
        stage_shuffled(wg, sums[chunk / 2], chunk % 2 * 4, buffer);
      else
        stage(wg, &sums[chunk / 2][chunk % 2 * 32], buffer);
      wg.sync();
      wg.store_rows(buffer, reinterpret_cast<uint8_t*>(y2 + wg.row0 * hidden + first), hidden * 2);
    }
  }

 private:
  static DEVICE void stage(const WarpgroupContext& wg, const float* s, uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = wg.warp() * 16 + wg.lane() % 16, piece = 2 * i + wg.lane() / 16;
      store_matrix_x4(WarpgroupContext::swizzled(buffer, row, piece), to_bf16x2(s[8 * i], s[8 * i + 1]),
                      to_bf16x2(s[8 * i + 2], s[8 * i + 3]), to_bf16x2(s[8 * i + 4], s[8 * i + 5]),
                      to_bf16x2(s[8 * i + 6], s[8 * i + 7]));
    }
  }
  static DEVICE void stage_shuffled(const WarpgroupContext& wg, const float (&sums)[64], int first, uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = fragment<true>(sums, first + i, r);
        const uint32_t at =
            WarpgroupContext::swizzled(buffer, wg.fragment_row() + 8 * r, 2 * i + wg.quad() / 2) + wg.quad() % 2 * 8;
        store_shared_v2(at, make_uint2(to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)));
      }
    }
  }
};

}  // namespace jax_moe::cuda
