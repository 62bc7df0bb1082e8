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
  int32_t* chunk_histogram;               // [L, kMaxRouteChunks], used when num_chunks > 1
  int32_t* expanded_idx_to_permuted_idx;  // [num_expanded], -1: no row
  int32_t* permuted_idx_to_token;         // [rows]
  int32_t* permuted_idx_to_expanded_idx;  // [rows], or null
  int32_t* expert_offsets;                // [L + 1]
  int32_t* num_m_blocks;                  // [1]
  MBlock* m_blocks;
  uint16_t* expert_weights;  // bf16 [num_expanded], or null; packed only
  QuantizeTokens tokens;     // by the CTAs after the first num_chunks of the first kernel
};

// Rows of each local expert in each chunk. Only launched when num_chunks > 1. Dynamic shared memory: L int32.
__global__ void route_count(const __grid_constant__ RouteParameters p);
// Everything else. Dynamic shared memory: L int32.
__global__ void route_scatter(const __grid_constant__ RouteParameters p);

}  // namespace jax_moe::cuda
