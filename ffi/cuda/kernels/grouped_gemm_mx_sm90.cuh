// The grouped GEMMs (grouped_gemm_sm90.cuh) with the scales of MxFp8: E8M0, 1x32 on A, 1x32 or 32x32 on B. One wgmma a
// half and 32 of K, then sums += acc * scale of the row * scale of the column, all exact but the last addition. Two
// operations of float32 for each sum and 32 of K take twice the time of the wgmmas: the ALUs decide, not the memory.
//   shared memory, 3 stages:  as DeepSeekFp8's, and the scales of B as floats, made of their bytes by producer threads
#pragma once
#include "grouped_gemm_sm90.cuh"

namespace jax_moe::cuda {

// kInFlight: of three stages one is asked for, one awaited and one multiplied.
struct MxFormat {
  static constexpr int kStages = 3, kInFlight = 1;
  struct Stage : DeepSeekFormat::Stage {
    uint32_t b_scale[kMxScales][2 * kHalfN];  // float bits; in 16 columns those of a thread (mx_scale_place) together
  };
};
static_assert(sizeof(MxFormat::Stage) % 1024 == 0, "swizzled tiles");

// Columns 16 g + 2 q + {0, 1, 8, 9}, which thread q of four has in its accumulators, lie side by side.
DEVICE int mx_scale_place(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}

// How the scales of weights, [L * rows, K/32] or one for 32 rows, lie in memory.
enum class MxScaleOrder {
  kRows,         // as the rows
  kGrid,         // 32x32, as the rows, which may be shuffled in groups of 32
  kGridByTurns,  // 32x32, up then gate rows, where up and gate rows of the weights take turns
  kInterleaved   // of shuffled rows, 128x4: words of row r and block k at [r / 128][k][r % 32][r % 128 / 32]
};
struct MxWeightScales {
  const uint32_t* words;
  MxScaleOrder order;

  // The word of a row of an expert's weights and the first 128 of K, and how far the next one is. NOTE: 2^32 words are
  // the scales of 512 GiB of weights.
  DEVICE uint32_t first(const GemmShape& shape, int expert, int row) const {
    const uint32_t rows = shape.rows_per_expert, k_blocks = shape.k_blocks, base = uint32_t(expert) * rows, r = row;
    switch (order) {
      case MxScaleOrder::kGrid:
        return (base + r) / 32 * k_blocks;
      case MxScaleOrder::kGridByTurns:  // of 32 rows 16 are up rows, and those in the first of every two eights
        return (base / 32 + r / 64 + r / 8 % 2 * (rows / 64)) * k_blocks;
      case MxScaleOrder::kInterleaved:
        return (base + r) / 128 * k_blocks * 128 + r % 32 * 4 + r % 128 / 32;
      default:
        return (base + r) * k_blocks;
    }
  }
  DEVICE uint32_t step() const { return order == MxScaleOrder::kInterleaved ? 128 : 1; }
};

// What one of 256 / kRows producer threads does for the scales of B: those of kRows weight rows. Read a stage ahead.
template <int kRows>
class MxScaleFeed {
 public:
  DEVICE MxScaleFeed(const MxWeightScales& scales, int thread) : scales_(scales), thread_(thread) {}

  DEVICE void begin(const GemmShape& shape, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int column = thread_ + i * kThreads;
      at_[i] = scales_.first(shape, tile.expert, b_row(shape, tile, column / kHalfN) + column % kHalfN);
      word_[i] = __ldg(scales_.words + at_[i]);
    }
  }
  DEVICE void put(MxFormat::Stage& stage, const GemmShape& shape, int k) {
    const uint32_t to = smem_address(&stage.b_scale[0][mx_scale_place(thread_)]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int s = 0; s < kMxScales; ++s)
        store_shared_u32(to + (s * 2 * kHalfN + i * kThreads) * 4, mx_scale_bits(word_[i] >> 8 * s & 255));
      at_[i] += scales_.step();
      if (k + 1 < shape.k_blocks) word_[i] = __ldg(scales_.words + at_[i]);
    }
  }

 private:
  static constexpr int kThreads = 2 * kHalfN / kRows;
  const MxWeightScales& scales_;
  int thread_;
  uint32_t at_[kRows], word_[kRows];
};

