// Persistent warp-specialised grouped FP8 GEMM, tokens A times weights B[expert]. Tile 256 weight rows x up to 128
// tokens, two math warpgroups, one producer warpgroup. Many tokens make a wide tile, few a narrow one (warpgroup.cuh).
// GEMM1 gathers token rows by cp.async and has up and gate rows in the two halves. What scales there are is a Format's
// to say: what a stage is, which scales producer threads put there (Feed), how a math thread multiplies it.
#pragma once
#include "deepseek_format_sm90.cuh"
#include "epilogue_narrow.cuh"
#include "epilogue_wide.cuh"
#include "mx_format_sm90.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"

namespace jax_moe::cuda {

inline constexpr int kGemmThreads = (kMathWarpgroups + 1) * 128;
inline constexpr int kGatherThreads = 96, kScaleThreads = 64;  // of the producer warpgroup, the last ones
inline constexpr int kBoxRows = 16, kLargeBoxRows = 64;        // of tokens: a tile of few loads few

// Where GEMM1's token rows come from: row r of a tile is row row_to_source[row0 + r] of `source`.
struct GatherA {
  const uint8_t* source;         // e4m3 [T, H]
  const int32_t* row_to_source;  // [T*K]
};

template <class Format, class Epilogue>
struct GemmSharedMemory {
  static constexpr int kStages = Format::kStages, kInFlight = Format::kInFlight, kMaxTokens = Format::kMaxTokens;
  using Cursor = PipelineCursor<kStages>;
  typename Format::Stage stages[kStages];
  uint8_t staging[kMathWarpgroups][kStagingBytes];
  typename Epilogue::Shared epilogue;
  PipelineBarriers<kStages> barriers;
  TileQueue tiles;
};

// GEMM2's tokens: large boxes, then small ones, as many as the tile needs. Small ones alone cost full tiles 7 %.
struct TmaTokens {
  const CUtensorMap *small, *large;

