// Number formats on the device: e4m3 and bf16 conversions and the 1x128 scale rule of the op.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr float kFloat8Max = 448.f;
inline constexpr float kMinScale = 1.17549435e-38f;  // smallest normal float32

// The scale of a block with that largest magnitude. NOTE: fmaxf drops NaN, so a NaN element becomes a NaN code under
// the scale of the others; an infinite magnitude makes the whole block NaN or 0 times infinity.
DEVICE float block_scale(float amax) { return fmaxf(amax / kFloat8Max, kMinScale); }

// Two e4m3 codes, `lo` in the low byte; round to nearest even, saturating, NaN stays NaN.
DEVICE uint16_t to_e4m3x2(float lo, float hi) {
  return __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
}
DEVICE uint32_t to_bf16x2(float lo, float hi) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return uint32_t(__bfloat16_as_ushort(v.x)) | uint32_t(__bfloat16_as_ushort(v.y)) << 16;
}
DEVICE float bf16_lo(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_hi(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

}  // namespace jax_moe::cuda
