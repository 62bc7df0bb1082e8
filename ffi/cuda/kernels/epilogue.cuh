// What a math warpgroup does with its sums: activation and 1x128 or 1x32 requantisation to e4m3 (GEMM1), or bf16
// (GEMM2). Everything before the one rounding is float32 in registers. Options are uniform branches here, outside the
// hot loop.
#pragma once
#include "activation.cuh"
#include "mx_scale.cuh"
#include "scheduler.cuh"
#include "warpgroup.cuh"

namespace jax_moe::cuda {

// gemm1_lora_delta, added before the activation; null `delta`: none.
struct LoraDelta {
  const uint16_t* delta;           // bf16 [T*K, M], original row order
  const int32_t* row_to_expanded;  // [T*K] permuted row -> slot
  int64_t stride;                  // M

  // sums += delta at columns [column, + 128).
  template <Order kOrder>
  DEVICE void add(const WarpgroupContext& wg, float (&sums)[64], int64_t column) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = wg.fragment_row() + 8 * r;
      if (row >= wg.rows) continue;
      const uint16_t* from = delta + __ldcg(row_to_expanded + wg.row0 + row) * stride + column;
      if constexpr (kOrder == Order::kEights) {
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const uint4 v = __ldg(reinterpret_cast<const uint4*>(from + 32 * group + 8 * wg.quad()));
          const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 8; i += 2) {
            sums[of_eights(group, i, r)] += bf16_lo(pairs[i / 2]);
            sums[of_eights(group, i + 1, r)] += bf16_hi(pairs[i / 2]);
          }
        }
      } else {
#pragma unroll
        for (int group = 0; group < 8; ++group) {
          float* low = &sums[8 * group + 2 * r];
          float* high = low + 4;
          if constexpr (kOrder == Order::kFours) {
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
  }
};

// h[row, c] = e4m3(a / s), s = h_scale[c / 128, row] = the scale of the 128 values a of that row and block. MxFp8: s is
// of 32 values, and h_scale[c / 128, row] holds the four E8M0 bytes of 128.
template <bool kMx>
struct ActivationEpilogueOf {
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
      constexpr Order kOrder = !kShuffled ? Order::kPlain : kMx && !kGated ? Order::kEights : Order::kFours;
      if constexpr (kMx && kShuffled && kGated) part_turns(sums);
      const int64_t column = int64_t(tile.column) * (kGated ? 128 : 256);
      const bool second = kGated || column + 128 < intermediate;  // half of the last tile may be outside
      if (lora.delta) {
        lora.add<kOrder>(wg, sums[0], column);
        if (second) lora.add<kOrder>(wg, sums[1], column + (kGated ? intermediate : 128));
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = function(sums[1][i], sums[0][i]);
        requantise<kOrder>(wg, sums[0], column);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !second) return;
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[half][i] = function(sums[half][i]);
          requantise<kOrder>(wg, sums[half], column + 128 * half);
        }
      }
    });
  }

  // Shuffled gated weights of MxFp8: a tile's 256 columns are of eights, up and gate by turns. To sums[0] up, sums[1]
  // gate, both of fours: what a thread has of 32 columns is its four of 16 in either.
  static DEVICE void part_turns(float (&sums)[2][64]) {
    float parted[2][64];
#pragma unroll
    for (int group = 0; group < 8; ++group) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i)  // fragment<Order::kFours> has its values at 0, 4, 1, 5
          parted[i % 2][8 * group + 2 * r + i / 2 % 2 * 4 + i / 4] = sums[group / 4][of_eights(group % 4, i, r)];
      }
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i / 64][i % 64] = parted[i / 64][i % 64];
  }

  // Stores 128 columns of activations from `column` on.
  template <Order kOrder>
  DEVICE void requantise(const WarpgroupContext& wg, const float (&a)[64], int64_t column) const {
    constexpr int kScales = kMx ? kMxScales : 1, kPerScale = 64 / kScales;
    float inverse[2][kScales];  // of fragment_row and + 8
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float scale = 0.f;
      uint32_t word = 0;
#pragma unroll
      for (int s = 0; s < kScales; ++s) {
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < kPerScale; ++i)
          if (i / 2 % 2 == r) amax = fmaxf(amax, fabsf(a[s * kPerScale + i]));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
        if constexpr (kMx) {
          const uint32_t byte = mx_block_scale(amax);
          inverse[r][s] = mx_inverse(byte);
          word |= byte << 8 * s;
        } else {
          scale = block_scale(amax);
          inverse[r][s] = 1.f / scale;
        }
      }
      const int row = wg.fragment_row() + 8 * r;
      if (wg.quad() == 0 && row < wg.rows)
        h_scale[column / 128 * scale_stride + wg.row0 + row] = kMx ? __uint_as_float(word) : scale;
    }
    wg.sync();  // rows staged before have been read
    if constexpr (kOrder == Order::kEights) {
#pragma unroll
      for (int group = 0; group < 4; ++group) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t pairs[4];
#pragma unroll
          for (int i = 0; i < 8; i += 2)
            pairs[i / 2] = to_e4m3x2(a[of_eights(group, i, r)] * inverse[r][group * kScales / 4],
                                     a[of_eights(group, i + 1, r)] * inverse[r][group * kScales / 4]);
          const int piece = 2 * group + wg.quad() / 2;
          store_shared_v2(WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, piece) + wg.quad() % 2 * 8,
                          make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16));
        }
      }
    } else {
#pragma unroll
      for (int group = 0; group < 8; ++group) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float4 v = fragment<kOrder>(a, group, r);
          const float factor = inverse[r][group * kScales / 8];
          const uint16_t low = to_e4m3x2(v.x * factor, v.y * factor);
          const uint16_t high = to_e4m3x2(v.z * factor, v.w * factor);
          const uint32_t at = WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, group);
          if constexpr (kOrder == Order::kFours) {
            store_shared_u32(at + 4 * wg.quad(), low | uint32_t(high) << 16);
          } else {
            store_shared_u16(at + 2 * wg.quad(), low);
            store_shared_u16(at + 2 * wg.quad() + 8, high);
          }
        }
      }
    }
    wg.sync();
    wg.store_rows(wg.staging, h + wg.row0 * intermediate + column, intermediate);
  }
};
using ActivationEpilogue = ActivationEpilogueOf<false>;
using MxActivationEpilogue = ActivationEpilogueOf<true>;

