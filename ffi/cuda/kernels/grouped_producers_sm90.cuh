// The producer warpgroup of the grouped GEMMs: one thread draws tiles and loads weights and GEMM2's tokens by TMA; the
// others, by cp.async, fetch what scales a Format needs and gather GEMM1's tokens. Each runs one GEMM, then the other.
#pragma once
#include "pipeline.cuh"
#include "scheduler.cuh"
#include "token_scales.cuh"
#include "warpgroup.cuh"

namespace jax_moe::cuda {

inline constexpr int kFeedThreads = 96;                  // of the producer warpgroup, the last ones
inline constexpr int kBoxRows = 16, kLargeBoxRows = 64;  // of tokens: a tile of few loads few

// Boxes of weights, of a half of a tile: its rows of a K block, or a warpgroup's of a pair.
struct WeightMaps {
  CUtensorMap whole, paired;  // each where there are such tiles
};

// Where GEMM1's token rows come from: row r of a tile is row row_to_source[row0 + r] of `source`.
struct GatherA {
  const uint8_t* source;         // e4m3 or bf16 [T, H]
  const int32_t* row_to_source;  // [T*K]
};

// GEMM2's tokens: large boxes, then small ones, as many as the tile needs. Small ones alone cost full tiles 7 %.
template <class Operands>
struct TmaTokens {
  const CUtensorMap *small, *large;

  static DEVICE int rows(const Tile& tile) { return (tile.rows() + kBoxRows - 1) / kBoxRows * kBoxRows; }
  static DEVICE uint32_t bytes(const Tile& tile) { return rows(tile) * kBlockK * Operands::kTokenPlanes; }
  DEVICE void prefetch() const { prefetch_tensor_map(small), prefetch_tensor_map(large); }
  DEVICE void load(uint8_t* tokens, const Tile& tile, int k, uint32_t full) const {
#pragma unroll
    for (int plane = 0; plane < Operands::kTokenPlanes; ++plane) {
      const uint32_t to = smem_address(tokens) + plane * Operands::kPlaneBytes;
      const auto box = [&](const CUtensorMap* map, int row) {
        tma_load_2d(to + row * kBlockK, map, (k * Operands::kTokenPlanes + plane) * kBlockK, tile.row0 + row, full);
      };
      int row = 0;
      for (; row + kLargeBoxRows <= rows(tile); row += kLargeBoxRows) box(large, row);
      for (; row < rows(tile); row += kBoxRows) box(small, row);
    }
  }
};
struct GatheredTokens {  // by other threads
  static DEVICE uint32_t bytes(const Tile&) { return 0; }
  DEVICE void prefetch() const {}
  DEVICE void load(uint8_t*, const Tile&, int, uint32_t) const {}
};

// The thread that feeds the ring with what TMA loads, draws the tiles and tells them.
template <class Shared>
class Loader {
 public:
  DEVICE Loader(Shared& shared, const TileSchedule& schedule, const Handover& handover)
      : shared_(shared), handover_(handover), teller_(schedule, handover), tile_(teller_.first(shared.tiles)) {}

