// Which tile of a grouped GEMM a CTA computes next. Tiles are numbered group by group (up to 16 row blocks of one
// expert), inside a group by weight column tile, then by row block: CTAs that run together share weight tiles in L2.
// Persistent CTAs take tiles blockIdx.x, blockIdx.x + gridDim.x, ...
#pragma once
#include "../../workspace.h"
#include "ptx.cuh"

namespace jax_moe::cuda {

struct Tile {
  int row0;    // first permuted row
  int rows;    // 1..kBlockM
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
  DEVICE Tile tile(int index) const {
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

}  // namespace jax_moe::cuda
