// Persistent warp-specialised grouped FP8 GEMMs, tokens A times weights B[expert]: GEMM1 with its activation, then
// GEMM2, in one kernel. Tile 256 weight rows x up to 144 tokens, or up to 32 with more stages; two math warpgroups,
// one producer warpgroup. Many tokens make a wide tile, few a narrow one (warpgroup.cuh). What scales there are is a
// Format's to say: what a stage is, which scales producer threads put there (Feed), how a math thread multiplies it.
#pragma once
#include "deepseek_format_sm90.cuh"
#include "epilogue_narrow.cuh"
#include "epilogue_wide.cuh"
#include "grouped_producers_sm90.cuh"
#include "mx_few_format_sm90.cuh"
#include "mx_format_sm90.cuh"

namespace jax_moe::cuda {

inline constexpr int kMathThreads = kMathWarpgroups * 128, kGemmThreads = kMathThreads + 128;

// Arrays have an element for each GEMM.
template <class Format>
struct GroupedGemmParameters {
  WeightMaps weights[2];
  CUtensorMap h, large_h;  // GEMM2's tokens, rows of I values, boxes of kBoxRows and kLargeBoxRows x 128 bytes
  GatherA rows;            // GEMM1's tokens; has up and gate rows of weights in the two halves
  typename Format::Scales scales[2];
  GemmShape shape[2];
  TileSchedule schedule;
  Handover handover;
  ActivationEpilogueOf<Format::kMx> activation;
  Bf16EpilogueOf<Format::kMx> bf16;
};

template <class SomeFormat>
struct GemmSharedMemory {
  using Format = SomeFormat;
  static constexpr int kStages = Format::kStages, kInFlight = Format::kInFlight, kMaxTokens = Format::kMaxTokens;
  using Cursor = PipelineCursor<kStages>;
  using Operands = StageOperands<kMaxTokens, Format::kTokenPlanes>;
  static constexpr int kStagingBytes = kMaxTokens > 32 ? 8192 : 4096;  // of a warpgroup
  Operands operands[kStages];
  typename Format::Factors factors[kStages];
  typename Format::Landing landing;
  alignas(128) uint8_t staging[kMathWarpgroups][kStagingBytes];
  typename ActivationEpilogueOf<Format::kMx>::Shared epilogue;
  PipelineBarriers<kStages> barriers;
  uint64_t h_stored;  // mbarrier, a phase for each tile of GEMM1: by every math thread
  TileQueue tiles;

  DEVICE typename Format::Stage stage(const Cursor& at) {
    return {operands[at.stage()], factors[at.stage()], landing, at.number()};
  }
};

// Calls use(a number of tokens known to the compiler), at least `tokens`: a multiple of kStep up to 32, or of 32, at
// most kMost.
template <int kMost, int kStep, int kTokens = kStep, class Use>
DEVICE void with_tokens(int tokens, const Use& use) {
  constexpr int kNext = kTokens < 32 ? kTokens + kStep : kTokens + 32;
  if constexpr (kTokens < kMost) {
    if (tokens > kTokens) return with_tokens<kMost, kStep, kNext>(tokens, use);
  }
  use(std::integral_constant<int, kTokens>());
}

// A thread of the two math warpgroups.
template <class Shared>
class Multiplier {
 public:
  DEVICE Multiplier(Shared& shared, int warpgroup, int thread)
      : shared_(shared),
        wg_{warpgroup, thread, 0, 0, 0, smem_address(shared.staging[warpgroup]), Shared::kStagingBytes, false},
        tile_{} {}

  // All tiles. NOTE: an instruction that is not in the SM's cache comes behind all weights that memory has been asked
  // for: MxFp8's first epilogue took 4 us, later ones 0.7. So where an SM has but a few tiles of few tokens, one loop
  // serves both GEMMs, and both epilogues are practised while the kernel before ends.
  DEVICE void run(const GroupedGemmParameters<typename Shared::Format>& p) {
    if constexpr (Format::kOneLoop) {
      run<kFirstGemm, kSecondGemm>(p);
    } else {
      wait_for_previous_kernel();
      tile_ = reader_.next(shared_.tiles);
      run<kFirstGemm, kFirstGemm>(p);
      run<kSecondGemm, kSecondGemm>(p);
    }
  }

 private:
  using Format = typename Shared::Format;
  using Parameters = GroupedGemmParameters<Format>;

