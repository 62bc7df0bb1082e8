// Which tile of a grouped GEMM a CTA computes next. Tiles are numbered group by group (up to 16 row blocks of one
// expert), inside a group by weight column tile, then by row block: CTAs that run together share weight tiles in L2.
// The first tile of a CTA is its own number, the others it draws one after the other, late: tiles that are neighbours
// start together however long those before took. The thread that feeds weights draws; the others read a queue in shared
// memory.
#pragma once
#include "../../workspace.h"
#include "pipeline.cuh"

namespace jax_moe::cuda {

struct alignas(16) Tile {
  int row0;    // first permuted row
  int rows;    // of tokens, 1..kBlockM + kMostTailRows; 0: there are no more tiles
  int expert;  // local expert
  int column;  // column tile
};

// NOTE: read past L1: the kernel that writes it may still run when this one starts.
struct TileSchedule {
  const MBlock* m_blocks;  // [*num_m_blocks]
  const int32_t* num_m_blocks;
  int32_t* drawn;   // tiles drawn so far; 0 before the kernel, and after it
  int num_columns;  // column tiles of a row block

  DEVICE MBlock block(int i) const {
    const int4 v = __ldcg(reinterpret_cast<const int4*>(m_blocks) + i);
    return {v.x, v.y, v.z, static_cast<int16_t>(v.w & 0xFFFF), static_cast<int16_t>(v.w >> 16)};
  }
};

// NOTE: deeper than the ring of stages, so that a thread that feeds both never waits here for somebody who waits for a
// stage, not even when every tile is one stage.
inline constexpr int kTileQueue = 8;
struct TileQueue {
  Tile tiles[kTileQueue];
  PipelineBarriers<kTileQueue> barriers;  // full: the thread that tells; empty: every warp that reads
};

// A warp's place in the queue.
class TileReader {
 public:
  // By whole warps.
  DEVICE Tile next(TileQueue& queue) {
    const Tile tile = read(queue);
    __syncwarp();
    if (threadIdx.x % 32 == 0) queue.barriers.release(at_);
    at_.advance();
    return tile;
  }

 private:
  DEVICE Tile read(TileQueue& queue) {
    queue.barriers.wait_full(at_);
    const int4 v = *reinterpret_cast<const int4*>(&queue.tiles[at_.stage()]);
    return {v.x, v.y, v.z, v.w};
  }
  PipelineCursor<kTileQueue> at_;
};

// The thread of a CTA that looks tiles up and tells the others.
class TileTeller {
 public:
  DEVICE explicit TileTeller(const TileSchedule& schedule)
      : schedule_(schedule), num_tiles_(__ldcg(schedule.num_m_blocks) * schedule.num_columns), index_(blockIdx.x) {}

  // The first tile, told.
  DEVICE Tile first(TileQueue& queue) {
    for (int step = kFind; step < kSteps; ++step) run(queue, step);
    return tile_;
  }
  // One of the calls that lead to the next tile, before each K block of a tile: each uses what the one before has asked
  // memory for a K block or two earlier. `left`: K blocks after this one.
  DEVICE void advance(TileQueue& queue, int left) {
    for (; step_ < kSteps && left <= 2 * (kSteps - 1 - step_) + 1; ++step_) run(queue, step_);
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
      drawn_ = atomicAdd(schedule_.drawn, 1);
    } else if (step == kFind) {
      if (drawn_ >= 0) index_ = int(gridDim.x) + drawn_;
      // Every block of a group knows where the group begins, so tile -> group needs no search.
      if (index_ < num_tiles_) block_ = schedule_.block(index_ / schedule_.num_columns);
      // As many are drawn as there are tiles: by every CTA until there is none for it.
      if (drawn_ == num_tiles_ - 1) atomicExch(schedule_.drawn, 0);
    } else if (index_ >= num_tiles_) {
      tile_ = {0, 0, 0, 0};
    } else if (step == kPlace) {
      const int in_group = index_ - block_.group_begin * schedule_.num_columns;
      tile_.column = in_group / block_.group_size;
      block_ = schedule_.block(block_.group_begin + in_group - tile_.column * block_.group_size);
    } else {
      tile_ = {block_.row0, block_.rows, block_.expert, tile_.column};
    }
    if (step == kTell) {
      queue.barriers.wait_empty(at_);
      *reinterpret_cast<int4*>(&queue.tiles[at_.stage()]) =
          make_int4(tile_.row0, tile_.rows, tile_.expert, tile_.column);
      mbarrier_arrive(queue.barriers.full_address(at_.stage()));
      at_.advance();
    }
  }

  const TileSchedule& schedule_;
  int num_tiles_, index_;
  int drawn_ = -1, step_ = kDraw;
  MBlock block_{};
  Tile tile_{};
  PipelineCursor<kTileQueue> at_;
};

}  // namespace jax_moe::cuda
