// Persistent warp-specialised grouped FP8 GEMM: D[row] = A[row] B[expert]^T. Tile 128 rows x 256 weight rows, two math
// warpgroups of 64 rows, one producer warpgroup. GEMM1 gathers token rows by cp.async and has up and gate rows side by
// side. Here are DeepSeekFp8's kernels: scales 1x128 on A and 128x128 on B, partial sums promoted to float32 registers
// every 128 of K; and what grouped_gemm_mx_sm90.cuh makes MxFp8's of, with another Format.
//   shared memory, some stages:  [ A 128 x 128 B | B two times 128 x 128 B ] swizzled 128 B,  A scales of 132 rows
#pragma once
#include "epilogue.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"
#include "wgmma_sm90.cuh"

namespace jax_moe::cuda {

inline constexpr int kBlockK = 128;  // bytes of K a stage: one swizzle row and one scale group
inline constexpr int kHalfN = 128;   // weight rows of one B box, one scale block
inline constexpr int kMathWarpgroups = 2;
inline constexpr int kGemmThreads = (kMathWarpgroups + 1) * 128;
inline constexpr int kBoxRows = 32;  // of A: a tile of few rows loads few
// NOTE: a TMA box must begin at a multiple of 16 bytes of its row, else the copy is an illegal instruction. Row blocks
// begin at any row, so a box of A scales begins up to 3 rows early; its place is a multiple of 128 bytes.
inline constexpr int kScaleBox = kBlockM + 4, kScaleBoxPitch = 160;

// Where GEMM1's A rows and their scales come from: row r of a tile is row row_to_source[row0 + r] of `source`.
struct GatherA {
  const uint8_t* source;         // e4m3 [T, H]
  const int32_t* row_to_source;  // [T*K]
  const float* scale;            // element (block, token) at block * block_stride + token * token_stride
  int64_t block_stride, token_stride;
};

// What both GEMMs are told. A tile's two halves are 128 weight rows each, from column * column_step on and half_step
// rows later. Box (row, k) of an expert begins at element (k * k_columns, expert * expert_stride + k * k_stride + row)
// of the weights: MajorK steps along its rows, BlockMajorK from one [rows, 128] matrix to the next.
struct GemmShape {
  const float* b_scale;  // [L * rows_per_expert / 128, k_blocks]
  int rows_per_expert;   // M or H
  int column_step;       // 128 (gate and up side by side) or 256
  int half_step;         // I or 128
  int k_blocks;          // K / 128
  int expert_stride;     // rows_per_expert, or k_blocks times that
  int k_stride;          // 0, or rows_per_expert
  int k_columns;         // 128, or 0
  int early_experts;     // GEMM1 fetches first weights of so many experts to L2 before it knows its tiles
};

// Of DeepSeekFp8. kInFlight: stages that a gathering thread asks for before it waits for the first of them.
struct DeepSeekFormat {
  static constexpr int kStages = 4, kInFlight = 2;
  struct Stage {
    uint8_t a[kBlockM * kBlockK];
    uint8_t b[2][kHalfN * kBlockK];
  };
};

template <class Format, class Epilogue>
struct GemmSharedMemory {
  static constexpr int kStages = Format::kStages, kInFlight = Format::kInFlight;
  using Cursor = PipelineCursor<kStages>;
  typename Format::Stage stages[kStages];
  uint8_t staging[kMathWarpgroups][Epilogue::kStagingBytes];
  float a_scale[kStages][kScaleBoxPitch];  // MxFp8: four E8M0 bytes in the place of each
  PipelineBarriers<kStages> barriers;
  TileQueue tiles;
};

// First weight row of a half, in its expert. NOTE: the second half of the last tile is outside the expert when
// rows_per_expert is an odd multiple of 128; it repeats the first half and its sums are not stored.
DEVICE int b_row(const GemmShape& shape, const Tile& tile, int half) {
  const int row = tile.column * shape.column_step + half * shape.half_step;
  return row < shape.rows_per_expert ? row : tile.column * shape.column_step;
}

// The first stages' weights of the tile that this CTA gets if every expert has one row block, to L2: that much of the
// weights is read while the route is still being made. A wrong guess is most likely another CTA's first tile. By one
// thread.
DEVICE void prefetch_first_b(const CUtensorMap* b_map, const GemmShape& shape, int num_columns) {
  const Tile tile{0, 0, int(blockIdx.x) / num_columns, int(blockIdx.x) % num_columns};
  if (tile.expert >= shape.early_experts) return;
  for (int k = 0; k < min(DeepSeekFormat::kStages, shape.k_blocks); ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      tma_prefetch_2d(b_map, k * shape.k_columns,
                      tile.expert * shape.expert_stride + k * shape.k_stride + b_row(shape, tile, half));
  }
}

// B of one stage, by one thread, which also arrives with all bytes that this stage expects from TMA.
template <class Shared>
DEVICE void load_b(Shared& shared, const typename Shared::Cursor& at, const CUtensorMap* b_map, const GemmShape& shape,
                   const Tile& tile, int k, uint32_t other_bytes) {
  auto& stage = shared.stages[at.stage()];
  const uint32_t full = shared.barriers.full_address(at.stage());
  mbarrier_arrive_expect(full, sizeof(stage.b) + other_bytes);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    tma_load_2d(smem_address(stage.b[half]), b_map, k * shape.k_columns,
                tile.expert * shape.expert_stride + k * shape.k_stride + b_row(shape, tile, half), full);
}

// GEMM2's A: boxes of 32 rows, as many as the tile has, and the scales of all.
struct TmaA {
  const CUtensorMap* map;
  const CUtensorMap* scale_map;

