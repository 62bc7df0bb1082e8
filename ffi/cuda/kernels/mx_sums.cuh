// How products of 32 of K come under their E8M0 scales: sum += product * scale of the weight row * scale of the token,
// all exact but the last addition. Rows' scales stay in words of four, tokens' are float32. With few tokens this is
// little beside the weights' bytes: two operations of float32 for each sum and 32 of K.
#pragma once
#include "mx_scale.cuh"

namespace jax_moe::cuda {

// Of 32 products e4m3 each, a sum is below 2^23 and a multiple of 2^-18: times any scale up to kFarScale, and times
// two, it is a float32, exactly. A larger one, of weights that only the tokens' scales bring back, gives kShift to the
// other side.
inline constexpr uint32_t kFarScaleByte = 230;
inline constexpr float kFarScale = 0x1p103f, kShift = 0x1p40f, kLargest = 0x1p127f;

// Whether one of a row's four is larger: 0, or not.
DEVICE uint32_t far_scales(uint32_t word) { return bytes_above<kFarScaleByte>(word); }
// A token's: half of its scale.
DEVICE float mx_token_factor(uint32_t byte) { return .5f * __uint_as_float(mx_scale_bits(byte)); }
// A row's, number s of a word: twice its scale, at most 2 kFarScale. No exception for the smallest, half of which is no
// exponent.
DEVICE float mx_row_factor(uint32_t word, int s) { return __uint_as_float((word + 0x01010101 >> 8 * s & 255) << 23); }

// kFar: a scale of the row may be above kFarScale, or NaN.
template <bool kFar>
DEVICE float add_scaled(float sum, float product, uint32_t row_word, int s, float token) {
  float row = kFar ? mx_scale(row_word, s) : mx_row_factor(row_word, s);
  if constexpr (kFar) {
    const bool shift = row > kFarScale;
    token *= shift ? 2 * kShift : 2.f;
    token = token > kLargest ? kLargest : token;  // infinite: so is the sum, unless product is 0
    row = shift ? row / kShift : row;
  }
  return __fmaf_rn(product * row, token, sum);
}

}  // namespace jax_moe::cuda
