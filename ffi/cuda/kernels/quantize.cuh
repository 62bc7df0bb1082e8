// What tokens need before GEMM1, once each: bf16 ones become e4m3 with 1x128 or 1x32 scales; MxFp8's become values
// where the kernel wants those (mx_values.cuh); E8M0 scales whose four bytes of 128 columns do not lie side by side are
// brought together. CTAs of the last route kernel that the routing has no use for do it on the side.
#pragma once
#include "mx_values.cuh"

namespace jax_moe::cuda {

struct QuantizeTokens {
  const uint16_t* x;   // bf16 [T, H]
  uint8_t* codes;      // e4m3 [T, H]
  float* scales;       // [T, scale_pitch]; MxFp8: four bytes in the place of each
  int64_t num_blocks;  // T * k_blocks
  int k_blocks;        // H / 128
  int scale_pitch;     // at least k_blocks
  bool mx;
  uint16_t* values;  // bf16 [T, H], MxFp8 only: instead of codes and scales; or null

  // By all threads of `ctas` CTAs, of which this is number `cta`.
  DEVICE void run(int cta, int ctas) const {
    if (!mx)
      run_as<false, false>(cta, ctas);
    else if (values == nullptr)
      run_as<true, false>(cta, ctas);
    else
      run_as<true, true>(cta, ctas);
  }

 private:
  // 16 lanes a block.
  template <bool kMx, bool kValues>
  DEVICE void run_as(int cta, int ctas) const {
    constexpr int kInFlight = 4;
    const int64_t step = int64_t(ctas) * blockDim.x / 16;
    // Blocks of a warp's first half: whole warps stay together.
    for (int64_t base = (int64_t(cta) * blockDim.x + threadIdx.x) / 32 * 2; base < num_blocks;
         base += kInFlight * step) {
      const int64_t first = base + threadIdx.x % 32 / 16;
      const int piece = threadIdx.x % 16;  // 8 elements
      uint4 v[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t block = first + i * step;
        v[i] = block < num_blocks ? __ldcg(reinterpret_cast<const uint4*>(x) + block * 16 + piece)
                                  : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (base + i * step >= num_blocks) break;
        const int64_t block = first + i * step;
        float scale;
        uint32_t byte;
        uint2 out;
        if constexpr (kMx)
          out = quantize_bf16_mx(v[i], byte);
        else
          out = quantize_bf16(v[i], scale);
        if (block >= num_blocks) continue;
        if constexpr (kValues) {
          store_mx_values(values + block * 128 + piece / 2 * 16, piece % 2, out, mx_scale(byte, 0));
          continue;
        }
        *(reinterpret_cast<uint2*>(codes) + block * 16 + piece) = out;
        const int of_row = int(block % k_blocks);
        float* to = scales + (block / k_blocks * scale_pitch + of_row);
        if constexpr (kMx) {
          if (piece % 4 == 0) reinterpret_cast<uint8_t*>(to)[piece / 4] = uint8_t(byte);
        } else {
          if (piece == 0) *to = scale;
        }
        if (of_row + 1 == k_blocks && piece > 0 && of_row + piece < scale_pitch)
          to[piece] = 0.f;  // whole rows are loaded
      }
    }
  }
};

// The four scales of each token and 128 columns as a word.
struct PackScales {
  const uint8_t* from;  // scale (column / 32, token) at that * block_stride + token * token_stride
  int64_t block_stride, token_stride;
  float* to;  // [H/128, T]
  int64_t num_words;
  int num_tokens;

  // By all threads of `ctas` CTAs, of which this is number `cta`.
  DEVICE void run(int cta, int ctas) const {
    for (int64_t i = int64_t(cta) * blockDim.x + threadIdx.x; i < num_words; i += int64_t(ctas) * blockDim.x) {
      const uint8_t* bytes = from + i / num_tokens * kMxScales * block_stride + i % num_tokens * token_stride;
      uint32_t word = 0;
#pragma unroll
      for (int s = 0; s < kMxScales; ++s) word |= uint32_t(__ldcg(bytes + s * block_stride)) << 8 * s;
      to[i] = __uint_as_float(word);
    }
  }
};

// Codes and scales of MxFp8 as values.
struct FoldTokens {
  const uint8_t* codes;   // e4m3 [T, H]
  const uint8_t* scales;  // scale (column / 32, token) at that * block_stride + token * token_stride
  int64_t block_stride, token_stride;
  uint16_t* values;    // bf16 [T, H]
  int64_t num_pieces;  // T * H / 16
  int of_row;          // H / 16

  // By all threads of `ctas` CTAs, of which this is number `cta`.
  DEVICE void run(int cta, int ctas) const {
    constexpr int kInFlight = 4;
    const int64_t step = int64_t(ctas) * blockDim.x;
    for (int64_t first = int64_t(cta) * blockDim.x + threadIdx.x; first < num_pieces; first += kInFlight * step) {
      uint4 v[kInFlight];
      uint32_t byte[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t piece = min(first + i * step, num_pieces - 1);
        v[i] = __ldcg(reinterpret_cast<const uint4*>(codes) + piece);
        byte[i] = __ldcg(scales + piece % of_row / 2 * block_stride + piece / of_row * token_stride);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t piece = first + i * step;
        if (piece < num_pieces) store_mx_values(values + piece * 16, v[i], mx_scale(byte[i], 0));
      }
    }
  }
};

inline constexpr int kQuantizeThreads = 256;
__global__ void quantize_tokens(const __grid_constant__ QuantizeTokens tokens);

}  // namespace jax_moe::cuda