  // All tiles of the GEMMs from one to another.
  template <int kFrom, int kTo>
  DEVICE void run(const Parameters& p) {
    constexpr int kNarrowTokens = Format::kNarrowTokens;
    constexpr bool kPractises = kFrom != kTo;
    bool practises = kPractises;  // with a tile of each GEMM, whose epilogue stores nothing
    if constexpr (kPractises) tile_ = Tile::of_practice(Format::kFewestTokens, kFrom);
    for (Tile next; tile_.gemm() <= kTo; tile_ = next) {
      const int gemm = kFrom == kTo ? kFrom : tile_.gemm(), k_blocks = p.shape[gemm].k_blocks;
      float sums[2][64];
#pragma unroll
      for (int i = 0; i < 128; ++i) sums[i / 64][i % 64] = 0.f;
      const auto for_stages = [&](auto pairs, const auto& multiply) {
        if (practises) return;
        if constexpr (decltype(pairs)::value)
          for_pairs(k_blocks, multiply);
        else
          for_blocks(k_blocks, multiply);
        next = reader_.next(shared_.tiles);  // asked for before the epilogue of the one before
        hide(wg_.thread);                    // the epilogue's addresses are not for the loop to carry
      };
      if constexpr (kNarrowTokens < Format::kMaxTokens) {
        if (tile_.rows() > kNarrowTokens) {
          const int tail_tokens = tile_.rows() - kBlockM;
          float tail[2][16] = {};
          if (tail_tokens > 0)
            for_stages(std::false_type(), [&](const auto& stage, const NarrowRows& rows, const auto& release) {
              Format::multiply_tailed(stage, rows, wg_, sums, tail, release);
            });
          else if constexpr (Format::kWide)
            for_stages(std::false_type(), [&](const auto& stage, const NarrowRows&, const auto& release) {
              Format::multiply_wide(stage, wg_, sums, release);
            });
          if (tail_tokens > 0) {
            wg_.tokens = wg_.stored = tail_tokens;
            wg_.row0 = tile_.row0 + kBlockM;
            finish<false, 32>(p, gemm, tail);
          }
          if constexpr (Format::kWide) {
            wg_.tokens = min(tile_.rows() - wg_.index * kWarpgroupRows, kWarpgroupRows);
            wg_.row0 = tile_.row0 + wg_.index * kWarpgroupRows;
            wg_.sync();  // a narrow epilogue's staged rows have been read, by all warps; here each stages on its own
            finish<true, 0>(p, gemm, sums);
            if (gemm == kFirstGemm) mbarrier_arrive(smem_address(&shared_.h_stored));
            continue;
          }
        }
      }
      if (Format::kWide || tile_.rows() <= kNarrowTokens)
        with_tokens<kNarrowTokens, Format::kFewestTokens>(tile_.rows(), [&](auto tokens) {
          for_stages(std::bool_constant<Format::kPairs>(),
                     [&](const auto& stage, const NarrowRows& rows, const auto& release) {
                       Format::template multiply_narrow<decltype(tokens)::value>(stage, rows, wg_, sums, release);
                     });
        });
      wg_.tokens = min(tile_.rows(), kNarrowTokens);
      wg_.stored = practises ? 0 : wg_.tokens;
      wg_.row0 = tile_.row0;
      finish<false, kNarrowTokens>(p, gemm, sums);
      if (gemm == kFirstGemm && !practises) mbarrier_arrive(smem_address(&shared_.h_stored));
      if (practises) {
        if (gemm < kTo) {
          next = Tile::of_practice(Format::kFewestTokens, gemm + 1);
        } else {
          practises = false;
          wait_for_previous_kernel();
          next = reader_.next(shared_.tiles);
        }
      }
    }
  }

  // Calls multiply(stage, this warpgroup's rows, what gives the stage back) for the K blocks of a tile. NOTE: every
  // lane gives it back: racecheck trusts no other for a warp. DeepSeekFp8 gives it back before it adds the last
  // products, and asks then whether the next is there: in the shadow of the sums. Without a branch, which would break
  // them up.
  template <class Multiply>
  DEVICE void for_blocks(int k_blocks, const Multiply& multiply) {
    // NOTE: only where a tile fills the ring; else one warpgroup could be a tile ahead, and arrive twice.
    const bool in_turn = Format::kWide && tile_.rows() > Format::kNarrowTokens && k_blocks >= Shared::kStages;
    if (in_turn && wg_.index == 1) wg_.wait_for_other();
    int leading = in_turn && wg_.index == 0 ? 0 : -1;  // K block
    hide(leading);                                     // else the loop asks again for what follows from k_blocks
    bool next_is_full = false;
    for (int k = 0; k < k_blocks; ++k, at_.advance()) {
      wg_.leads = k == leading;
      if (!next_is_full) shared_.barriers.wait_full(at_);
      const auto stage = shared_.stage(at_);
      const uint32_t all = smem_address(stage.operands.weights[0]);
      multiply(stage, NarrowRows{all + wg_.index * kWarpgroupRows * kBlockK, kGroupBytes}, [&] {
        shared_.barriers.release(at_);
        if constexpr (Format::kWide) next_is_full = shared_.barriers.is_full(at_.next());
      });
    }
  }
  // The same of K blocks that come in pairs: this warpgroup's rows of both are in one of their two stages.
  template <class Multiply>
  DEVICE void for_pairs(int k_blocks, const Multiply& multiply) {
    typename Shared::Cursor first;
    NarrowRows rows{0, 2 * kGroupBytes};
    for (int k = 0; k < stages_of_pairs(k_blocks); ++k, at_.advance()) {
      if (k % 2 == 0) {
        first = at_;
        const auto mine = wg_.index == 0 ? at_ : at_.next();
        shared_.barriers.wait_full(mine);
        rows.address = smem_address(shared_.operands[mine.stage()].weights[0]);
      }
      shared_.barriers.wait_full(at_);
      const auto release = [&] {
        if (k % 2 == 0) return;
        shared_.barriers.release(first);
        shared_.barriers.release(at_);
      };
      if (k < k_blocks)
        multiply(shared_.stage(at_), rows, release);
      else
        release();
      rows.address += kGroupBytes;
    }
  }