  static DEVICE int rows(const Tile& tile) { return (tile.rows + kBoxRows - 1) / kBoxRows * kBoxRows; }
  static DEVICE uint32_t bytes(const Tile& tile) { return rows(tile) * kBlockK; }
  DEVICE void prefetch() const { prefetch_tensor_map(small), prefetch_tensor_map(large); }
  DEVICE void load(uint8_t* tokens, const Tile& tile, int k, uint32_t full) const {
    const auto box = [&](const CUtensorMap* map, int row) {
      tma_load_2d(smem_address(tokens) + row * kBlockK, map, k * kBlockK, tile.row0 + row, full);
    };
    int row = 0;
    for (; row + kLargeBoxRows <= rows(tile); row += kLargeBoxRows) box(large, row);
    for (; row < rows(tile); row += kBoxRows) box(small, row);
  }
};
struct GatheredTokens {  // by other threads
  static DEVICE uint32_t bytes(const Tile&) { return 0; }
  DEVICE void prefetch() const {}
  DEVICE void load(uint8_t*, const Tile&, int, uint32_t) const {}
};

// One thread feeds the ring with what TMA loads, draws the tiles and tells them. The first stages' weights are asked
// for before the kernel that writes the tokens has ended.
template <class Shared, class Tokens>
DEVICE void produce(Shared& shared, const Tokens& tokens, const CUtensorMap* b_map, const GemmShape& shape,
                    const TileSchedule& schedule) {
  tokens.prefetch();
  prefetch_tensor_map(b_map);
  const auto load_weights = [&](const typename Shared::Cursor& at, const Tile& tile, int k) {
    auto& stage = shared.stages[at.stage()];
    const uint32_t full = shared.barriers.full_address(at.stage());
    mbarrier_arrive_expect(full, sizeof(stage.weights) + tokens.bytes(tile));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      tma_load_2d(smem_address(stage.weights[half]), b_map, k * shape.k_columns,
                  tile.expert * shape.expert_stride + k * shape.k_stride + b_row(shape, tile, half), full);
  };
  TileTeller teller(schedule);
  Tile tile = teller.first(shared.tiles);
  int early = 0;  // stages of the first tile that have their weights already
  if (tile.rows > 0) {
    typename Shared::Cursor ahead;
    for (; early < min(Shared::kStages, shape.k_blocks); ++early, ahead.advance()) load_weights(ahead, tile, early);
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  typename Shared::Cursor at;
  for (; tile.rows > 0; tile = teller.next()) {
    for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
      if (early > 0) {
        --early;
      } else {
        shared.barriers.wait_empty(at);
        load_weights(at, tile, k);
      }
      tokens.load(shared.stages[at.stage()].tokens, tile, k, shared.barriers.full_address(at.stage()));
      teller.advance(shared.tiles, shape.k_blocks - 1 - k);
    }
  }
}

// What other producer threads add to the ring, by cp.async: scales, and in GEMM1 the tokens, gathered. Each arrives at
// `full` for what it asked for when that has landed, of kInFlight stages at a time. Null `rows`: of GEMM2. NOTE: no
// ordinary loads here: the fence below would wait for them.
template <int kThreads, class Shared, class Feed>
DEVICE void feed_ring(Shared& shared, const GatherA* rows, const GemmShape& shape, int thread, Feed feed) {
  constexpr int kInFlight = Shared::kInFlight, kRowsPerPass = kThreads / 8;
  constexpr int kMaxTokens = Shared::kMaxTokens, kPasses = (kMaxTokens + kRowsPerPass - 1) / kRowsPerPass;
  typename Shared::Cursor at, landed;
  int in_flight = 0;
  const auto announce = [&] {
    feed.finish(shared.stages[landed.stage()]);
    // NOTE: cp.async writes through the generic proxy; without the fence wgmma may read what was there before.
    if (rows) fence_proxy_async();
    mbarrier_arrive(shared.barriers.full_address(landed.stage()));
    landed.advance();
  };
  // Announces what is in flight, each when it has landed.
  const auto drain = [&] {
    static_assert(kInFlight == 3, "a step for each");
    if (in_flight > 2) cp_async_wait<2>(), announce();
    if (in_flight > 1) cp_async_wait<1>(), announce();
    if (in_flight > 0) cp_async_wait<0>(), announce();
    in_flight = 0;
  };
  // Pieces of 16 bytes of a 128-byte row; 2^32 of them, 64 GiB, are in reach.
  const int piece = thread % 8, pass_row = thread / 8;
  static_assert(kRowsPerPass % 4 == 0, "two places for pieces: of even passes and of odd ones");
  const uint32_t even = WarpgroupContext::swizzled(0, pass_row, piece);
  const uint32_t odd = WarpgroupContext::swizzled(0, pass_row + kRowsPerPass, piece) - kRowsPerPass * kBlockK;
  TileReader reader;
  for (Tile tile; (tile = reader.next(shared.tiles)).rows > 0;) {
    int first_row = pass_row;
    hide(first_row);  // what follows from it is not for the loop over tiles to carry
    int source[kPasses];
#pragma unroll
    for (int i = 0; rows && i < kPasses; ++i) {
      const int row = min(first_row + kRowsPerPass * i, tile.rows - 1);
      source[i] = __ldcg(rows->row_to_source + tile.row0 + row);
    }
    const int rows_left = tile.rows - first_row;
    feed.look(tile,
              [&](int token) { return rows ? __ldcg(rows->row_to_source + tile.row0 + token) : tile.row0 + token; });
    if (rows) drain();  // while the rows are on their way: nobody shall wait for the stages of the tile before
#pragma unroll
    for (int i = 0; rows && i < kPasses; ++i) {
      hide(source[i]);  // else the loads would be waited for above
      source[i] = int(uint32_t(source[i]) * uint32_t(shape.k_blocks * 8) + piece);
    }
    feed.begin(tile);
    for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
      if (in_flight == kInFlight) {  // before the wait below, which is for the readers of another stage
        cp_async_wait<kInFlight - 1>();
        announce();
      } else {
        ++in_flight;
      }
      shared.barriers.wait_empty(at);
      auto& stage = shared.stages[at.stage()];
      const uint32_t tokens = smem_address(stage.tokens);
      const uint8_t* from = rows ? rows->source + k * kBlockK : nullptr;
      hide(from);  // one addition a piece, not two and a constant
#pragma unroll
      for (int i = 0; rows && i < kPasses; ++i) {
        // Other rows are left as they are: what becomes of a token depends on itself only.
        if (kRowsPerPass * i < rows_left)
          cp_async_16(tokens + (i % 2 == 0 ? even : odd) + i * kRowsPerPass * kBlockK,
                      from + uint64_t(uint32_t(source[i])) * 16);
      }
      feed.ask(stage, k);
      cp_async_commit();
    }
  }
  drain();
}