  static DEVICE int boxes(const Tile& tile) { return (tile.rows + kBoxRows - 1) / kBoxRows; }
  static DEVICE uint32_t bytes(const Tile& tile) {
    return boxes(tile) * kBoxRows * kBlockK + kScaleBox * sizeof(float);
  }

  template <class Shared>
  DEVICE void load(Shared& shared, const typename Shared::Cursor& at, const Tile& tile, int k) const {
    const uint32_t full = shared.barriers.full_address(at.stage()), to = smem_address(shared.stages[at.stage()].a);
    for (int box = 0; box < boxes(tile); ++box)
      tma_load_2d(to + box * kBoxRows * kBlockK, map, k * kBlockK, tile.row0 + box * kBoxRows, full);
    tma_load_2d(smem_address(shared.a_scale[at.stage()]), scale_map, tile.row0 & ~3, k, full);
  }
};

// One thread feeds the ring by TMA. `full` counts one arrival. The first stages' weights are asked for before the
// kernel that writes A has ended.
template <class Shared>
DEVICE void produce(Shared& shared, const TmaA& a, const CUtensorMap* b_map, const GemmShape& shape) {
  prefetch_tensor_map(a.map);
  prefetch_tensor_map(a.scale_map);
  prefetch_tensor_map(b_map);
  typename Shared::Cursor at;
  TileReader reader;
  Tile tile = reader.next_alone(shared.tiles);
  int early = 0;  // stages of the first tile that have their weights already
  if (tile.rows > 0) {
    typename Shared::Cursor ahead;
    for (; early < min(Shared::kStages, shape.k_blocks); ++early, ahead.advance())
      load_b(shared, ahead, b_map, shape, tile, early, a.bytes(tile));
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (; tile.rows > 0; tile = reader.next_alone(shared.tiles)) {
    for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
      if (early > 0) {
        --early;
      } else {
        shared.barriers.wait_empty(at);
        load_b(shared, at, b_map, shape, tile, k, a.bytes(tile));
      }
      a.load(shared, at, tile, k);
    }
  }
}

// The scales of weights, where math threads read them from global memory themselves.
struct NoScaleFeed {
  DEVICE void begin(const GemmShape&, const Tile&) {}
  template <class Stage>
  DEVICE void put(Stage&, const GemmShape&, int) {}
};

// 128 threads gather A rows and scales by cp.async, one of them feeds B by TMA, `feed` what else a stage has. `full`
// counts 129 arrivals: each thread arrives for what it gathered when that has landed, up to kInFlight stages after
// asking for it.
template <class Shared, class Feed>
DEVICE void produce_gathered(Shared& shared, const GatherA& gather, const CUtensorMap* b_map, const GemmShape& shape,
                             const TileSchedule& schedule, int thread, Feed feed) {
  constexpr int kInFlight = Shared::kInFlight, kRowsPerPass = 16, kPasses = kBlockM / kRowsPerPass;
  if (thread == 0) prefetch_tensor_map(b_map);
  typename Shared::Cursor at, landed;
  int in_flight = 0;
  const auto announce = [&] {
    // NOTE: cp.async writes through the generic proxy; without the fence wgmma may read what was there before.
    fence_proxy_async();
    mbarrier_arrive(shared.barriers.full_address(landed.stage()));
    landed.advance();
  };
  const int piece = thread % 8, pass_row = thread / 8;  // 16 bytes of a 128-byte row
  TileTeller teller(schedule);
  TileReader reader;
  const bool tells = thread == 96;  // of another warp than the thread that feeds B
  if (tells) teller.tell(shared.tiles);
  for (Tile tile; (tile = reader.next(shared.tiles)).rows > 0;) {
    uint32_t source[kPasses];  // in 16-byte pieces, so that 2^36 bytes are in reach
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = min(pass_row + kRowsPerPass * i, tile.rows - 1);
      source[i] = uint32_t(__ldcg(gather.row_to_source + tile.row0 + row)) * uint32_t(shape.k_blocks * 8) + piece;
    }
    const bool has_scale = thread < tile.rows;
    const float* scale = gather.scale;
    if (has_scale) scale += __ldcg(gather.row_to_source + tile.row0 + thread) * gather.token_stride;
    feed.begin(shape, tile);
    for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
      shared.barriers.wait_empty(at);
      if (thread == 0) load_b(shared, at, b_map, shape, tile, k, 0);
      const uint32_t a = smem_address(shared.stages[at.stage()].a);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int row = pass_row + kRowsPerPass * i;
        // Rows past the tile's are left as they are: a row of D depends on its own row of A only.
        if (kRowsPerPass * i < tile.rows)
          cp_async_16(WarpgroupContext::swizzled(a, row, piece), gather.source + (uint64_t(source[i]) + k * 8) * 16);
      }
      if (has_scale) cp_async_4(smem_address(&shared.a_scale[at.stage()][thread]), scale + k * gather.block_stride);
      cp_async_commit();
      feed.put(shared.stages[at.stage()], shape, k);
      if (k == 0 && tells) teller.tell(shared.tiles);
      if (in_flight == kInFlight) {
        cp_async_wait<kInFlight>();
        announce();
      } else {
        ++in_flight;
      }
    }
  }
  cp_async_wait<0>();
  for (; in_flight > 0; --in_flight) announce();
}