  // All tiles of one GEMM.
  template <int kGemm, class Tokens>
  DEVICE void run(const Tokens& tokens, const WeightMaps& weights, const GemmShape& shape) {
    tokens.prefetch();
    if (!Format::kPairs || Format::kNarrowTokens < Format::kMaxTokens) prefetch_tensor_map(&weights.whole);
    if (Format::kPairs) prefetch_tensor_map(&weights.paired);
    for (; tile_.gemm() == kGemm; tile_ = teller_.next()) {
      const int stages = stages_of<Format>(shape, tile_);
      // Before that stage of a tile the one before is given away: math threads have begun this one by then if it has so
      // many, and have not ended it, or two would be stored.
      const int give_at = min(Shared::kStages, stages - 1);
      int early = 0;  // stages that have their weights before their tokens are there
      if (!tile_.ready()) {
        typename Shared::Cursor ahead = at_;
        for (; early < min(Shared::kStages, stages); ++early, ahead.advance())
          load_weights(tokens, weights, shape, ahead, early);
        give_stored();
        handover_.wait(tile_.expert());
      }
      for (int k = 0; k < stages; ++k, at_.advance()) {
        if (k == give_at) give_stored();
        if (k >= early) load_weights(tokens, weights, shape, at_, k);
        if (k < shape.k_blocks)
          tokens.load(shared_.operands[at_.stage()].tokens, tile_, k, shared_.barriers.full_address(at_.stage()));
        teller_.advance(shared_.tiles, stages, stages - 1 - k);
      }
      if (kGemm == kFirstGemm) to_give_ = tile_.expert();
    }
  }
  // Gives away the last tile of GEMM1 that is not yet, once it is stored; also after all tiles.
  DEVICE void give_stored() {
    if (to_give_ == kNoExpert) return;
    mbarrier_wait(smem_address(&shared_.h_stored), given_ % 2);
    handover_.give(to_give_);
    ++given_;
    to_give_ = kNoExpert;
  }

 private:
  using Format = typename Shared::Format;

  template <class Tokens>
  DEVICE void load_weights(const Tokens& tokens, const WeightMaps& weights, const GemmShape& shape,
                           const typename Shared::Cursor& at, int k) {
    shared_.barriers.wait_empty(at);
    auto& stage = shared_.operands[at.stage()];
    const uint32_t full = shared_.barriers.full_address(at.stage());
    mbarrier_arrive_expect(full, sizeof(stage.weights) + (k < shape.k_blocks ? tokens.bytes(tile_) : 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t to = smem_address(stage.weights[half]);
      const int row = tile_.expert() * shape.expert_stride + b_row(shape, tile_, half);
      if (in_pairs<Format>(tile_))
        tma_load_5d(to, &weights.paired, 0, 0, k / 2 * 2, 0, (row + k % 2 * kWarpgroupRows) / 16, full);
      else
        tma_load_4d(to, &weights.whole, k * shape.k_columns, 0, 0, (row + k * shape.k_stride) / 16, full);
    }
  }

  Shared& shared_;
  const Handover& handover_;
  TileTeller teller_;
  Tile tile_;
  int to_give_ = kNoExpert;  // the expert of a tile of GEMM1
  uint32_t given_ = 0;
  typename Shared::Cursor at_;
};

// What the other producer threads add to the ring. Each arrives at `full` for what it asked for when that has landed,
// of kInFlight stages at a time. NOTE: no ordinary loads in the loop over K: the fence below would wait for them.
template <class Shared>
class Feeder {
 public:
  DEVICE Feeder(Shared& shared, const Handover& handover, int thread)
      : shared_(shared), handover_(handover), thread_(thread), tile_(reader_.next(shared.tiles)) {}

