// What e4m3 and f16 codes mean, by table.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

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

inline float from_e4m3(uint8_t code) {
  static const std::vector<float> values = [] {
    std::vector<float> all;
    for (uint32_t c = 0; c < 256; ++c) all.push_back(decode_float(c, 4, 3, false));
    return all;
  }();
  return values[code];
}
inline float from_f16(uint16_t code) {
  static const std::vector<float> values = [] {
    std::vector<float> all;
    for (uint32_t c = 0; c < 65536; ++c) all.push_back(decode_float(c, 5, 10, true));
    return all;
  }();
  return values[code];
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
