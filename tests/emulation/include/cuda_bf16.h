// Stand-in for the CUDA bf16 header: conversions, bit for bit (round to nearest even, NaN becomes 0x7FFF).
#pragma once
#include <cuda_runtime.h>

struct __nv_bfloat16 {
  uint16_t code;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7FFF};
  const uint32_t bits = __float_as_uint(v);
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.code) << 16); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 v) { return v.code; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t v) { return {v}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float lo, float hi) {
  return {__float2bfloat16_rn(lo), __float2bfloat16_rn(hi)};
}
