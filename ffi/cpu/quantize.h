// The two quantisers of the op. DeepSeekFp8: 128 values share scale = max(amax / 448, smallest normal float32). MxFp8:
// 32 values share the smallest power of two that is at least amax / 448. Codes are e4m3(values / scale).
#pragma once
#include <cstring>

#include "float8.h"
#include "mx_scale.h"

namespace jax_moe::cpu {

// Bits of the largest magnitude of kCount values (magnitudes compare like their bits). NaN does not count.
template <int kCount>
JAX_MOE_INLINE int32_t LargestMagnitude(const float* values) {
  int32_t amax = 0;
  for (int i = 0; i < kCount; ++i) {
    const int32_t bits = FloatBits(values[i]) & INT32_MAX, magnitude = bits & ~MaskLess(kInfinityBits, bits);
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

// Quantises kScaleBlock values and returns their scale. A NaN becomes a NaN code under the scale of the others.
JAX_MOE_INLINE float QuantizeDeepSeekBlock(const float* values, uint8_t* codes) {
  constexpr float kMinScale = 0x1p-126f;
  const float wanted = FloatFromBits(LargestMagnitude<kScaleBlock>(values)) / kFloat8Max;
  const float scale = wanted > kMinScale ? wanted : kMinScale;
  for (int i = 0; i < kScaleBlock; ++i) codes[i] = Float8FromFloat(values[i] / scale);
  return scale;
}

// Quantises kMxScaleBlock values and returns the code of their scale. NaN as above; an infinity, for which there is no
// scale, makes the scale and all codes NaN.
JAX_MOE_INLINE uint8_t QuantizeMxBlock(const float* values, uint8_t* codes) {
  const int32_t amax = LargestMagnitude<kMxScaleBlock>(values);
  if (amax == kInfinityBits) {
    std::memset(codes, 0x7F, kMxScaleBlock);
    return kMxScaleNan;
  }
  // amax = 1.m x 2^e: with 448 = 1.75 x 2^8, the scale is 2^(e - 8) up to 1.75, from there on 2^(e - 7).
  const int32_t wanted = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000), scale = wanted > 0 ? wanted : 0;
  const float inverse = FloatFromBits((254 - scale) << 23);
  for (int i = 0; i < kMxScaleBlock; ++i) codes[i] = Float8FromFloat(values[i] * inverse);
  return uint8_t(scale);
}

// Quantises kScaleBlock values. Where `scale` points goes their scale, or with MxFp8 the four codes of theirs.
JAX_MOE_INLINE void QuantizeBlock(bool mx, const float* values, uint8_t* codes, float* scale) {
  if (!mx) {
    *scale = QuantizeDeepSeekBlock(values, codes);
    return;
  }
  auto* scales = reinterpret_cast<uint8_t*>(scale);
  for (int s = 0; s < kMxScales; ++s)
    scales[s] = QuantizeMxBlock(values + s * kMxScaleBlock, codes + s * kMxScaleBlock);
}

}  // namespace jax_moe::cpu
