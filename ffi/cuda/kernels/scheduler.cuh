// Which tile of the two grouped GEMMs a CTA computes next: those of GEMM1, then those of GEMM2. Tiles of a GEMM are
// numbered group by group (up to 16 row blocks of one expert), inside a group by weight column tile, then by row block:
// CTAs that run together share weight tiles in L2. CTAs draw one tile after the other, late: tiles that are neighbours
// start together however long those before took, and nobody waits for a CTA that has not begun. The thread that feeds
// weights draws; the others read a queue in shared memory.
#pragma once
#include "../../workspace.h"
#include "handover.cuh"
#include "pipeline.cuh"

namespace jax_moe::cuda {

enum Gemm : int { kFirstGemm, kSecondGemm, kNoGemm };
// NOTE: packed, because math threads have no register to spare while they multiply.
struct Tile {
  int row0;    // first permuted row
  int column;  // column tile
  uint32_t packed;

  // Of tokens, 1..kBlockM + kMostTailRows.
  DEVICE int rows() const { return int(packed & 0xFF); }
  // kNoGemm: there are no more tiles.
  DEVICE int gemm() const { return int(packed >> 8 & 3); }
  // Whether its tokens may be read; else whoever reads them waits.
  DEVICE bool ready() const { return packed & 1 << 10; }
  // Local expert, of at most 32767.
  DEVICE int expert() const { return int(packed >> 16); }
  // One to practise with: its rows are no tokens'.
  static DEVICE Tile of_practice(int rows, int gemm) { return {0, 0, pack(rows, gemm, true, 0)}; }
  static DEVICE uint32_t pack(int rows, int gemm, bool ready, int expert) {
    return uint32_t(rows | gemm << 8 | int(ready) << 10 | expert << 16);
  }
};
static_assert(kBlockM + kMostTailRows < 256, "a byte");

struct TileSchedule {
  const MBlock* m_blocks;  // [*num_m_blocks]
  const int32_t* num_m_blocks;
  int32_t* drawn;      // tiles drawn so far; 0 before the kernel, and after it
  int num_columns[2];  // column tiles of a row block, of either GEMM; 0: this launch is without it

  DEVICE MBlock block(int i) const {
    const int4 v = __ldcg(reinterpret_cast<const int4*>(m_blocks) + i);
    return {v.x, v.y, v.z, static_cast<int16_t>(v.w & 0xFFFF), static_cast<int16_t>(v.w >> 16)};
  }
};

// NOTE: deeper than the ring of stages, so that a thread that feeds both never waits here for somebody who waits for a
// stage, not even when every tile is one stage.
inline constexpr int kTileQueue = 8;
struct TileQueue {
  int4 tiles[kTileQueue];
  PipelineBarriers<kTileQueue> barriers;  // full: the thread that tells; empty: every warp that reads

  DEVICE void put(int i, const Tile& tile) { tiles[i] = make_int4(tile.row0, tile.column, int(tile.packed), 0); }
  DEVICE Tile get(int i) const {
    const int4 v = tiles[i];
    return {v.x, v.y, uint32_t(v.z)};
  }
};

// A warp's place in the queue.
class TileReader {
 public:
  // By whole warps.
  DEVICE Tile next(TileQueue& queue) {
    queue.barriers.wait_full(at_);
    const Tile tile = queue.get(at_.stage());
    __syncwarp();
    if (threadIdx.x % 32 == 0) queue.barriers.release(at_);
    at_.advance();
    return tile;
  }

 private:
  PipelineCursor<kTileQueue> at_;
};

// The thread of a CTA that draws tiles and tells the others.
class TileTeller {
 public:
  DEVICE TileTeller(const TileSchedule& schedule, const Handover& handover)
      : schedule_(schedule), handover_(handover), all_ready_(handover.left == nullptr) {}

  // The first tile, told.
  DEVICE Tile first(TileQueue& queue) {
    const int blocks = __ldcg(schedule_.num_m_blocks);
    run(queue, kDraw);
    tiles_of_first_ = blocks * schedule_.num_columns[kFirstGemm];
    tiles_ = tiles_of_first_ + blocks * schedule_.num_columns[kSecondGemm];
    for (int step = kFind; step < kSteps; ++step) run(queue, step);
    return tile_;
  }
  // The calls that lead to the next tile, before each K block of a tile of k_blocks: each uses what the one before has
  // asked memory for two K blocks earlier, or one where there are few. `left`: K blocks after this one.
  DEVICE void advance(TileQueue& queue, int k_blocks, int left) {
    const int apart = k_blocks > 2 * kSteps ? 2 : 1;
    for (; step_ < kSteps && left <= apart * (kSteps - 1 - step_) + 1; ++step_) run(queue, step_);
  }
  // After the last K block: the next tile.
  DEVICE Tile next() {
    step_ = kDraw;
    return tile_;
  }

 private:
  enum Step { kDraw, kFind, kPlace, kTell, kSteps };

  DEVICE void run(TileQueue& queue, int step) {
    if (step == kDraw) {
      index_ = atomicAdd(schedule_.drawn, 1);
    } else if (step == kFind) {
      // Every CTA draws until there is no tile for it: the last of all leaves the counter as it was.
      if (index_ == tiles_ - 1 + int(gridDim.x)) atomicExch(schedule_.drawn, 0);
      gemm_ = index_ < tiles_of_first_ ? kFirstGemm : index_ < tiles_ ? kSecondGemm : kNoGemm;
      if (gemm_ == kNoGemm) return;
      if (gemm_ == kSecondGemm) index_ -= tiles_of_first_;
      // Every block of a group knows where the group begins, so tile -> group needs no search.
      block_ = schedule_.block(index_ / schedule_.num_columns[gemm_]);
    } else if (step == kPlace) {
      if (gemm_ == kNoGemm) return;
      if (must_look()) {
        left_of_expert_ = handover_.of_expert(block_.expert);
        left_of_all_ = handover_.of_all();
      }
      const int in_group = index_ - block_.group_begin * schedule_.num_columns[gemm_];
      column_ = in_group / block_.group_size;
      if (block_.group_size > 1) block_ = schedule_.block(block_.group_begin + in_group - column_ * block_.group_size);
    } else {
      const bool ready = !must_look() || left_of_expert_ <= 0;
      if (must_look() && ready) {
        handover_.seen();
        all_ready_ = left_of_all_ <= 0;
      }
      tile_ = {block_.row0, column_, Tile::pack(block_.rows, gemm_, ready, block_.expert)};
      queue.barriers.wait_empty(at_);
      queue.put(at_.stage(), tile_);
      mbarrier_arrive(queue.barriers.full_address(at_.stage()));
      at_.advance();
    }
  }
  DEVICE bool must_look() const { return gemm_ == kSecondGemm && !all_ready_; }

  const TileSchedule& schedule_;
  const Handover& handover_;
  bool all_ready_;
  int tiles_of_first_ = 0, tiles_ = 0;  // of GEMM1; of both
  int index_ = 0, gemm_ = kNoGemm, column_ = 0, step_ = kDraw;
  int left_of_expert_ = 0, left_of_all_ = 0;
  MBlock block_{};
  Tile tile_{};
  PipelineCursor<kTileQueue> at_;
};

}  // namespace jax_moe::cuda
