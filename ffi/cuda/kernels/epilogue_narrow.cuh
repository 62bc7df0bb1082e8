// Epilogues of narrow tiles, up to kMaxTokens tokens (staging_narrow.cuh has the order of the sums). Tokens past the
// tile's are computed where they come in groups, and not stored.
#pragma once
#include "epilogue.cuh"
#include "mx_values.cuh"
#include "staging_narrow.cuh"

namespace jax_moe::cuda {

// GEMM1, of an ActivationEpilogueOf.
template <class Epilogue, int kMaxTokens>
struct NarrowActivation {
  static constexpr bool kMx = Epilogue::kMx;
  static constexpr int kGroups = kMaxTokens / 8;
  static_assert(kMaxTokens % 32 == 0, "tokens are staged 32 at a time");
  const Epilogue& p;
  typename Epilogue::Shared& shared;
  const WarpgroupContext& wg;

  template <int kSums>
  DEVICE void run(float (&sums)[2][kSums], const Tile& tile) const {
    if (kMx && p.shuffled)
      run_as<kMx>(sums, tile);
    else
      run_as<false>(sums, tile);
  }

 private:
  // kShuffled: as MxFp8 has it.
  template <bool kShuffled, int kSums>
  DEVICE void run_as(float (&sums)[2][kSums], const Tile& tile) const {
    with_activation(p.activation, tile.expert(), [&](const auto& function) {
      constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
      constexpr Order kOrder = !kShuffled ? Order::kFours : kGated ? Order::kTurns : Order::kEights;
      const int64_t column = int64_t(tile.column) * (kGated ? 128 : 256);
      const bool second = kGated || column + 128 < p.intermediate;  // half of the last tile may be outside
      if (p.lora.delta) add_lora<kOrder>(sums, {column, column + (kGated ? p.intermediate : 128)}, second);
      if constexpr (kGated) {
        activate<kOrder>(function, sums);
        requantise<kOrder>(sums[0], column);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !second) return;
#pragma unroll
          for (int i = 0; i < 4 * kGroups; ++i) sums[half][i] = function(sums[half][i]);
          requantise<kOrder>(sums[half], column + 128 * half);
        }
      }
    });
  }

  // The halves' columns begin at column[0] and column[1]. kTurns: the up rows' and the gate rows' do.
  template <Order kOrder, int kSums>
  DEVICE void add_lora(float (&sums)[2][kSums], const int64_t (&column)[2], bool second) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (8 * j >= wg.tokens) break;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int token = 8 * j + 2 * wg.quad() + b;
        if (token >= wg.stored) continue;
        const uint16_t* from = p.lora.of_row(wg.row0 + token);
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

  // sums[0] = the activation of up and gate: sums[0] and sums[1], or by turns v = 0 and 1 of each.
  template <Order kOrder, class Function, int kSums>
  DEVICE void activate(const Function& function, float (&sums)[2][kSums]) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (8 * j >= wg.tokens) break;
      if constexpr (kOrder == Order::kTurns) {
        float a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* of_half = &sums[i / 2][4 * j + i % 2];
          a[i] = function(of_half[2], of_half[0]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][4 * j + i] = a[i];
      } else {
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) sums[0][i] = function(sums[1][i], sums[0][i]);
      }
    }
  }

  // The largest magnitudes of a token in a warp's rows, staged as [v][warp][token]; v of kTurns only.
  static DEVICE uint32_t magnitude_at(uint32_t staging, int v, int warp, int token) {
    return staging + ((v * 4 + warp) * kMaxTokens + token) * 4;
  }

  // Of this warp's 16 rows. What each thread has of 16 tokens, four values, is reduced over the eight lanes that have
  // the same tokens; in the end each has one token.
  template <Order kOrder>
  DEVICE void stage_magnitudes(const float* a) const {
    const int lane = wg.lane();
    const bool upper = lane & 16, odd = lane & 8;
#pragma unroll
    for (int v = 0; v < (kOrder == Order::kTurns ? 2 : 1); ++v) {
#pragma unroll
      for (int group = 0; group < kGroups / 2; ++group) {
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
        const int token = 16 * group + (upper ? 8 : 0) + 2 * wg.quad() + (odd ? 1 : 0);
        if (!(lane & 4)) store_shared_f32(magnitude_at(wg.staging, v, wg.warp(), token), last);
      }
    }
  }

  // By a thread a token: its scales, to memory, and their inverses.
  template <Order kOrder>
  DEVICE void make_scales(int64_t column) const {
    const int token = wg.thread;
    if (token >= wg.tokens) return;
    float* scale_of = p.h_scale + column / 128 * p.scale_stride + wg.row0 + token;
    if constexpr (kMx) {
#pragma unroll
      for (int s = 0; s < Epilogue::kScales; ++s) {
        float amax = 0.f;
#pragma unroll
        for (int w = 0; w < (kOrder == Order::kTurns ? 4 : 2); ++w)
          amax = fmaxf(amax, load_shared_f32(kOrder == Order::kTurns ? magnitude_at(wg.staging, s, w, token)
                                                                     : magnitude_at(wg.staging, 0, 2 * s + w, token)));
        const uint32_t byte = mx_block_scale(amax);
        shared.inverse[wg.index][s][token] = mx_inverse(byte);
        if (p.h_scale && token < wg.stored)
          reinterpret_cast<uint8_t*>(scale_of)[kOrder == Order::kTurns ? 2 * s + wg.index : 2 * wg.index + s] =
              uint8_t(byte);
      }
    } else {
      float amax = 0.f;
      const uint32_t first = wg.staging - wg.index * wg.staging_bytes;
#pragma unroll
      for (int w = 0; w < 4 * kMathWarpgroups; ++w)
        amax = fmaxf(amax, load_shared_f32(magnitude_at(first + w / 4 * wg.staging_bytes, 0, w % 4, token)));
      const float scale = block_scale(amax);
      shared.inverse[wg.index][0][token] = 1.f / scale;
      if (wg.index == 0 && token < wg.stored) *scale_of = scale;
    }
  }

  // Both warpgroups have 64 of the 128 values that share a scale; of 32 all are in one.
  DEVICE void sync_scales() const { kMx ? wg.sync() : wg.sync_both(); }

  // Stores 128 columns of activations from `column` on, with the other warpgroup.
  template <Order kOrder>
  DEVICE void requantise(const float* a, int64_t column) const {
    wg.sync();  // what was staged before has been read
    stage_magnitudes<kOrder>(a);
    sync_scales();
    make_scales<kOrder>(column);
    sync_scales();
    const StagedCodes staged{wg.staging};
    uint32_t inverse[2];  // of v
#pragma unroll
    for (int v = 0; v < 2; ++v)
      inverse[v] = smem_address(&shared.inverse[wg.index][!kMx                      ? 0
                                                          : kOrder == Order::kTurns ? v
                                                                                    : wg.warp() / 2][2 * wg.quad()]);
#pragma unroll
    for (int group = 0; group < kGroups / 4; ++group) {
      if (32 * group >= wg.tokens) break;
      uint32_t units[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * group + i;
        const float2 low = load_shared_f32x2(inverse[0] + 32 * j);
        const float2 high = kOrder == Order::kTurns ? load_shared_f32x2(inverse[1] + 32 * j) : low;
        units[i] = to_e4m3x2(a[4 * j] * low.x, a[4 * j + 2] * high.x) |
                   uint32_t(to_e4m3x2(a[4 * j + 1] * low.y, a[4 * j + 3] * high.y)) << 16;
      }
      staged.put(wg, 32 * group, units);
    }
    wg.sync();
    const int piece = wg.thread % 4;
    const int64_t first = wg.row0 * p.intermediate + column + StagedCodes::first_column<kOrder>(wg, piece);
#pragma unroll
    for (int i = 0; i < kMaxTokens / 32; ++i) {
      const int token = 32 * i + wg.thread / 4;
      if (token < wg.stored) store<kOrder>(staged, token, piece, first);
    }
  }

  // 16 columns of a token, those from first + token * intermediate on.
  template <Order kOrder>
  DEVICE void store(const StagedCodes& staged, int token, int piece, int64_t first) const {
    const uint4 codes = staged.get<kOrder>(token, piece);
    if (!kMx || p.h) store_scratch_v4(p.h + first + token * p.intermediate, codes, p.stays);
    if constexpr (kMx) {
      if (p.h_values)
        store_mx_values(p.h_values + first + token * p.intermediate, codes,
                        mx_scale_of(shared.inverse[wg.index][piece / 2][token]), p.stays);
    }
  }
};

