// MxFp8 in the decode kernels: the scales of weights. One is an E8M0 byte b, 2^(b - 127) or NaN for 255, of 32 columns;
// the four of 128 of K are a word. Words come into the ring beside their stage, by cp.async: one barrier tells of
// both. Here are where they lie in memory and how they get into shared memory.
#pragma once
#include "decode_layout.h"
#include "mx_scale.cuh"

namespace jax_moe::cuda {

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

// By a whole warp, asks for the words of a stage's rows, 16 or a multiple of 32 up to 32 kMine. NOTE: with as little as
// possible for a stage, or the warp would take longer than the memory.
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

// The column of a group of 32 whose row is stored as row r: the shuffle, and in GEMM1 it may be up and gate in turns.
DEVICE int plain_mx_row(int r) { return r % 8 * 4 + r / 8; }

}  // namespace jax_moe::cuda