// The epilogues of a format: GEMM1's and GEMM2's.
template <bool kWide, int kMaxTokens, class Epilogue, class Shared, int kSums>
DEVICE void finish(const Epilogue& epilogue, Shared& shared, const WarpgroupContext& wg, float (&sums)[2][kSums],
                   const Tile& tile) {
  constexpr bool kIsActivation = sizeof(typename Epilogue::Shared) > 1;
  if constexpr (kIsActivation && kWide)
    WideActivation{epilogue, wg}.run(sums, tile);
  else if constexpr (kIsActivation)
    NarrowActivation<Epilogue, kMaxTokens>{epilogue, shared.epilogue, wg}.run(sums, tile);
  else if constexpr (kWide)
    WideBf16{epilogue, wg}.run(sums, tile);
  else
    NarrowBf16<Epilogue, kMaxTokens>{epilogue, wg}.run(sums, tile);
}

// Calls use(a number of tokens known to the compiler), at least `tokens`, at most kMost, in steps of 16.
template <int kMost, int kTokens = 16, class Use>
DEVICE void with_tokens(int tokens, const Use& use) {
  if constexpr (kTokens < kMost) {
    if (tokens > kTokens) return with_tokens<kMost, kTokens == 16 ? 32 : kTokens + 32>(tokens, use);
  }
  use(std::integral_constant<int, kTokens>());
}

template <class Format, class Epilogue, class Shared>
DEVICE void multiply(Shared& shared, const GemmShape& shape, const Epilogue& epilogue, int warpgroup, int thread) {
  constexpr int kNarrowTokens = Format::kNarrowTokens;
  typename Shared::Cursor at;
  WarpgroupContext wg{warpgroup, thread, 0, 0, smem_address(shared.staging[warpgroup])};
  TileReader reader;
  const auto release = [&] { shared.barriers.release(at); };  // by every lane: racecheck trusts no other for a warp
  for (Tile tile = reader.next(shared.tiles), next; tile.rows > 0; tile = next) {
    float sums[2][64];
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i / 64][i % 64] = 0.f;
    const auto for_stages = [&](const auto& multiply_stage) {
      for (int k = 0; k < shape.k_blocks; ++k, at.advance()) {
        shared.barriers.wait_full(at);
        multiply_stage(shared.stages[at.stage()]);
      }
      next = reader.next(shared.tiles);  // asked for before the epilogue of the one before
      hide(wg.thread);                   // the epilogue's addresses are not for the loop to carry
    };
    if constexpr (kNarrowTokens < kBlockM) {
      if (tile.rows > kNarrowTokens) {
        const int tail_tokens = tile.rows - kBlockM;
        float tail[2][16] = {};
        if (tail_tokens > 0)
          for_stages([&](const auto& stage) {
            Format::template multiply_narrow<kMostTailRows>(stage, wg, tail, [] {}, kBlockM);
            Format::multiply_wide(stage, wg, sums, release);
          });
        else
          for_stages([&](const auto& stage) { Format::multiply_wide(stage, wg, sums, release); });
        if (tail_tokens > 0) {
          wg.tokens = tail_tokens;
          wg.row0 = tile.row0 + kBlockM;
          finish<false, 32>(epilogue, shared, wg, tail, tile);
        }
        wg.tokens = min(tile.rows - warpgroup * kWarpgroupRows, kWarpgroupRows);
        wg.row0 = tile.row0 + warpgroup * kWarpgroupRows;
        wg.sync();  // a narrow epilogue's staged rows have been read, by all warps; here each stages on its own
        finish<true, 0>(epilogue, shared, wg, sums, tile);
        continue;
      }
    }
    with_tokens<kNarrowTokens>(tile.rows, [&](auto tokens) {
      for_stages([&](const auto& stage) {
        Format::template multiply_narrow<decltype(tokens)::value>(stage, wg, sums, release);
      });
    });
    wg.tokens = tile.rows;
    wg.row0 = tile.row0;
    finish<false, kNarrowTokens>(epilogue, shared, wg, sums, tile);
  }
}

// Returns the shared memory with its barriers ready, seen by all threads.
template <class Shared>
DEVICE Shared& prepare_gemm(uint32_t full_arrivals, uint32_t tile_readers) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    shared.barriers.initialize(full_arrivals, kMathWarpgroups * 128);
    shared.tiles.barriers.initialize(1, tile_readers);
  }
  __syncthreads();
  return shared;
}

