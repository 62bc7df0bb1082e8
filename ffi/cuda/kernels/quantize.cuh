// What tokens need before GEMM1, once each: bf16 ones become e4m3 with 1x128 or 1x32 scales; MxFp8's become values
// where the kernel wants those (mx_values.cuh); E8M0 scales whose four bytes of 128 columns do not lie side by side are
// brought together. CTAs of the last route kernel that the routing has no use for do it on the side.
#pragma once
#include "mx_values.cuh"
#include "slots.cuh"

namespace jax_moe::cuda {

// From so many tokens on it pays to look up which have a local expert.
inline constexpr int kLeastTokensToAskAbout = 1024;

// Which tokens are needed. A warp asks about one, and is told before it reads it.
struct AllTokens {
  DEVICE int ask(int64_t) const { return 0; }
  DEVICE bool told(int) const { return true; }
};
struct TokensOfLocalExperts {
  const SlotExperts& slots;
  int top_k;      // a lane each
  int64_t first;  // slots.first_local()

  DEVICE int ask(int64_t token) const {
    const int lane = threadIdx.x % 32;
    return lane < top_k ? __ldcg(slots.topk_ids + token * top_k + lane) : -1;
  }
  DEVICE bool told(int element) const { return __any_sync(~0u, slots.local_expert(element, first) >= 0); }
};

struct QuantizeTokens {
  const uint16_t* x;  // bf16 [T, H]
  uint8_t* codes;     // e4m3 [T, H]
  float* scales;      // [T, scale_pitch]; MxFp8: four bytes in the place of each
  int num_tokens;     // T
  int k_blocks;       // H / 128
  int scale_pitch;    // at least k_blocks
  bool mx;
  uint16_t* values;  // bf16 [T, H], MxFp8 only: instead of codes and scales; or null

  // By all threads of `ctas` CTAs, of which this is number `cta`.
  template <class Needed>
  DEVICE void run(int cta, int ctas, const Needed& needed) const {
    if (!mx)
      run_as<false, false>(cta, ctas, needed);
    else if (values == nullptr)
      run_as<true, false>(cta, ctas, needed);
    else
      run_as<true, true>(cta, ctas, needed);
  }

 private:
  static constexpr int kInFlight = 4;  // steps

  // A warp takes every parts-th of the steps of a token, two blocks each.
  template <bool kMx, bool kValues, class Needed>
  DEVICE void run_as(int cta, int ctas, const Needed& needed) const {
    const unsigned of_cta = blockDim.x / 32, warps = ctas * of_cta, steps = (k_blocks + 1) / 2;
    const unsigned parts = min(max(warps / unsigned(num_tokens), (steps + kInFlight - 1) / kInFlight), steps);
    const unsigned units = num_tokens * parts;  // NOTE: no more than tokens have pieces of 256 bytes
    unsigned unit = cta * of_cta + threadIdx.x / 32;
    int asked = unit < units ? needed.ask(unit / parts) : 0;
    while (unit < units) {
      const unsigned token = unit / parts, part = unit - token * parts;
      const bool is_needed = needed.told(asked);
      unit += warps;
      if (unit < units) asked = needed.ask(unit / parts);
      for (unsigned step = is_needed ? part : steps; step < steps; step += kInFlight * parts)
        quantize<kMx, kValues>(token, int(step), int(parts));
    }
  }

  // Steps first, first + stride, ..., kInFlight of them at most.
  template <bool kMx, bool kValues>
  DEVICE void quantize(int64_t token, int first, int stride) const {
    const int half = threadIdx.x % 32 / 16, piece = threadIdx.x % 16;  // 8 elements of a block
    uint4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int of_row = 2 * (first + i * stride) + half;
      v[i] = of_row < k_blocks ? __ldcg(reinterpret_cast<const uint4*>(x) + (token * k_blocks + of_row) * 16 + piece)
                               : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int of_row = 2 * (first + i * stride) + half;
      if (of_row - half >= k_blocks) break;
      float scale;
      uint32_t byte;
      uint2 out;
      if constexpr (kMx)
        out = quantize_bf16_mx(v[i], byte);
      else
        out = quantize_bf16(v[i], scale);
      if (of_row >= k_blocks) continue;
      const int64_t block = token * k_blocks + of_row;
      if constexpr (kValues) {
        store_mx_values(values + block * 128 + piece / 2 * 16, piece % 2, out, mx_scale(byte, 0));
        continue;
      }
      *(reinterpret_cast<uint2*>(codes) + block * 16 + piece) = out;
      float* to = scales + (token * scale_pitch + of_row);
      if constexpr (kMx) {
        if (piece % 4 == 0) reinterpret_cast<uint8_t*>(to)[piece / 4] = uint8_t(byte);
      } else {
        if (piece == 0) *to = scale;
      }
      if (of_row + 1 == k_blocks && piece > 0 && of_row + piece < scale_pitch)
        to[piece] = 0.f;  // whole rows are loaded
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