  template <bool kWide, int kMaxTokens, int kSums>
  DEVICE void finish(const Parameters& p, int gemm, float (&sums)[2][kSums]) const {
    if (gemm == kFirstGemm)
      finish<kWide, kMaxTokens>(p.activation, sums);
    else
      finish<kWide, kMaxTokens>(p.bf16, sums);
  }
  template <bool kWide, int kMaxTokens, int kSums>
  DEVICE void finish(const ActivationEpilogueOf<Format::kMx>& epilogue, float (&sums)[2][kSums]) const {
    if constexpr (kWide)
      WideActivation{epilogue, wg_}.run(sums, tile_);
    else
      NarrowActivation<ActivationEpilogueOf<Format::kMx>, kMaxTokens>{epilogue, shared_.epilogue, wg_}.run(sums, tile_);
  }
  template <bool kWide, int kMaxTokens, int kSums>
  DEVICE void finish(const Bf16EpilogueOf<Format::kMx>& epilogue, float (&sums)[2][kSums]) const {
    if constexpr (kWide)
      WideBf16{epilogue, wg_}.run(sums, tile_);
    else
      NarrowBf16<Bf16EpilogueOf<Format::kMx>, kMaxTokens>{epilogue, wg_}.run(sums, tile_);
  }

  Shared& shared_;
  WarpgroupContext wg_;
  TileReader reader_;
  Tile tile_;
  typename Shared::Cursor at_;
};

// What the warpgroups do. NOTE: their registers, 2 x 224 + 56 a thread, are as many as a CTA of 384 threads is launched
// with; more would never be there.
template <class Format>
DEVICE void run_grouped_gemms(const GroupedGemmParameters<Format>& p) {
  using Shared = GemmSharedMemory<Format>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    shared.barriers.initialize(1 + kFeedThreads, kMathThreads);
    mbarrier_init(smem_address(&shared.h_stored), kMathThreads);
    shared.tiles.barriers.initialize(1, (kMathThreads + kFeedThreads) / 32);
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  if (warpgroup == kMathWarpgroups) {
    wait_for_previous_kernel();  // NOTE: before the next one may start, which reads what the route wrote
    reduce_registers<56>();
    if (thread == 0) {
      let_next_kernel_start();
      Loader<Shared> loader(shared, p.schedule, p.handover);
      loader.template run<kFirstGemm>(GatheredTokens{}, p.weights[0], p.shape[0]);
      loader.template run<kSecondGemm>(TmaTokens<typename Shared::Operands>{&p.h, &p.large_h}, p.weights[1],
                                       p.shape[1]);
      loader.give_stored();
    }
    if (const int i = thread - (128 - kFeedThreads); i >= 0) {
      using Feed = typename Format::template Feed<kFeedThreads>;
      Feeder<Shared> feeder(shared, p.handover, i);
      feeder.template run<kFirstGemm>(p.rows, p.shape[0], Feed(p.scales[0], p.shape[0], i));
      feeder.template run<kSecondGemm>(p.rows, p.shape[1], Feed(p.scales[1], p.shape[1], i));
    }
  } else {
    raise_registers<224>();
    Multiplier<Shared> multiplier(shared, warpgroup, thread);
    multiplier.run(p);
  }
}

// The kernels (grouped_gemm_sm90.cu, grouped_gemm_mx_sm90.cu).
__global__ void grouped_gemm_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekFormat> p);
__global__ void grouped_gemm_pairs_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekPairsFormat> p);
__global__ void grouped_gemm_few_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekFewFormat> p);
__global__ void grouped_gemm_few_pairs_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekFewPairsFormat> p);
__global__ void grouped_gemm_mx_sm90(const __grid_constant__ GroupedGemmParameters<MxFormat> p);
__global__ void grouped_gemm_mx_few_sm90(const __grid_constant__ GroupedGemmParameters<MxFewFormat> p);
__global__ void grouped_gemm_mx_few_pairs_sm90(const __grid_constant__ GroupedGemmParameters<MxFewPairsFormat> p);

template <class Format>
inline constexpr int kGroupedGemmSharedBytes = sizeof(GemmSharedMemory<Format>);

}  // namespace jax_moe::cuda
