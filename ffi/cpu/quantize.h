// The 1x128 quantiser of the op: scale = max(amax / 448, smallest normal float32), codes = e4m3(values / scale).
#pragma once
#include "../moe.h"
#include "float8.h"

namespace jax_moe::cpu {

// Quantises one block of kScaleBlock values and returns its scale. A NaN becomes a NaN code under the scale of the
// others.
JAX_MOE_INLINE float QuantizeBlock(const float* values, uint8_t* codes) {
  int32_t amax = 0;  // magnitudes compare like their bits
  for (int i = 0; i < kScaleBlock; ++i) {
    const int32_t bits = FloatBits(values[i]) & INT32_MAX, magnitude = bits & ~MaskLess(kInfinityBits, bits);
    amax = magnitude > amax ? magnitude : amax;
  }
  constexpr float kMinScale = 0x1p-126f;
  const float wanted = FloatFromBits(amax) / kFloat8Max, scale = wanted > kMinScale ? wanted : kMinScale;
  for (int i = 0; i < kScaleBlock; ++i) codes[i] = Float8FromFloat(values[i] / scale);
  return scale;
}

}  // namespace jax_moe::cpu
