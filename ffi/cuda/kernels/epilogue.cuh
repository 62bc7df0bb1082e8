// What a math warpgroup does with its sums: activation and 1x128 or 1x32 requantisation to e4m3 (GEMM1), or bf16
// (GEMM2). Everything before the one rounding is float32 in registers. Options are uniform branches here, outside the
// hot loop. Tokens past the tile's are computed as they come in groups, and not stored.
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

  // sums += delta, the halves' columns from column[0] and column[1] on. kTurns: the up rows' and the gate rows' columns.
  template <Order kOrder>
  DEVICE void add(const WarpgroupContext& wg, float (&sums)[2][64], const int64_t (&column)[2], bool second) const {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (8 * j >= wg.tokens) break;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int token = 8 * j + 2 * wg.quad() + b;
        if (token >= wg.tokens) continue;
        const uint16_t* from = delta + __ldcg(row_to_expanded + wg.row0 + token) * stride;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2, v = i % 2;
          if (half == 1 && !second) continue;
          const int64_t at = kOrder == Order::kTurns ? column[v] + column_of<kOrder>(wg, half)
                                                     : column[half] + column_of<kOrder>(wg, v);
          sums[half][4 * j + 2 * v + b] += bf16_lo(__ldg(from + at));
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

  static constexpr int kScales = kMx ? 2 : 1;  // of a token, that this warpgroup's values need
  struct Shared {
    float inverse[kMathWarpgroups][kScales][kBlockM];
  };

  DEVICE void run(WarpgroupContext& wg, Shared& shared, float (&sums)[2][64], const Tile& tile) const {
    if (shuffled)
      run_as<true>(wg, shared, sums, tile);
    else
      run_as<false>(wg, shared, sums, tile);
  }

 private:
  // Gated: up and gate of columns [128 n, + 128). Else: columns [256 n, + 256).
  template <bool kShuffled>
  DEVICE void run_as(const WarpgroupContext& wg, Shared& shared, float (&sums)[2][64], const Tile& tile) const {
    with_activation(activation, tile.expert, [&](const auto& function) {
      constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
      constexpr Order kOrder = !kShuffled  ? Order::kPlain
                               : !kMx      ? Order::kFours
                               : kGated    ? Order::kTurns
                                           : Order::kEights;
      const int64_t column = int64_t(tile.column) * (kGated ? 128 : 256);
      const bool second = kGated || column + 128 < intermediate;  // half of the last tile may be outside
      if (lora.delta) lora.add<kOrder>(wg, sums, {column, column + (kGated ? intermediate : 128)}, second);
      if constexpr (kGated) {
        activate<kOrder>(function, wg, sums);
        requantise<kOrder>(wg, shared, sums[0], column);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !second) return;
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[half][i] = function(sums[half][i]);
          requantise<kOrder>(wg, shared, sums[half], column + 128 * half);
        }
      }
    });
  }

  // sums[0] = the activation of up and gate: sums[0] and sums[1], or by turns v = 0 and 1 of each.
  template <Order kOrder, class Function>
  static DEVICE void activate(const Function& function, const WarpgroupContext& wg, float (&sums)[2][64]) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (8 * j >= wg.tokens) break;
      if constexpr (kOrder == Order::kTurns) {
        float a[2][2];  // of a half, a token
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i / 2][i % 2] = function(sums[i / 2][4 * j + 2 + i % 2], sums[i / 2][4 * j + i % 2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][4 * j + i] = a[i / 2][i % 2];
      } else {
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) sums[0][i] = function(sums[1][i], sums[0][i]);
      }
    }
  }

  // The largest magnitudes of a token in a warp's rows, staged as [v][warp][token]; v of kTurns only.
  static DEVICE uint32_t magnitude_at(uint32_t staging, int v, int warp, int token) {
    return staging + ((v * 4 + warp) * kBlockM + token) * 4;
  }

  // Of this warp's 16 rows. What each thread has of 16 tokens, four values, is reduced over the eight lanes of a quad
  // that have the same tokens; in the end each has one token.
  template <Order kOrder>
  static DEVICE void stage_magnitudes(const WarpgroupContext& wg, const float (&a)[64]) {
    const int lane = wg.lane();
    const bool upper = lane & 16, odd = lane & 8;
#pragma unroll
    for (int v = 0; v < (kOrder == Order::kTurns ? 2 : 1); ++v) {
#pragma unroll
      for (int group = 0; group < 8; ++group) {
        if (16 * group >= wg.tokens) break;
        float m[4];  // of tokens 16 group + 8 (i / 2) + 2 quad + i % 2
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* of_token = &a[8 * group + 4 * (i / 2) + i % 2];
          m[i] = kOrder == Order::kTurns ? fabsf(of_token[2 * v]) : fmaxf(fabsf(of_token[0]), fabsf(of_token[2]));
        }
        float kept[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          kept[i] = fmaxf(upper ? m[2 + i] : m[i], __shfl_xor_sync(~0u, upper ? m[i] : m[2 + i], 16));
        float last = fmaxf(odd ? kept[1] : kept[0], __shfl_xor_sync(~0u, odd ? kept[0] : kept[1], 8));
        last = fmaxf(last, __shfl_xor_sync(~0u, last, 4));
        if (!(lane & 4))
          store_shared_f32(
              magnitude_at(wg.staging, v, wg.warp(), 16 * group + (upper ? 8 : 0) + 2 * wg.quad() + (odd ? 1 : 0)), last);
      }
    }
  }

  // By a thread a token: its scales, to memory, and their inverses.
  template <Order kOrder>
  DEVICE void make_scales(const WarpgroupContext& wg, Shared& shared, int64_t column) const {
    const int token = wg.thread;
    if (token >= wg.tokens) return;
    float* scale_of = h_scale + column / 128 * scale_stride + wg.row0 + token;
    if constexpr (kMx) {
#pragma unroll
      for (int s = 0; s < kScales; ++s) {
        float amax = 0.f;
#pragma unroll
        for (int w = 0; w < (kOrder == Order::kTurns ? 4 : 2); ++w)
          amax = fmaxf(amax, load_shared_f32(kOrder == Order::kTurns ? magnitude_at(wg.staging, s, w, token)
                                                                     : magnitude_at(wg.staging, 0, 2 * s + w, token)));
        const uint32_t byte = mx_block_scale(amax);
        shared.inverse[wg.index][s][token] = mx_inverse(byte);
        reinterpret_cast<uint8_t*>(scale_of)[kOrder == Order::kTurns ? 2 * s + wg.index : 2 * wg.index + s] =
            uint8_t(byte);
      }
    } else {
      float amax = 0.f;
      const uint32_t first = wg.staging - wg.index * kStagingBytes;
#pragma unroll
      for (int w = 0; w < 4 * kMathWarpgroups; ++w)
        amax = fmaxf(amax, load_shared_f32(magnitude_at(first + w / 4 * kStagingBytes, 0, w % 4, token)));
      const float scale = block_scale(amax);
      shared.inverse[wg.index][0][token] = 1.f / scale;
      if (wg.index == 0) *scale_of = scale;
    }
  }

  // Stores 128 columns of activations from `column` on, with the other warpgroup.
  template <Order kOrder>
  DEVICE void requantise(const WarpgroupContext& wg, Shared& shared, const float (&a)[64], int64_t column) const {
    wg.sync();  // what was staged before has been read
    stage_magnitudes<kOrder>(wg, a);
    // Both warpgroups have 64 of the 128 values that share a scale; of 32 all are in one.
    kMx ? wg.sync() : wg.sync_both();
    make_scales<kOrder>(wg, shared, column);
    kMx ? wg.sync() : wg.sync_both();
    const StagedCodes staged{wg.staging};
    const float* inverse[2];  // of v
#pragma unroll
    for (int v = 0; v < 2; ++v)
      inverse[v] = shared.inverse[wg.index][!kMx ? 0 : kOrder == Order::kTurns ? v : wg.warp() / 2] + 2 * wg.quad();
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      if (32 * group >= wg.tokens) break;
      uint32_t units[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * group + i;
        const float2 low = load_shared_f32x2(smem_address(inverse[0] + 8 * j));
        const float2 high = kOrder == Order::kTurns ? load_shared_f32x2(smem_address(inverse[1] + 8 * j)) : low;
        units[i] = to_e4m3x2(a[4 * j] * low.x, a[4 * j + 2] * high.x) |
                   uint32_t(to_e4m3x2(a[4 * j + 1] * low.y, a[4 * j + 3] * high.y)) << 16;
      }
      staged.put(wg, 32 * group, units);
    }
    wg.sync();
    const int piece = wg.thread % 4;
    uint8_t* to = h + wg.row0 * intermediate + column + StagedCodes::first_column<kOrder>(wg, piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 32 * i + wg.thread / 4;
      if (token < wg.tokens) *reinterpret_cast<uint4*>(to + token * intermediate) = staged.get<kOrder>(token, piece);
    }
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

  struct Shared {};

  DEVICE void run(WarpgroupContext& wg, Shared&, float (&sums)[2][64], const Tile& tile) const {
    if (shuffled)
      run_as<kShuffledOrder>(wg, sums, tile);
    else
      run_as<Order::kPlain>(wg, sums, tile);
  }

 private:
  static constexpr int kChunkTokens = 32;
  static constexpr int kBufferBytes = kChunkTokens * kWarpgroupRows * 2;  // the staging memory is two of them

  template <Order kOrder>
  DEVICE void run_as(const WarpgroupContext& wg, const float (&sums)[2][64], const Tile& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = int64_t(tile.column) * 256 + half * kHalfRows;
      if (first >= hidden) return;  // the second half of the last tile when H is an odd multiple of 128
      const int piece = wg.thread % 8;
      uint16_t* to = y2 + wg.row0 * hidden + first + wg.index * kWarpgroupRows + 8 * piece;
#pragma unroll
      for (int chunk = 0; chunk < kBlockM / kChunkTokens; ++chunk) {
        if (chunk * kChunkTokens >= wg.tokens) break;
        const StagedBf16 staged{wg.staging + chunk % 2 * kBufferBytes};
        // Of two buffers; where the last one was of the same parity, its readers are waited for.
        if (chunk == 0) wg.sync();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* s = &sums[half][16 * chunk + 8 * i];
          staged.put(wg, 16 * i, {{to_bf16x2(s[0], s[1]), to_bf16x2(s[2], s[3])}, {to_bf16x2(s[4], s[5]), to_bf16x2(s[6], s[7])}});
        }
        wg.sync();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 16 * i + wg.thread / 8, of_tile = chunk * kChunkTokens + token;
          if (of_tile < wg.tokens)
            *reinterpret_cast<uint4*>(to + of_tile * hidden) = staged.get<kOrder>(token, piece);
        }
      }
    }
  }
};
using Bf16Epilogue = Bf16EpilogueOf<Order::kFours>;
using MxBf16Epilogue = Bf16EpilogueOf<Order::kEights>;

}  // namespace jax_moe::cuda