// What a math thread of DeepSeekFp8 does in a K block: 64 x 128 sums a half, times a scale of the row and one of the
// half.
class DeepSeekMath {
 public:
  DEVICE explicit DeepSeekMath(const GemmShape& shape) : shape_(shape) {}

  // Asks for the scales of a tile's first K block.
  DEVICE void begin(const Tile& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.expert * shape_.rows_per_expert + b_row(shape_, tile, half);
      b_scale_[half] = uint32_t(row / 128) * uint32_t(shape_.k_blocks);
      scale_b_[half] = __ldg(shape_.b_scale + b_scale_[half]);
    }
  }
  // Before a stage is waited for: a global load's latency is about a K block.
  DEVICE void look_ahead(int k) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      next_scale_b_[half] = __ldg(shape_.b_scale + (b_scale_[half] + min(k + 1, shape_.k_blocks - 1)));
  }
  // sums += the stage's products. a_scale: address of the scale of the thread's first row; the other is 8 further.
  template <class Stage, class Release>
  DEVICE void add(const Stage& stage, int first_row, uint32_t a_scale, int, float (&sums)[2][64],
                  const Release& release) {
    const uint64_t a = wgmma_descriptor(smem_address(stage.a) + first_row * kBlockK);
    float acc[64], scale_a[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t b = wgmma_descriptor(smem_address(stage.b[half]));
      register_fence(acc);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma_m64n128k32_e4m3(acc, a + 2 * i, b + 2 * i, i);
      wgmma_commit();
      register_fence(acc);
      if (half == 0) {  // in the shadow of the wgmmas
        scale_a[0] = load_shared_f32(a_scale);
        scale_a[1] = load_shared_f32(a_scale + 8 * 4);
      }
      wgmma_wait();
      register_fence(acc);
      if (half == 1) release();  // this warp has read all of the stage
      const float s0 = scale_a[0] * scale_b_[half], s1 = scale_a[1] * scale_b_[half];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        sums[half][4 * j] += s0 * acc[4 * j];
        sums[half][4 * j + 1] += s0 * acc[4 * j + 1];
        sums[half][4 * j + 2] += s1 * acc[4 * j + 2];
        sums[half][4 * j + 3] += s1 * acc[4 * j + 3];
      }
      scale_b_[half] = next_scale_b_[half];
    }
  }

 private:
  const GemmShape& shape_;
  uint32_t b_scale_[2];  // in shape.b_scale; no pointers, for registers' sake
  float scale_b_[2], next_scale_b_[2];
};