// What the warpgroups of the two kernels do. NOTE: their registers, 2 x 224 + 56 a thread, are as many as a CTA of 384
// threads is launched with; more would never be there.
template <class Format, class Epilogue>
DEVICE void run_gemm1(const CUtensorMap* b_map, const GatherA& rows, const typename Format::Scales& scales,
                      const GemmShape& shape, const TileSchedule& schedule, const Epilogue& epilogue) {
  using Shared = GemmSharedMemory<Format, Epilogue>;
  auto& shared = prepare_gemm<Shared>(1 + kGatherThreads, kMathWarpgroups * 4 + kGatherThreads / 32);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  wait_for_previous_kernel();  // NOTE: before the next one may start: GEMM2 reads the tiles of the route before its own
  if (warpgroup == kMathWarpgroups) {
    reduce_registers<56>();
    if (thread == 0) produce(shared, GatheredTokens{}, b_map, shape, schedule);
    if (const int i = thread - (128 - kGatherThreads); i >= 0)
      feed_ring<kGatherThreads>(shared, &rows, shape, i,
                                typename Format::template Feed<kGatherThreads>(scales, shape, i));
  } else {
    raise_registers<224>();
    multiply<Format>(shared, shape, epilogue, warpgroup, thread);
  }
}

template <class Format, class Epilogue>
DEVICE void run_gemm2(const TmaTokens& tokens, const CUtensorMap* b_map, const typename Format::Scales& scales,
                      const GemmShape& shape, const TileSchedule& schedule, const Epilogue& epilogue) {
  using Shared = GemmSharedMemory<Format, Epilogue>;
  auto& shared = prepare_gemm<Shared>(1 + kScaleThreads, kMathWarpgroups * 4 + kScaleThreads / 32);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  if (warpgroup == kMathWarpgroups) {
    reduce_registers<56>();
    if (thread == 0) produce(shared, tokens, b_map, shape, schedule);
    if (const int i = thread - (128 - kScaleThreads); i >= 0) {
      wait_for_previous_kernel();  // which writes the tokens' scales
      feed_ring<kScaleThreads>(shared, nullptr, shape, i,
                               typename Format::template Feed<kScaleThreads>(scales, shape, i));
    }
  } else {
    // NOTE: the math warps need no wait: what they compute and store comes from A, which the producer waits for.
    raise_registers<224>();
    multiply<Format>(shared, shape, epilogue, warpgroup, thread);
  }
}

// The kernels (grouped_gemm_sm90.cu, grouped_gemm_mx_sm90.cu). Tensor maps: A [rows, K] in boxes of kBoxRows and
// kLargeBoxRows x 128 bytes, B in boxes of 128 x 128 bytes.
__global__ void gemm1_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA rows,
                           const __grid_constant__ TokenScales scales, const __grid_constant__ GemmShape shape,
                           const __grid_constant__ TileSchedule schedule,
                           const __grid_constant__ ActivationEpilogue epilogue);
__global__ void gemm2_sm90(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap large_a_map,
                           const __grid_constant__ CUtensorMap b_map, const __grid_constant__ TokenScales scales,
                           const __grid_constant__ GemmShape shape, const __grid_constant__ TileSchedule schedule,
                           const __grid_constant__ Bf16Epilogue epilogue);
__global__ void gemm1_mx_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA rows,
                              const __grid_constant__ MxScales scales, const __grid_constant__ GemmShape shape,
                              const __grid_constant__ TileSchedule schedule,
                              const __grid_constant__ MxActivationEpilogue epilogue);
__global__ void gemm2_mx_sm90(const __grid_constant__ CUtensorMap a_map,
                              const __grid_constant__ CUtensorMap large_a_map,
                              const __grid_constant__ CUtensorMap b_map, const __grid_constant__ MxScales scales,
                              const __grid_constant__ GemmShape shape, const __grid_constant__ TileSchedule schedule,
                              const __grid_constant__ MxBf16Epilogue epilogue);

inline constexpr int kGemm1SharedBytes = sizeof(GemmSharedMemory<DeepSeekFormat, ActivationEpilogue>);
inline constexpr int kGemm2SharedBytes = sizeof(GemmSharedMemory<DeepSeekFormat, Bf16Epilogue>);
inline constexpr int kMxGemm1SharedBytes = sizeof(GemmSharedMemory<MxFormat, MxActivationEpilogue>);
inline constexpr int kMxGemm2SharedBytes = sizeof(GemmSharedMemory<MxFormat, MxBf16Epilogue>);

}  // namespace jax_moe::cuda
