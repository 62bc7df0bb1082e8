// Route: packed top-k ids -> maps between expanded and permuted rows, and the row blocks of the GEMMs.
// Permuted rows are sorted by local expert, then by expanded index: the same on every run.
#pragma once
#include "../../workspace.h"
#include "quantize.cuh"
#include "slots.cuh"

namespace jax_moe::cuda {

inline constexpr int kRouteThreads = 1024;

struct RouteParameters {
  SlotExperts slots;
  int num_expanded;  // T * K
  int top_k;
  int num_chunks;                         // 1..kMaxRouteChunks CTAs, each with
  int chunk_size;                         // this many expanded indices
  int32_t* chunk_histogram;               // [L, kMaxRouteChunks], by route_count
  int32_t* expanded_idx_to_permuted_idx;  // [num_expanded], -1: no row
  int32_t* permuted_idx_to_token;         // [rows]
  int32_t* permuted_idx_to_expanded_idx;  // [rows], or null
  int32_t* gemm1_left;                    // [L + 1]: tiles of GEMM1 (handover.cuh) of each expert and of all,
  int gemm1_columns;                      // of which a row block has so many
  int32_t* num_m_blocks;                  // [1]
  int block_rows, most_tail_rows;         // of a row block, and that a few may have beyond
  int32_t* drawn_tiles;                   // set to 0
  MBlock* m_blocks;
  uint16_t* expert_weights;  // bf16 [num_expanded], or null; packed only
  // By the last CTAs of route_scatter: of these, what has a source.
  QuantizeTokens tokens;
  PackScales scales;
  FoldTokens fold;

  DEVICE void prepare_tokens() const {
    const int cta = int(blockIdx.x) - num_chunks - 1, ctas = int(gridDim.x) - num_chunks - 1;
    if (scales.from != nullptr)
      scales.run(cta, ctas);
    else if (fold.codes != nullptr)
      fold.run(cta, ctas);
    else if (slots.local_num_experts == slots.num_experts || tokens.num_tokens < kLeastTokensToAskAbout)
      tokens.run(cta, ctas, AllTokens());
    else
      tokens.run(cta, ctas, TokensOfLocalExperts{slots, top_k, slots.first_local()});
  }
};

static_assert(kMostCountedExperts <= kRouteThreads, "a thread an expert");
// Bytes of dynamic shared memory of both kernels.
constexpr int64_t route_shared_bytes(int64_t local_num_experts) {
  const int64_t counts = local_num_experts <= kMostCountedExperts ? local_num_experts * kRouteThreads / 32 * 2 : 0;
  return (local_num_experts + 3) / 4 * 16 + counts;
}

// Rows of each local expert in each chunk, a CTA a chunk.
__global__ void route_count(const __grid_constant__ RouteParameters p);
// Everything else: a CTA a chunk, one that lists the row blocks, and those that prepare tokens. After route_count,
// unless there is one chunk.
__global__ void route_scatter(const __grid_constant__ RouteParameters p);
// The same, of chunks that nobody has counted.
__global__ void route_count_and_scatter(const __grid_constant__ RouteParameters p);

}  // namespace jax_moe::cuda