// y2[row, 256 n + c] = bf16(sum).
template <Order kShuffledOrder>
struct Bf16EpilogueOf {
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
      if (shuffled && kShuffledOrder == Order::kFours)
        stage_fours(wg, sums[chunk / 2], chunk % 2 * 4, buffer);
      else if (shuffled)
        stage_eights(wg, sums[chunk / 2], chunk % 2 * 2, buffer);
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
  static DEVICE void stage_fours(const WarpgroupContext& wg, const float (&sums)[64], int first, uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = fragment<Order::kFours>(sums, first + i, r);
        const uint32_t at =
            WarpgroupContext::swizzled(buffer, wg.fragment_row() + 8 * r, 2 * i + wg.quad() / 2) + wg.quad() % 2 * 8;
        store_shared_v2(at, make_uint2(to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)));
      }
    }
  }
  static DEVICE void stage_eights(const WarpgroupContext& wg, const float (&sums)[64], int first, uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t pairs[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          pairs[n] = to_bf16x2(sums[of_eights(first + i, 2 * n, r)], sums[of_eights(first + i, 2 * n + 1, r)]);
        store_shared_v4(WarpgroupContext::swizzled(buffer, wg.fragment_row() + 8 * r, 4 * i + wg.quad()),
                        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      }
    }
  }
};
using Bf16Epilogue = Bf16EpilogueOf<Order::kFours>;
using MxBf16Epilogue = Bf16EpilogueOf<Order::kEights>;

}  // namespace jax_moe::cuda
