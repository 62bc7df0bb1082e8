// MxFp8 in the decode kernels. A scale is an E8M0 byte b, 2^(b - 127) or NaN for 255, of 32 columns; the four of 128 of
// K are a word, for weights and tokens alike. Words of weights come into the ring beside their stage, by cp.async of
// the warp that has the boxes copied: one barrier tells of both. Here are where they lie in memory, how they get into
// shared memory, and the rule by which tokens and h are quantised.
#pragma once
#include "decode_layout.h"
#include "mx_scale.cuh"

namespace jax_moe::cuda {

inline constexpr uint32_t kMxOne = 127;
inline constexpr uint32_t kMxOnes = 0x7F7F7F7F;

// The scales of weights [L, rows, K], in the caller's layout, beside their WeightStream.
struct MxScaleStream {
  const uint8_t* bytes;
  int64_t expert_bytes;  // at most 4 GiB
  int k_blocks;          // K / 128
  int step;              // bytes from one 128 of K to the next: 4, or 512 where they are interleaved 128x4
  int copy_bytes;        // 4, or more where the words of a stage are neighbours
  bool grid;             // 32x32
  int half_rows;         // of a grid, where up and gate rows take turns: those of a half; else 0

  // Where, in an expert's, those of a row of memory begin. NOTE: a grid is in the order of plain rows whatever the
  // order of the weights is. Where up and gate rows take turns, groups of eight rows are all up or all gate rows.
  DEVICE uint32_t offset(int row) const {
    if (grid) row = half_rows ? row / 8 % 2 * (half_rows / 32) + row / 64 : row / 32;
    if (step == 4) return uint32_t(row) * k_blocks * 4;
    return uint32_t(row / 128) * k_blocks * 512 + row % 32 * 16 + row % 128 / 32 * 4;
  }
};

// By a whole warp, beside the boxes of a stage: asks for the words of its rows, 16 or a multiple of 32 up to 32 kMine.
// NOTE: with as little as possible for a stage, or the warp would take longer than the memory.
template <int kMine>
class MxScaleLoader {
 public:
  DEVICE MxScaleLoader(const MxScaleStream& stream, int rows, int chunks)
      : s_(stream), rows_(rows), chunks_(chunks), words_(stream.copy_bytes / 4) {
    const int lane = threadIdx.x % 32;
    row_ = rows < 32 ? lane % 16 : lane;
    first_ = rows < 32 ? lane / 16 * words_ : 0;
  }
  // Rows of tiles to come: row_at(r) is the row of memory of row r.
  template <class RowAt>
  DEVICE void place(const RowAt& row_at) {
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      if (i == 0 || row_ + 32 * i < rows_) offset_[i] = s_.offset(row_at(row_ + 32 * i)) + first_ * s_.step;
  }
  // An expert's words of the K blocks from `chunk` on, to [rows][chunks] at `to`; every lane arrives on `barrier` once
  // its own have landed.
  DEVICE void load(uint32_t to, int expert, int chunk, uint32_t barrier) const {
    const uint8_t* from = s_.bytes + expert * s_.expert_bytes + chunk * s_.step;
    const int count = min(chunks_, s_.k_blocks - chunk), by = rows_ < 32 ? 2 * words_ : words_;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (i > 0 && row_ + 32 * i >= rows_) break;
      const uint32_t word = to + (row_ + 32 * i) * chunks_ * 4;
      const uint8_t* of_row = from + offset_[i];
      for (int block = first_; block < count; block += by, of_row += by * s_.step)
        cp_async_words(word + block * 4, of_row, words_);
    }
    cp_async_arrive(barrier);
  }

 private:
  const MxScaleStream& s_;
  int rows_, chunks_, words_;  // words of a request
  int row_, first_;            // this lane's first row, and its first K block of a stage
  uint32_t offset_[kMine];
};

// After the last of them: the copies of a thread that is still there are certain to arrive.
DEVICE void finish_mx_scales() {
  cp_async_commit();
  cp_async_wait<0>();
}

// The scale of 32 values with that largest magnitude. Zeros get 1, which the product is fast with.
DEVICE uint32_t mx_scale_or_one(float amax) { return amax == 0.f ? kMxOne : mx_block_scale(amax); }

// The word of four blocks of kLanes lanes each, from their scales.
template <int kLanes>
DEVICE uint32_t mx_word(uint32_t scale) {
  uint32_t word = scale << (threadIdx.x / kLanes % 4 * 8);
  word |= __shfl_xor_sync(~0u, word, kLanes);
  return word | __shfl_xor_sync(~0u, word, 2 * kLanes);
}

// 8 of 128 bf16 values held by 16 neighbouring lanes -> their e4m3 codes, and the word of the four scales. By whole
// warps.
DEVICE uint2 quantize_mx_bf16(const uint4& values, uint32_t& word) {
  const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  float x[8], amax = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = bf16_lo(pairs[i]), x[2 * i + 1] = bf16_hi(pairs[i]);
    amax = fmaxf(amax, fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
  }
#pragma unroll
  for (int d = 2; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  const uint32_t scale = mx_scale_or_one(amax);
  word = mx_word<4>(scale);
  const float inverse = mx_inverse(scale);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= inverse;
  return make_uint2(to_e4m3x2(x[0], x[1]) | uint32_t(to_e4m3x2(x[2], x[3])) << 16,
                    to_e4m3x2(x[4], x[5]) | uint32_t(to_e4m3x2(x[6], x[7])) << 16);
}

// 4 of 128 float32 values held by a warp, likewise.
DEVICE uint32_t quantize_mx_f32(const uint4& values, uint32_t& word) {
  const float x[4] = {__uint_as_float(values.x), __uint_as_float(values.y), __uint_as_float(values.z),
                      __uint_as_float(values.w)};
  float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
  for (int d = 4; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  const uint32_t scale = mx_scale_or_one(amax);
  word = mx_word<8>(scale);
  const float inverse = mx_inverse(scale);
  return to_e4m3x2(x[0] * inverse, x[1] * inverse) | uint32_t(to_e4m3x2(x[2] * inverse, x[3] * inverse)) << 16;
}

// The column of a group of 32 whose row is stored as row r: the shuffle, and in GEMM1 it may be up and gate in turns.
DEVICE int plain_mx_row(int r) { return r % 8 * 4 + r / 8; }

}  // namespace jax_moe::cuda
