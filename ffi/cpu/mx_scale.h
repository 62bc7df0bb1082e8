// E8M0 scales of MxFp8 (code b is 2^(b - 127), 255 is NaN) as factors of float32. The product of two scales, 2^-254 to
// 2^254, does not fit into a float32. So each scale is low x high, of half its exponent each, and what two scales x and
// w belong to is multiplied by (low_x x high_w) and by (high_x x low_w): every one of these numbers fits.
#pragma once
#include "../moe.h"
#include "float8.h"

namespace jax_moe::cpu {

inline constexpr int kMxScales = kScaleBlock / kMxScaleBlock;  // of a row and kScaleBlock of K; one byte each
inline constexpr uint8_t kMxScaleNan = 255;

// Bits of a NaN for the code of NaN, else 0.
JAX_MOE_INLINE int32_t NanOfMxScale(uint8_t code) { return MaskLess(kMxScaleNan - 1, code) & 0x7FC00000; }

JAX_MOE_INLINE float LowFactor(uint8_t code) { return FloatFromBits((code + 127) >> 1 << 23 | NanOfMxScale(code)); }
JAX_MOE_INLINE float HighFactor(uint8_t code) { return FloatFromBits((code + 128) >> 1 << 23 | NanOfMxScale(code)); }

}  // namespace jax_moe::cpu
