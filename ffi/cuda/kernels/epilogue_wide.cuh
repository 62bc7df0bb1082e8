// Epilogues of wide tiles, of DeepSeekFp8: this warpgroup's 64 tokens by 256 weight rows as wgmma leaves them,
//   sums[half][4 j + 2 r + b]  of token fragment_row + 8 r and row 8 j + 2 quad + b of a half.
// Rows leave through swizzled shared memory, in predicated 16-byte pieces. A warp stages and stores its own 16 rows, so
// that it waits for no other.
#pragma once
#include "epilogue.cuh"

namespace jax_moe::cuda {

// The four sums of this thread in 16 weight rows of one of its tokens, where these are zipped or shuffled: at columns
// 16 group + 4 quad + {0, 1, 2, 3}.
DEVICE float4 fragment(const float (&sums)[64], int group, int r) {
  const float* low = &sums[8 * group + 2 * r];
  const float* high = low + 4;
  return make_float4(low[0], high[0], low[1], high[1]);
}

// This warp's 16 staged rows of 128 bytes on their way to memory, rows of `stride` bytes. In two steps, so that other
// rows can be staged while the loads of the first are on their way.
class StagedRows {
 public:
  // `destination` is 16-byte aligned, of row 0 of the warpgroup's.
  DEVICE StagedRows(const WarpgroupContext& wg, uint8_t* destination, int64_t stride, bool stays)
      : row_(wg.warp() * 16 + wg.lane() / 8),
        tokens_(wg.tokens),
        staged_(wg.staging),
        piece_(wg.lane() % 8),
        stays_(stays) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to_[i] = destination + (row_ + 4 * i) * stride + piece_ * 16;
  }
  DEVICE void load() {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows_[i] = load_shared_v4(WarpgroupContext::swizzled(staged_, row_ + 4 * i, piece_));
  }
  // To `offset` bytes behind the destination.
  DEVICE void store(int offset) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row_ + 4 * i < tokens_) store_scratch_v4(to_[i] + offset, rows_[i], stays_);
  }

 private:
  int row_, tokens_;
  uint32_t staged_;
  int piece_;
  bool stays_;
  uint8_t* to_[4];
  uint4 rows_[4];
};

// GEMM1.
struct WideActivation {
  const ActivationEpilogue& p;
  const WarpgroupContext& wg;

  DEVICE void run(float (&sums)[2][64], const Tile& tile) const {
    with_activation(p.activation, tile.expert(), [&](const auto& function) {
      constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
      const int64_t column = int64_t(tile.column) * (kGated ? 128 : 256);
      const bool second = kGated || column + 128 < p.intermediate;  // half of the last tile may be outside
      if (p.lora.delta) {
        add_lora(sums[0], column);
        if (second) add_lora(sums[1], column + (kGated ? p.intermediate : 128));
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = function(sums[1][i], sums[0][i]);
        requantise(sums[0], column);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !second) return;
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[half][i] = function(sums[half][i]);
          requantise(sums[half], column + 128 * half);
        }
      }
    });
  }

 private:
  // sums += delta at columns [column, + 128).
  DEVICE void add_lora(float (&sums)[64], int64_t column) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = wg.fragment_row() + 8 * r;
      if (row >= wg.tokens) continue;
      const uint16_t* from = p.lora.of_row(wg.row0 + row) + column;
#pragma unroll
      for (int group = 0; group < 8; ++group) {
        float* low = &sums[8 * group + 2 * r];
        float* high = low + 4;
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(from + 16 * group + 4 * wg.quad()));
        low[0] += bf16_lo(v.x), high[0] += bf16_hi(v.x), low[1] += bf16_lo(v.y), high[1] += bf16_hi(v.y);
      }
    }
  }

  // Stores 128 columns of activations from `column` on.
  DEVICE void requantise(const float (&a)[64], int64_t column) const {
    float inverse[2];  // of fragment_row and + 8
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float amax = 0.f;
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (i / 2 % 2 == r) amax = fmaxf(amax, fabsf(a[i]));
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
      const float scale = block_scale(amax);
      inverse[r] = 1.f / scale;
      const int row = wg.fragment_row() + 8 * r;
      if (wg.quad() == 0 && row < wg.tokens) p.h_scale[column / 128 * p.scale_stride + wg.row0 + row] = scale;
    }
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t codes[4];  // of two groups and two tokens
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2;
        const float4 v = fragment(a, 2 * pair + i / 2, r);
        codes[i] = to_e4m3x2(v.x * inverse[r], v.y * inverse[r]) |
                   uint32_t(to_e4m3x2(v.z * inverse[r], v.w * inverse[r])) << 16;
      }
      const int matrix = wg.lane() / 8, row = wg.warp() * 16 + matrix % 2 * 8 + wg.lane() % 8;
      store_matrix_x4(WarpgroupContext::swizzled(wg.staging, row, 2 * pair + matrix / 2), codes[0], codes[1], codes[2],
                      codes[3]);
    }
    __syncwarp();
    StagedRows rows(wg, p.h + wg.row0 * p.intermediate + column, p.intermediate, p.stays);
    rows.load();
    rows.store(0);
  }
};

// GEMM2.
struct WideBf16 {
  const Bf16Epilogue& p;
  const WarpgroupContext& wg;

  DEVICE void run(const float (&sums)[2][64], const Tile& tile) const {
    const int64_t first = int64_t(tile.column) * 256;
    const bool second = first + 128 < p.columns;  // half of the last tile is outside when H is an odd multiple of 128
    StagedRows rows(wg, reinterpret_cast<uint8_t*>(p.y2 + wg.row0 * p.stride + first), p.stride * 2, p.stays);
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {  // 64 columns = 128 bytes a row
      if (chunk == 2 && !second) break;
      __syncwarp();  // what was staged before has been read
      if (p.shuffled)
        stage_fours(sums[chunk / 2], chunk % 2 * 4);
      else
        stage(&sums[chunk / 2][chunk % 2 * 32]);
      if (chunk > 0) rows.store((chunk - 1) * 128);  // had been on their way meanwhile
      __syncwarp();
      rows.load();
    }
    rows.store((second ? 3 : 1) * 128);
  }

 private:
  DEVICE void stage(const float* s) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = wg.warp() * 16 + wg.lane() % 16, piece = 2 * i + wg.lane() / 16;
      store_matrix_x4(WarpgroupContext::swizzled(wg.staging, row, piece), to_bf16x2(s[8 * i], s[8 * i + 1]),
                      to_bf16x2(s[8 * i + 2], s[8 * i + 3]), to_bf16x2(s[8 * i + 4], s[8 * i + 5]),
                      to_bf16x2(s[8 * i + 6], s[8 * i + 7]));
    }
  }
  DEVICE void stage_fours(const float (&sums)[64], int first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = fragment(sums, first + i, r);
        const uint32_t at = WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, 2 * i + wg.quad() / 2) +
                            wg.quad() % 2 * 8;
        store_shared_v2(at, make_uint2(to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)));
      }
    }
  }
};

}  // namespace jax_moe::cuda
