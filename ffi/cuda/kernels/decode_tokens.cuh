// How the tokens of a small call come into the shared memory of decode_gemm1: bf16 that every CTA quantises for itself,
// e4m3 as the caller has them, or fresh ones that a kernel before has quantised. As decode_layout.h has them.
#pragma once
#include "decode_gemm_sm90.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {

// The factors of a word of scales.
DEVICE void store_factors(float* to, uint32_t word) {
#pragma unroll
  for (int s = 0; s < kMxScales; ++s) to[s] = mx_token_factor(word >> 8 * s & 255);
}

// The call's tokens on their way into shared memory, in 16-byte pieces, by the math threads.
// NOTE: the first pieces are asked for before anything else: behind the weights they would wait for a whole ring of
// them.
template <bool kMx, int kValueBytes>
class TokenLoader {
 public:
  DEVICE TokenLoader(const DecodeGemm1Parameters& p, uint32_t codes, float* scales)
      : p_(p), codes_(codes), scales_(scales), per_token_(p.stream.k_blocks * (p.x_is_bf16 ? 16 : 8)) {
    if (p.x_is_fresh) return;
    load(threadIdx.x);
    if (p.x_is_bf16) return;
    if (int(threadIdx.x) < p.num_tokens * p.stream.k_blocks) first_scale_ = given_scale(threadIdx.x);
  }

  // To rows of token_pitch bytes, and their scales.
  DEVICE void finish() {
    const int count = p_.num_tokens * per_token_;
    // Whole warps stay together: 16 lanes make a block of 128.
    for (int first = threadIdx.x; first - int(threadIdx.x % 32) < count; first += kInFlight * kDecodeMathThreads) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) store(first + i * kDecodeMathThreads, v_[i], count);
      load(first + kInFlight * kDecodeMathThreads);
    }
    if (p_.x_is_bf16) return;
    for (int i = threadIdx.x; i < p_.num_tokens * p_.stream.k_blocks; i += kDecodeMathThreads)
      store_scale(i, i < kDecodeMathThreads ? first_scale_ : given_scale(i));
  }

 private:
  static constexpr int kInFlight = 4;

  DEVICE void load(int first) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int piece = first + i * kDecodeMathThreads;
      v_[i] =
          piece < p_.num_tokens * per_token_ ? __ldcg(static_cast<const uint4*>(p_.x) + piece) : make_uint4(0, 0, 0, 0);
    }
  }
  // Of a token and a K block; with MxFp8 a word of four.
  DEVICE uint32_t given_scale(int i) const {
    const int token = i / p_.stream.k_blocks, chunk = i - token * p_.stream.k_blocks;
    if constexpr (kMx) {
      const uint8_t* from =
          static_cast<const uint8_t*>(p_.x_scale) + 4 * chunk * p_.block_stride + token * p_.token_stride;
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) word |= uint32_t(__ldcg(from + j * p_.block_stride)) << 8 * j;
      return word;
    } else {
      return __ldcg(static_cast<const uint32_t*>(p_.x_scale) + chunk * p_.block_stride + token * p_.token_stride);
    }
  }
  DEVICE void store_scale(int i, uint32_t scale) const {
    const int token = i / p_.stream.k_blocks, chunk = i - token * p_.stream.k_blocks;
    float* row = scales_ + token * scale_pitch(p_.stream.k_blocks, kMx);
    if constexpr (kMx)
      store_factors(row + chunk * 4, scale);
    else
      row[chunk] = __uint_as_float(scale);
  }
  DEVICE void store(int piece, const uint4& v, int count) {
    if (piece - int(threadIdx.x % 32) >= count) return;
    const int token = piece / per_token_, in_token = piece - token * per_token_;
    const uint32_t row = codes_ + token * token_pitch(p_.stream.k_blocks, kValueBytes);
    if (!p_.x_is_bf16) {
      if (piece < count) store_16(row + in_token * 16 * kValueBytes, v);
      return;
    }
    constexpr int kOfScale = kMx ? 4 : 16;  // pieces
    float scale;
    uint2 codes;
    if constexpr (kMx) {
      uint32_t byte;
      codes = quantize_bf16_mx(v, byte);
      scale = mx_token_factor(byte);
    } else {
      codes = quantize_bf16(v, scale);
    }
    if (piece >= count) return;
    store_8(row, in_token, codes);
    if (in_token % kOfScale == 0) scales_[token * scale_pitch(p_.stream.k_blocks, kMx) + in_token / kOfScale] = scale;
  }

  // Codes to their place: 16, or those of piece `eight` of 8.
  static DEVICE void store_16(uint32_t to, const uint4& codes) {
    if constexpr (kValueBytes == kHalfBytes) {
      uint4 even, odd;
      e4m3x4_to_f16x4(codes.x, even.x, odd.x), e4m3x4_to_f16x4(codes.y, even.y, odd.y);
      e4m3x4_to_f16x4(codes.z, even.z, odd.z), e4m3x4_to_f16x4(codes.w, even.w, odd.w);
      store_shared_v4(to, even);
      store_shared_v4(to + 16, odd);
    } else {
      store_shared_v4(to, codes);
    }
  }
  static DEVICE void store_8(uint32_t row, int eight, const uint2& codes) {
    if constexpr (kValueBytes == kHalfBytes) {
      uint2 even, odd;
      e4m3x4_to_f16x4(codes.x, even.x, odd.x), e4m3x4_to_f16x4(codes.y, even.y, odd.y);
      const uint32_t to = row + eight / 2 * 32 + eight % 2 * 8;
      store_shared_v2(to, even);
      store_shared_v2(to + 16, odd);
    } else {
      store_shared_v2(row + eight * 8, codes);
    }
  }

  const DecodeGemm1Parameters& p_;
  uint32_t codes_;
  float* scales_;
  int per_token_;
  uint4 v_[kInFlight];
  uint32_t first_scale_ = 0;
};

// Fresh tokens, quantised by the kernel before: rows and scales (words), by one warp, a lane a token.
// `full` is the barrier that they complete.
DEVICE void load_tokens(uint32_t full, uint32_t x, uint32_t x_scale, const DecodeGemm1Parameters& p) {
  const int lane = threadIdx.x % 32, k_blocks = p.stream.k_blocks, scale_bytes = word_pitch(k_blocks) * 4;
  if (lane == 0) mbarrier_arrive_expect(full, p.num_tokens * (k_blocks * 128 + scale_bytes));
  __syncwarp();
  if (lane >= p.num_tokens) return;
  bulk_load(x + lane * token_pitch(k_blocks, kCodeBytes),
            static_cast<const uint8_t*>(p.x) + int64_t(lane) * k_blocks * 128, k_blocks * 128, full);
  bulk_load(x_scale + lane * scale_bytes, static_cast<const float*>(p.x_scale) + lane * word_pitch(k_blocks),
            scale_bytes, full);
}

// MxFp8: the factors of fresh tokens from their words, by the math threads.
DEVICE void make_factors(float* x_scale, const uint32_t* words, const DecodeGemm1Parameters& p) {
  const int k_blocks = p.stream.k_blocks;
  for (int i = threadIdx.x; i < p.num_tokens * k_blocks; i += kDecodeMathThreads) {
    const int token = i / k_blocks, chunk = i - token * k_blocks;
    store_factors(x_scale + token * scale_pitch(k_blocks, true) + chunk * 4,
                  words[token * word_pitch(k_blocks) + chunk]);
  }
}

}  // namespace jax_moe::cuda
