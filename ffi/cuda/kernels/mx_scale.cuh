// E8M0 scales of MxFp8 on the device: byte b is 2^(b - 127), 255 is NaN, one for 32 values of a row. Four neighbours,
// of 128 of K, travel in a word. And the quantiser: the smallest power of two that is at least amax / 448.
#pragma once
#include "fp8.cuh"

namespace jax_moe::cuda {

inline constexpr int kMxScales = 4;  // of a row and 128 of K
inline constexpr uint32_t kMxScaleNan = 255;

// The bits of a scale as a float32, 2^-127 (subnormal) and NaN included.
DEVICE uint32_t mx_scale_bits(uint32_t byte) { return byte << 23 | ((byte + 1) % 256 < 2 ? 1u << 22 : 0u); }
// Scale s of a word.
DEVICE float mx_scale(uint32_t word, int s) { return __uint_as_float(mx_scale_bits(word >> 8 * s & 255)); }

// Asks for 1, 2 or 4 neighbouring words by one request.
template <int kWords>
DEVICE void cp_async_words(uint32_t smem, const void* global) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "as cp.async has them");
  if constexpr (kWords == 4)
    cp_async_16(smem, global);
  else if constexpr (kWords == 2)
    cp_async_8(smem, global);
  else
    cp_async_4(smem, global);
}
DEVICE void cp_async_words(uint32_t smem, const void* global, int words) {
  if (words == 4)
    cp_async_words<4>(smem, global);
  else if (words == 2)
    cp_async_words<2>(smem, global);
  else
    cp_async_words<1>(smem, global);
}

// Whether a scale of a word is above a byte: 0, or not.
template <uint32_t kByte>
DEVICE uint32_t bytes_above(uint32_t word) {
  static_assert(kByte >= 128, "found by the high bit and the others");
  return ((word & 0x7F7F7F7F) + (255 - kByte) * 0x01010101) & word & 0x80808080;
}

// The scale of 32 values with that largest magnitude. NOTE: there is none for an infinity: NaN.
DEVICE uint32_t mx_block_scale(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  // amax = 1.m x 2^e: with 448 = 1.75 x 2^8, 2^(e - 8) up to m = .75, from there on 2^(e - 7).
  const int byte = int((bits + 0x1FFFFF) >> 23) - 8;
  return bits == 0x7F800000 ? kMxScaleNan : uint32_t(max(byte, 0));
}
// 1 / scale, which is a float32 too; NaN makes all codes NaN.
DEVICE float mx_inverse(uint32_t byte) {
  return __uint_as_float(byte == kMxScaleNan ? 0x7FC00000 : (254 - byte) << 23);
}

// The scale that mx_inverse() was made of.
DEVICE float mx_scale_of(float inverse) {
  return __uint_as_float(mx_scale_bits((254 - (__float_as_uint(inverse) >> 23)) & 255));
}

// 8 of 32 bf16 values of a block held by 4 neighbouring lanes -> their e4m3 codes, and the block's scale. By whole
// warps.
DEVICE uint2 quantize_bf16_mx(const uint4& values, uint32_t& scale) {
  const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fmaxf(fabsf(bf16_lo(pairs[i])), fabsf(bf16_hi(pairs[i]))));
#pragma unroll
  for (int d = 2; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  scale = mx_block_scale(amax);
  const float inverse = mx_inverse(scale);
  uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) codes[i] = to_e4m3x2(bf16_lo(pairs[i]) * inverse, bf16_hi(pairs[i]) * inverse);
  return make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
}

// 4 of 32 float32 values held by 8 neighbouring lanes, likewise.
DEVICE uint32_t quantize_f32_mx(const uint4& values, uint32_t& scale) {
  const float x[4] = {__uint_as_float(values.x), __uint_as_float(values.y), __uint_as_float(values.z),
                      __uint_as_float(values.w)};
  float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
  for (int d = 4; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  scale = mx_block_scale(amax);
  const float inverse = mx_inverse(scale);
  return to_e4m3x2(x[0] * inverse, x[1] * inverse) | uint32_t(to_e4m3x2(x[2] * inverse, x[3] * inverse)) << 16;
}

}  // namespace jax_moe::cuda
