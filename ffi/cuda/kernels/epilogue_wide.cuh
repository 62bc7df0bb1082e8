// Epilogues of wide tiles, of DeepSeekFp8: this warpgroup's 64 tokens by 256 weight rows as wgmma leaves them,
//   sums[half][4 j + 2 r + b]  of token fragment_row + 8 r and row 8 j + 2 quad + b of a half.
// Rows leave through swizzled shared memory, in predicated 16-byte pieces. A warp stages and stores its own 16 rows, so
// that it waits for no other.
#pragma once
#include "epilogue.cuh"

namespace jax_moe::cuda {

// The four sums of this thread in 16 weight rows of one of its tokens, in the order of the columns: at 16 group + 2
// quad + {0, 1, 8, 9}, or of fours 16 group + 4 quad + {0, 1, 2, 3}.
template <Order kOrder>
DEVICE float4 fragment(const float (&sums)[64], int group, int r) {
  const float* low = &sums[8 * group + 2 * r];
  const float* high = low + 4;
  return kOrder == Order::kFours ? make_float4(low[0], high[0], low[1], high[1])
                                 : make_float4(low[0], low[1], high[0], high[1]);
}

// Copies this warp's staged 16 x 128 bytes to rows of `stride` bytes at `destination` (16-byte aligned).
DEVICE void store_rows(const WarpgroupContext& wg, uint8_t* destination, int64_t stride) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = wg.warp() * 16 + i * 4 + wg.lane() / 8, piece = wg.lane() % 8;
    const uint4 v = load_shared_v4(WarpgroupContext::swizzled(wg.staging, row, piece));
    if (row < wg.tokens) *reinterpret_cast<uint4*>(destination + row * stride + piece * 16) = v;
  }
}

// GEMM1.
struct WideActivation {
  const ActivationEpilogue& p;
  const WarpgroupContext& wg;

  DEVICE void run(float (&sums)[2][64], const Tile& tile) const {
    if (p.shuffled)
      run_as<Order::kFours>(sums, tile);
    else
      run_as<Order::kPlain>(sums, tile);
  }

 private:
  template <Order kOrder>
  DEVICE void run_as(float (&sums)[2][64], const Tile& tile) const {
    with_activation(p.activation, tile.expert(), [&](const auto& function) {
      constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
      const int64_t column = int64_t(tile.column) * (kGated ? 128 : 256);
      const bool second = kGated || column + 128 < p.intermediate;  // half of the last tile may be outside
      if (p.lora.delta) {
        add_lora<kOrder>(sums[0], column);
        if (second) add_lora<kOrder>(sums[1], column + (kGated ? p.intermediate : 128));
      }
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = function(sums[1][i], sums[0][i]);
        requantise<kOrder>(sums[0], column);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !second) return;
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[half][i] = function(sums[half][i]);
          requantise<kOrder>(sums[half], column + 128 * half);
        }
      }
    });
  }

  // sums += delta at columns [column, + 128).
  template <Order kOrder>
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

  // Stores 128 columns of activations from `column` on.
  template <Order kOrder>
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
    for (int group = 0; group < 8; ++group) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = fragment<kOrder>(a, group, r);
        const uint16_t low = to_e4m3x2(v.x * inverse[r], v.y * inverse[r]);
        const uint16_t high = to_e4m3x2(v.z * inverse[r], v.w * inverse[r]);
        const uint32_t at = WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, group);
        if constexpr (kOrder == Order::kFours) {
          store_shared_u32(at + 4 * wg.quad(), low | uint32_t(high) << 16);
        } else {
          store_shared_u16(at + 2 * wg.quad(), low);
          store_shared_u16(at + 2 * wg.quad() + 8, high);
        }
      }
    }
    __syncwarp();
    store_rows(wg, p.h + wg.row0 * p.intermediate + column, p.intermediate);
  }
};

// GEMM2.
struct WideBf16 {
  const Bf16Epilogue& p;
  const WarpgroupContext& wg;

  DEVICE void run(const float (&sums)[2][64], const Tile& tile) const {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {  // 64 columns = 128 bytes a row
      const int64_t first = int64_t(tile.column) * 256 + chunk * 64;
      if (first >= p.columns) return;  // the second half of the last tile when H is an odd multiple of 128
      __syncwarp();                    // what was staged before has been read
      if (p.shuffled)
        stage_fours(sums[chunk / 2], chunk % 2 * 4);
      else
        stage(&sums[chunk / 2][chunk % 2 * 32]);
      __syncwarp();
      store_rows(wg, reinterpret_cast<uint8_t*>(p.y2 + wg.row0 * p.stride + first), p.stride * 2);
    }
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
        const float4 v = fragment<Order::kFours>(sums, first + i, r);
        const uint32_t at = WarpgroupContext::swizzled(wg.staging, wg.fragment_row() + 8 * r, 2 * i + wg.quad() / 2) +
                            wg.quad() % 2 * 8;
        store_shared_v2(at, make_uint2(to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)));
      }
    }
  }
};

}  // namespace jax_moe::cuda
