// Values of MxFp8 as bf16: code times scale, exact for scales from 2^-124 to 2^119 (below, multiples of 2^-133; above,
// up to infinity). In memory every 16 of a row lie in the order that pairs 0 2 4 6 1 3 5 7 have: with float8 weights
// read by ldmatrix, that is how lanes hold K for a wgmma of bf16.
#pragma once
#include "mx_scale.cuh"

namespace jax_moe::cuda {

// The code in byte `i`, times a scale.
DEVICE float mx_value(uint32_t codes, int i, float scale) {
  const uint32_t code = codes >> 8 * i & 255;
  // Its bits in the place of float32's say 2^-120 of it, subnormals included.
  const float value = __uint_as_float((code & 0x80) << 24 | (code & 0x7F) << 20) * 0x1p120f * scale;
  return (code & 0x7F) == 0x7F ? __uint_as_float(0x7FC00000) : value;
}
// Of four codes: their pairs.
DEVICE uint2 mx_values(uint32_t codes, float scale) {
  return make_uint2(to_bf16x2(mx_value(codes, 0, scale), mx_value(codes, 1, scale)),
                    to_bf16x2(mx_value(codes, 2, scale), mx_value(codes, 3, scale)));
}

// The values of 8 neighbours, the first (second = false) or the last of 16, to their places in the 16 that begin there.
DEVICE void store_mx_values(uint16_t* to, bool second, uint2 codes, float scale) {
  const uint2 a = mx_values(codes.x, scale), b = mx_values(codes.y, scale);
  uint2* pairs = reinterpret_cast<uint2*>(to) + second;
  pairs[0] = make_uint2(a.x, b.x);
  pairs[2] = make_uint2(a.y, b.y);
}
// Of 16; `stays`: in L2.
DEVICE void store_mx_values(uint16_t* to, uint4 codes, float scale, bool stays = false) {
  const uint2 a = mx_values(codes.x, scale), b = mx_values(codes.y, scale);
  const uint2 c = mx_values(codes.z, scale), d = mx_values(codes.w, scale);
  store_scratch_v4(to, make_uint4(a.x, b.x, c.x, d.x), stays);
  store_scratch_v4(to + 8, make_uint4(a.y, b.y, c.y, d.y), stays);
}

}  // namespace jax_moe::cuda