// GEMM2's scales of B, by kScaleThreads threads beside the one of `produce`; each arrives at `full`.
inline constexpr int kScaleThreads = 64;
template <class Shared>
DEVICE void feed_scales(Shared& shared, const MxWeightScales& scales, const GemmShape& shape, int thread) {
  MxScaleFeed<2 * kHalfN / kScaleThreads> feed(scales, thread);
  typename Shared::Cursor at;
  TileReader reader;
  for (Tile tile; (tile = reader.next(shared.tiles)).rows > 0;) {
    feed.begin(shape, tile);
    for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
      shared.barriers.wait_empty(at);
      feed.put(shared.stages[at.stage()], shape, k);
      mbarrier_arrive(shared.barriers.full_address(at.stage()));
    }
  }
}

// What a math thread does in a K block.
class MxMath {
 public:
  DEVICE void begin(const Tile&) {}
  DEVICE void look_ahead(int) {}

  template <class Release>
  DEVICE void add(const MxFormat::Stage& stage, int first_row, uint32_t a_scale, int quad, float (&sums)[2][64],
                  const Release& release) const {
    uint64_t a = wgmma_descriptor(smem_address(stage.a) + first_row * kBlockK);
    uint64_t b = wgmma_descriptor(smem_address(stage.b[0]));
    const uint32_t words[2] = {__float_as_uint(load_shared_f32(a_scale)),
                               __float_as_uint(load_shared_f32(a_scale + 8 * 4))};
    uint32_t b_scale = smem_address(&stage.b_scale[0][4 * quad]);
    float acc[64];
#pragma unroll 1
    for (int s = 0; s < kMxScales; ++s, a += 2, b += 2) {
      const float scale_a[2] = {mx_scale(words[0], s), mx_scale(words[1], s)};
#pragma unroll
      for (int half = 0; half < 2; ++half, b_scale += kHalfN * 4) {
        register_fence(acc);
        wgmma_fence();
        wgmma_m64n128k32_e4m3(acc, a, b + half * (kHalfN * kBlockK / 16), 0);
        wgmma_commit();
        register_fence(acc);
        wgmma_wait();
        register_fence(acc);
        if (scale_a[0] > kFarScale || scale_a[1] > kFarScale)
          promote<true>(acc, scale_a, b_scale, sums[half]);
        else
          promote<false>(acc, scale_a, b_scale, sums[half]);
      }
    }
    release();
  }

 private:
  // Of 32 products e4m3 each, acc is below 2^23 and a multiple of 2^-18: times any scale up to kFarScale it is a
  // float32, exactly. A larger one, of tokens that only the weights' scales bring back, gives kShift to the other side.
  static constexpr float kFarScale = 0x1p104f, kShift = 0x1p40f, kLargest = 0x1p127f;

  template <bool kFar>
  static DEVICE void promote(const float (&acc)[64], const float (&scale_a)[2], uint32_t b_scale, float (&sums)[64]) {
    float a[2], shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool far = kFar && scale_a[r] > kFarScale;
      a[r] = far ? scale_a[r] / kShift : scale_a[r];
      shift[r] = far ? kShift : 1.f;
    }
#pragma unroll
    for (int group = 0; group < 8; ++group) {
      const uint4 v = load_shared_v4(b_scale + group * 64);
      const uint32_t bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = i / 2 % 2;
        float b = __uint_as_float(bits[i / 4 * 2 + i % 2]);
        if (kFar) {
          b *= shift[r];
          b = b > kLargest ? kLargest : b;  // infinite: so is the sum, unless acc is 0
        }
        sums[8 * group + i] = __fmaf_rn(acc[8 * group + i] * a[r], b, sums[8 * group + i]);
      }
    }
  }
};

// The kernels (grouped_gemm_mx_sm90.cu): tensor maps as DeepSeekFp8's.
__global__ void gemm1_mx_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA gather,
                              const __grid_constant__ GemmShape shape, const __grid_constant__ MxWeightScales scales,
                              const __grid_constant__ TileSchedule schedule,
                              const __grid_constant__ MxActivationEpilogue epilogue);
__global__ void gemm2_mx_sm90(const __grid_constant__ CUtensorMap a_map,
                              const __grid_constant__ CUtensorMap a_scale_map,
                              const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GemmShape shape,
                              const __grid_constant__ MxWeightScales scales,
                              const __grid_constant__ TileSchedule schedule,
                              const __grid_constant__ MxBf16Epilogue epilogue);

inline constexpr int kMxGemm1SharedBytes = sizeof(GemmSharedMemory<MxFormat, MxActivationEpilogue>);
inline constexpr int kMxGemm2SharedBytes = sizeof(GemmSharedMemory<MxFormat, MxBf16Epilogue>);

}  // namespace jax_moe::cuda
