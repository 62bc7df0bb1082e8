// What e4m3 and f16 codes mean, by table.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {

// The value of a code with that many bits of exponent and mantissa below its sign. The largest exponent is infinity and
// NaN as in IEEE 754, or, in e4m3, has NaN for its last code only.
inline float decode_float(uint32_t code, int exponent_bits, int mantissa_bits, bool has_infinity) {
  const uint32_t top = (1u << exponent_bits) - 1, one = 1u << mantissa_bits;
  const uint32_t exponent = code >> mantissa_bits & top, mantissa = code & (one - 1);
  const int bias = int(top / 2);
  float magnitude;
  if (exponent == top && has_infinity)
    magnitude = mantissa ? NAN : INFINITY;
  else if (exponent == top && mantissa == one - 1)
    magnitude = NAN;
  else
    magnitude =
        std::ldexp(float(exponent ? one + mantissa : mantissa), int(exponent ? exponent : 1) - bias - mantissa_bits);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

template <size_t kCodes>
std::array<float, kCodes> decode_all(int exponent_bits, int mantissa_bits, bool has_infinity) {
  std::array<float, kCodes> values;
  for (uint32_t code = 0; code < kCodes; ++code)
    values[code] = decode_float(code, exponent_bits, mantissa_bits, has_infinity);
  return values;
}
inline const std::array<float, 1 << 8> kE4m3Values = decode_all<1 << 8>(4, 3, false);
inline const std::array<float, 1 << 16> kF16Values = decode_all<1 << 16>(5, 10, true);
inline float from_e4m3(uint8_t code) { return kE4m3Values[code]; }
inline float from_f16(uint16_t code) { return kF16Values[code]; }
inline float from_bf16(uint16_t code) {
  const uint32_t bits = uint32_t(code) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Exact; every NaN becomes 0x7FFF.
inline uint16_t e4m3_to_f16(uint8_t code) {
  const float v = from_e4m3(code);
  if (std::isnan(v)) return 0x7FFF;
  const uint16_t sign = code & 0x80 ? 0x8000 : 0;
  if (v == 0.f) return sign;
  // All e4m3 values are normal in f16.
  const int exponent = std::ilogb(v);
  const int mantissa = int(std::ldexp(std::fabs(v), 10 - exponent)) - 1024;
  return uint16_t(sign | (exponent + 15) << 10 | mantissa);
}

}  // namespace emulation
