// Which tile of a grouped GEMM a CTA computes next. Tiles are numbered group by group (up to 16 row blocks of one
// expert), inside a group by weight column tile, then by row block: CTAs that run together share weight tiles in L2.
// Persistent CTAs take tiles blockIdx.x, blockIdx.x + gridDim.x, ... One thread looks them up, ahead of their use; the
// others read them from a queue in shared memory.
#pragma once
#include "../../workspace.h"
#include "pipeline.cuh"

namespace jax_moe::cuda {

struct alignas(16) Tile {
  int row0;    // first permuted row
  int rows;    // 1..kBlockM; 0: there are no more tiles
  int expert;  // local expert
  int column;  // column tile
};

// NOTE: read past L1: the kernel that writes it may still run when this one starts.
struct TileSchedule {
  const MBlock* m_blocks;  // [*num_m_blocks]
  const int32_t* num_m_blocks;
  int num_columns;  // column tiles of a row block

  DEVICE int num_tiles() const { return __ldcg(num_m_blocks) * num_columns; }

  // Every block of a group knows where the group begins, so tile -> group needs no search.
  DEVICE Tile tile(int index, int num_tiles) const {
    if (index >= num_tiles) return {0, 0, 0, 0};
    const MBlock first = load(index / num_columns);
    const int in_group = index - first.group_begin * num_columns;
    const int column = in_group / first.group_size;
    const MBlock block = load(first.group_begin + in_group - column * first.group_size);
    return {block.row0, block.rows, block.expert, column};
  }

 private:
  DEVICE MBlock load(int i) const {
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
  // By the one thread of a warp that is there.
  DEVICE Tile next_alone(TileQueue& queue) {
    const Tile tile = read(queue);
    queue.barriers.release(at_);
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
      : schedule_(schedule), num_tiles_(schedule.num_tiles()), index_(blockIdx.x) {}

  // Tells the next tile; returns whether there was one.
  DEVICE bool tell(TileQueue& queue) {
    if (done_) return false;
    const Tile tile = schedule_.tile(index_, num_tiles_);
    done_ = tile.rows == 0;
    queue.barriers.wait_empty(at_);
    *reinterpret_cast<int4*>(&queue.tiles[at_.stage()]) = make_int4(tile.row0, tile.rows, tile.expert, tile.column);
    mbarrier_arrive(queue.barriers.full_address(at_.stage()));
    at_.advance();
    index_ += gridDim.x;
    return !done_;
  }

 private:
  const TileSchedule& schedule_;
  int num_tiles_, index_;
  bool done_ = false;
  PipelineCursor<kTileQueue> at_;
};

}  // namespace jax_moe::cuda