// A math warpgroup: 64 rows x 256 columns of every tile, one 64 x 128 accumulator reused for the two halves.
template <bool kGathered, class Math, class Epilogue, class Shared>
DEVICE void multiply(Shared& shared, const GemmShape& shape, Math math, const Epilogue& epilogue, int warpgroup,
                     int thread) {
  typename Shared::Cursor at;
  WarpgroupContext wg{warpgroup, thread, 0, 0, smem_address(shared.staging[warpgroup])};
  const int first_row = warpgroup * kWarpgroupRows;
  TileReader reader;
  const auto next_tile = [&] {  // asked for before the epilogue of the one before
    const Tile tile = reader.next(shared.tiles);
    math.begin(tile);
    return tile;
  };
  const auto release = [&] {
    __syncwarp();  // NOTE: a lane still waiting would miss the phase that a refill completes
    if (wg.lane() == 0) shared.barriers.release(at);
  };
  for (Tile tile = next_tile(), next; tile.rows > 0; tile = next) {
    if (first_row >= tile.rows) {  // nothing to do here but to free the stages
      for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
        shared.barriers.wait_full(at);
        release();
      }
      next = next_tile();
      continue;
    }
    wg.rows = min(tile.rows - first_row, kWarpgroupRows);
    wg.row0 = tile.row0 + first_row;
    const int scales_before = kGathered ? 0 : tile.row0 % 4;  // of the tile's in their box
    float sums[2][64];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[half][i] = 0.f;
    }
    for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
      math.look_ahead(k);
      shared.barriers.wait_full(at);
      const uint32_t a_scale =
          smem_address(shared.a_scale[at.stage()]) + (scales_before + first_row + wg.fragment_row()) * 4;
      math.add(shared.stages[at.stage()], first_row, a_scale, wg.quad(), sums, release);
    }
    next = next_tile();
    hide(wg.thread);  // the epilogue's addresses are not for the loop to carry
    epilogue.run(wg, sums, tile);
  }
}

// Returns the shared memory with its barriers ready, seen by all threads.
template <class Shared>
DEVICE Shared& prepare_gemm(uint32_t full_arrivals, uint32_t tile_readers) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    shared.barriers.initialize(full_arrivals, kMathWarpgroups * 4);
    shared.tiles.barriers.initialize(1, tile_readers);
  }
  __syncthreads();
  return shared;
}

// The kernels (grouped_gemm_sm90.cu). Tensor maps: A [rows, K] in boxes of kBoxRows x 128 bytes, its scales [K/128,
// rows] in boxes of 1 x kScaleBox, B in boxes of 128 x 128 bytes.
__global__ void gemm1_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA gather,
                           const __grid_constant__ GemmShape shape, const __grid_constant__ TileSchedule schedule,
                           const __grid_constant__ ActivationEpilogue epilogue);
__global__ void gemm2_sm90(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap a_scale_map,
                           const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GemmShape shape,
                           const __grid_constant__ TileSchedule schedule,
                           const __grid_constant__ Bf16Epilogue epilogue);

inline constexpr int kGemm1SharedBytes = sizeof(GemmSharedMemory<DeepSeekFormat, ActivationEpilogue>);
inline constexpr int kGemm2SharedBytes = sizeof(GemmSharedMemory<DeepSeekFormat, Bf16Epilogue>);

}  // namespace jax_moe::cuda