// GEMM2, of a Bf16EpilogueOf.
template <class Epilogue, int kMaxTokens>
struct NarrowBf16 {
  const Epilogue& p;
  const WarpgroupContext& wg;

  template <int kSums>
  DEVICE void run(const float (&sums)[2][kSums], const Tile& tile) const {
    if (p.shuffled)
      run_as<Epilogue::kShuffledOrder>(sums, tile);
    else
      run_as<Order::kPlain>(sums, tile);
  }

 private:
  static constexpr int kChunkTokens = 32;
  static constexpr int kBufferBytes = kChunkTokens * kWarpgroupRows * 2;  // the staging memory is two of them

  template <Order kOrder, int kSums>
  DEVICE void run_as(const float (&sums)[2][kSums], const Tile& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = int64_t(tile.column) * 256 + half * kHalfRows;
      if (first >= p.columns) return;  // the second half of the last tile when H is an odd multiple of 128
      const int piece = wg.thread % 8;
      uint16_t* to = p.y2 + wg.row0 * p.stride + first + wg.index * kWarpgroupRows + 8 * piece;
      wg.sync();  // what was staged before has been read
#pragma unroll
      for (int chunk = 0; chunk < kMaxTokens / kChunkTokens; ++chunk) {
        if (chunk * kChunkTokens >= wg.tokens) break;
        // Two buffers: the barrier below has every thread past its reads of the buffer before last.
        const StagedBf16 staged{wg.staging + chunk % 2 * kBufferBytes};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* s = &sums[half][16 * chunk + 8 * i];
          const uint32_t pairs[2][2] = {{to_bf16x2(s[0], s[1]), to_bf16x2(s[2], s[3])},
                                        {to_bf16x2(s[4], s[5]), to_bf16x2(s[6], s[7])}};
          staged.put(wg, 16 * i, pairs);
        }
        wg.sync();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 16 * i + wg.thread / 8, of_tile = chunk * kChunkTokens + token;
          if (of_tile < wg.stored) store_scratch_v4(to + of_tile * p.stride, staged.get<kOrder>(token, piece), p.stays);
        }
      }
    }
  }
};

}  // namespace jax_moe::cuda
