// Number formats on the CPU: e4m3 (no infinity, NaN = 0x7F and 0xFF) and bf16, to and from float32. Rounding is to
// nearest even; e4m3 saturates at 448; NaN stays NaN.
// NOTE: choices are made with masks and no floating-point operation is conditional, else loops over these functions get
// branches instead of vector code.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dispatch.h"

namespace jax_moe::cpu {

inline constexpr float kFloat8Max = 448.f;

JAX_MOE_INLINE int32_t FloatBits(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
JAX_MOE_INLINE float FloatFromBits(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline constexpr int32_t kInfinityBits = 0x7F800000;

// All ones where a < b, else 0. For differences that fit into an int32.
JAX_MOE_INLINE int32_t MaskLess(int32_t a, int32_t b) { return (a - b) >> 31; }

// The low eight bits of `code`; the others are ignored.
JAX_MOE_INLINE float FloatFromFloat8(int32_t code) {
  const int32_t magnitude = code & 0x7F;
  // Exponent 0 has no leading one: with the leading one of the next exponent the value is 2^-6 too large.
  // NOTE: scaling a float32 subnormal would be shorter, and a hundred times slower on some machines.
  const int32_t subnormal = MaskLess(magnitude, 8);
  const int32_t bits = (magnitude << 20) + (120 << 23) + (subnormal & 1 << 23);  // exponent bias 7 -> 127
  const int32_t value = FloatBits(FloatFromBits(bits) - FloatFromBits(subnormal & FloatBits(0x1p-6f)));
  const int32_t nan = MaskLess(0x7E, magnitude) & (kInfinityBits | 0x400000);
  return FloatFromBits(value | nan | int32_t(uint32_t(code) << 24 & 0x80000000));
}

JAX_MOE_INLINE uint8_t Float8FromFloat(float v) {
  const int32_t bits = FloatBits(v), magnitude = bits & INT32_MAX;
  const int32_t max_bits = FloatBits(kFloat8Max), min_bits = FloatBits(0x1p-6f);  // of what has a leading one
  const int32_t large = MaskLess(max_bits, magnitude), finite = (magnitude & ~large) | (max_bits & large);
  const int32_t exponent = std::max(finite & kInfinityBits, min_bits);
  // 2^20 times the leading one: adding it rounds to three bits below the leading one, and counts them.
  const int32_t magic = exponent + (20 << 23);
  const int32_t count = FloatBits(FloatFromBits(finite) + FloatFromBits(magic)) - magic;
  const int32_t code = count + ((exponent - min_bits) >> 20);  // 0x7E for NaN, as for all that is large
  return uint8_t(code | (MaskLess(kInfinityBits, magnitude) & 1) | (bits >> 24 & 0x80));
}

JAX_MOE_INLINE float FloatFromBfloat16(uint16_t bits) { return FloatFromBits(int32_t(uint32_t(bits) << 16)); }

JAX_MOE_INLINE uint16_t Bfloat16FromFloat(float v) {
  const int32_t bits = FloatBits(v), nan = MaskLess(kInfinityBits, bits & INT32_MAX);
  const uint32_t rounded = (uint32_t(bits) + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return uint16_t((rounded & ~nan) | ((bits >> 16 | 0x40) & nan));
}

}  // namespace jax_moe::cpu
