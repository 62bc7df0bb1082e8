// Stand-in for the CUDA fp8 header: e4m3 conversions, bit for bit (round to nearest even, saturating, NaN becomes
// 0x7F).
#pragma once
#include <cuda_runtime.h>

using __nv_fp8_storage_t = uint8_t;
using __nv_fp8x2_storage_t = uint16_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float v, __nv_saturation_t saturation,
                                                __nv_fp8_interpretation_t format) {
  if (saturation != __NV_SATFINITE || format != __NV_E4M3) emulation::fail("only saturating e4m3 is emulated");
  if (std::isnan(v)) return 0x7F;
  const uint8_t sign = std::signbit(v) ? 0x80 : 0;
  const float magnitude = std::fabs(v);
  if (magnitude >= 448.f) return sign | 0x7E;
  const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
  // In units of the last of 3 mantissa bits; 16 carries into the next exponent by itself.
  const int mantissa = int(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  const int code = (exponent + 6) * 8 + mantissa;
  return uint8_t(sign | code);
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 v, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t format) {
  return uint16_t(__nv_cvt_float_to_fp8(v.x, saturation, format) | __nv_cvt_float_to_fp8(v.y, saturation, format) << 8);
}