  // All tiles of one GEMM; of GEMM1 the token rows too.
  template <int kGemm, class Feed>
  DEVICE void run(const GatherA& rows, const GemmShape& shape, Feed feed) {
    constexpr bool kGathers = kGemm == kFirstGemm;
    // Pieces of 16 bytes of a 128-byte row; 2^32 of them, 64 GiB, are in reach.
    const int piece = thread_ % 8, pass_row = thread_ / 8;
    static_assert(kRowsPerPass % 4 == 0, "two places for pieces: of even passes and of odd ones");
    const uint32_t even = WarpgroupContext::swizzled(0, pass_row, piece);
    const uint32_t odd = WarpgroupContext::swizzled(0, pass_row + kRowsPerPass, piece) - kRowsPerPass * kBlockK;
    for (; tile_.gemm() == kGemm; tile_ = reader_.next(shared_.tiles)) {
      int first_row = pass_row;
      hide(first_row);  // what follows from it is not for the loop over tiles to carry
      int source[kPasses];
#pragma unroll
      for (int i = 0; kGathers && i < kPasses; ++i) {
        const int row = min(first_row + kRowsPerPass * i, tile_.rows() - 1);
        source[i] = __ldcg(rows.row_to_source + tile_.row0 + row);
      }
      const int rows_left = tile_.rows() - first_row;
      feed.look(tile_, [&](int token) {
        return kGathers ? __ldcg(rows.row_to_source + tile_.row0 + token) : tile_.row0 + token;
      });
      // While the rows are on their way, or not written: nobody shall wait for the stages of the tile before.
      if (kGathers || !tile_.ready()) drain(feed);
      if (!tile_.ready()) handover_.wait(tile_.expert());
#pragma unroll
      for (int i = 0; kGathers && i < kPasses; ++i) {
        hide(source[i]);  // else the loads would be waited for above
        source[i] = int(uint32_t(source[i]) * uint32_t(shape.k_blocks * (8 * kPlanes)) + piece);
      }
      feed.begin(tile_);
      for (int k = 0; k < shape.k_blocks; ++k, at_.advance()) {
        make_room<kGathers>(feed);
        const auto stage = shared_.stage(at_);
        const uint32_t tokens = smem_address(stage.operands.tokens);
        const uint8_t* from = rows.source + k * (kBlockK * kPlanes);
        hide(from);  // one addition a piece, not two and a constant
#pragma unroll
        for (int i = 0; kGathers && i < kPasses; ++i) {
          // Other rows are left as they are: what becomes of a token depends on itself only.
          if (kRowsPerPass * i < rows_left)
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane)
              cp_async_16(
                  tokens + plane * Operands::kPlaneBytes + (i % 2 == 0 ? even : odd) + i * kRowsPerPass * kBlockK,
                  from + uint64_t(uint32_t(source[i])) * 16 + plane * kBlockK);
        }
        feed.ask(stage, k);
        cp_async_commit();
      }
      if (stages_of<Format>(shape, tile_) > shape.k_blocks) {  // a pair's second stage without a block
        make_room<kGathers>(feed);
        cp_async_commit();
        at_.advance();
      }
    }
    drain(feed);
  }

 private:
  using Format = typename Shared::Format;
  using Operands = typename Shared::Operands;
  static constexpr int kPlanes = Operands::kTokenPlanes;
  static constexpr int kInFlight = Shared::kInFlight, kRowsPerPass = kFeedThreads / 8;
  static constexpr int kPasses = (Shared::kMaxTokens + kRowsPerPass - 1) / kRowsPerPass;

  // Until the next stage is free.
  template <bool kGathers, class Feed>
  DEVICE void make_room(const Feed& feed) {
    if (in_flight_ == kInFlight) {  // before the wait below, which is for the readers of another stage
      cp_async_wait<kInFlight - 1>();
      announce<kGathers>(feed);
    } else {
      ++in_flight_;
    }
    shared_.barriers.wait_empty(at_);
  }
  template <bool kGathers, class Feed>
  DEVICE void announce(const Feed& feed) {
    feed.finish(shared_.stage(landed_));
    // NOTE: cp.async writes through the generic proxy; without the fence wgmma may read what was there before.
    if (kGathers) fence_proxy_async();
    mbarrier_arrive(shared_.barriers.full_address(landed_.stage()));
    landed_.advance();
  }
  // Until the first of `asked` stages, at most kMost, has landed.
  template <int kMost>
  static DEVICE void wait_for_first_of(int asked) {
    if constexpr (kMost > 1) {
      if (asked < kMost) return wait_for_first_of<kMost - 1>(asked);
    }
    cp_async_wait<kMost - 1>();
  }
  // Announces what is in flight, each when it has landed. In a loop: its code is cold when a tile ends.
  template <class Feed>
  DEVICE void drain(const Feed& feed) {
    static_assert(kInFlight < Shared::kStages, "readers have one meanwhile");
#pragma unroll 1
    for (; in_flight_ > 0; --in_flight_) {
      wait_for_first_of<kInFlight>(in_flight_);
      announce<true>(feed);
    }
  }

  Shared& shared_;
  TileReader reader_;
  const Handover& handover_;
  int thread_, in_flight_ = 0;
  Tile tile_;
  typename Shared::Cursor at_, landed_;
};

}  // namespace jax_moe::cuda
