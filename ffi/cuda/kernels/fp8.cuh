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

// x / scale, correctly rounded but in a fraction of the instructions: one Newton step on x * inverse, where `inverse`
// is 1 / scale correctly rounded. NOTE: not for scales whose inverse or whose products are subnormal, infinite or NaN.
DEVICE float divide(float x, float scale, float inverse) {
  const float quotient = x * inverse;
  return fmaf(fmaf(-quotient, scale, x), inverse, quotient);
}
// Whether divide() may be used with a scale.
DEVICE bool is_plain_scale(float scale) { return scale > 1e-30f && scale < 1e30f; }

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

// 8 of 128 bf16 values of a block held by 16 neighbouring lanes -> their e4m3 codes, and the block's scale. By whole
// warps. The same codes as an IEEE division gives, so that tokens quantised by the caller (same rule) agree.
DEVICE uint2 quantize_bf16(const uint4& values, float& scale) {
  const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  float x[8], amax = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = bf16_lo(pairs[i]), x[2 * i + 1] = bf16_hi(pairs[i]);
    amax = fmaxf(amax, fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
  }
#pragma unroll
  for (int d = 8; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  scale = block_scale(amax);
  if (is_plain_scale(scale)) {
    const float inverse = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = divide(x[i], scale, inverse);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fdiv_rn(x[i], scale);
  }
  return make_uint2(to_e4m3x2(x[0], x[1]) | uint32_t(to_e4m3x2(x[2], x[3])) << 16,
                    to_e4m3x2(x[4], x[5]) | uint32_t(to_e4m3x2(x[6], x[7])) << 16);
}

// 4 of 128 float32 values of a block held by a warp -> their e4m3 codes, and the block's scale. By whole warps.
DEVICE uint32_t quantize_f32(const uint4& values, float& scale) {
  const float x[4] = {__uint_as_float(values.x), __uint_as_float(values.y), __uint_as_float(values.z),
                      __uint_as_float(values.w)};
  float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
  for (int d = 16; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  scale = block_scale(amax);
  const float inverse = 1.f / scale;
  return to_e4m3x2(x[0] * inverse, x[1] * inverse) | uint32_t(to_e4m3x2(x[2] * inverse, x[3] * inverse)) << 16;
}

}  // namespace jax_moe::cuda
