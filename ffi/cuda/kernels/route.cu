// A stable counting sort of expanded rows by local expert: each chunk is placed after the rows that all chunks before
// it have. In one launch where every CTA counts all slots for itself, in two where each chunk is counted once.
#include "route.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kWarps = kRouteThreads / 32;

DEVICE int warp_sum(int v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// Sum of v over the threads before this one; `total` gets the sum over all. `warps`: kWarps ints of shared memory.
DEVICE int exclusive_sum(int v, int* warps, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = v;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(~0u, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  __syncthreads();  // `warps` may still be read by an earlier call
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  const int others = warps[lane];
  total = warp_sum(others);
  return warp_sum(lane < warp ? others : 0) + inclusive - v;
}

// counts[e] = rows of expert e in a chunk.
DEVICE void count_chunk(const RouteParameters& p, int chunk, int64_t first, int* counts) {
  for (int e = threadIdx.x; e < p.slots.local_num_experts; e += kRouteThreads) counts[e] = 0;
  __syncthreads();
  const int begin = chunk * p.chunk_size, end = min(begin + p.chunk_size, p.num_expanded);
  for (int i = begin + threadIdx.x; i < end; i += kRouteThreads) {
    const int e = p.slots.local_expert(__ldcg(p.slots.topk_ids + i), first);
    if (e >= 0) atomicAdd(&counts[e], 1);
  }
  __syncthreads();
}

// next[e] = rows of expert e, before[e] = those of the slots before `begin`.
DEVICE void count_all(const RouteParameters& p, int begin, int64_t first, int* next, int* before) {
  constexpr int kInFlight = 8;
  const int experts = p.slots.local_num_experts;
  for (int e = threadIdx.x; e < experts; e += kRouteThreads) next[e] = before[e] = 0;
  __syncthreads();
  for (int base = threadIdx.x; base < p.num_expanded; base += kInFlight * kRouteThreads) {
    int element[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (base + i * kRouteThreads < p.num_expanded) element[i] = __ldcg(p.slots.topk_ids + base + i * kRouteThreads);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int slot = base + i * kRouteThreads;
      const int e = slot < p.num_expanded ? p.slots.local_expert(element[i], first) : -1;
      if (e >= 0) atomicAdd(slot < begin ? &before[e] : &next[e], 1);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kRouteThreads) next[e] += before[e];
  __syncthreads();
}

// Calls use(expert, its rows in the chunks [0, num_chunks)) for every expert, by one thread; kMaxRouteChunks = 4 a
// lane.
template <class Use>
DEVICE void sum_chunks(const RouteParameters& p, int num_chunks, const Use& use) {
  static_assert(kMaxRouteChunks == 128, "one 16-byte load a lane");
  constexpr int kInFlight = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, experts = p.slots.local_num_experts;
  for (int base = warp; base < experts; base += kInFlight * kWarps) {
    int4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      v[i] = reinterpret_cast<const int4*>(p.chunk_histogram +
                                           int64_t(min(base + i * kWarps, experts - 1)) * kMaxRouteChunks)[lane];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int first = 4 * lane, expert = base + i * kWarps;
      const int rows = warp_sum((first < num_chunks ? v[i].x : 0) + (first + 1 < num_chunks ? v[i].y : 0) +
                                (first + 2 < num_chunks ? v[i].z : 0) + (first + 3 < num_chunks ? v[i].w : 0));
      if (lane == 0 && expert < experts) use(expert, rows);
    }
  }
}

// The row blocks of an expert: full ones and what is left, a block of its own unless some of the others, the first
// ones, can take it as their tails.
struct BlocksOfExpert {
  const RouteParameters& p;
  int rows, count, in_tails;  // in_tails: rows that the tails of all have

  DEVICE BlocksOfExpert(const RouteParameters& p, int rows) : p(p), rows(rows) {
    const int full = rows / p.block_rows, rest = rows - full * p.block_rows;
    const bool tails = rest <= min(full, kMostTails) * p.most_tail_rows;
    count = full + !tails;
    in_tails = tails ? rest : 0;
  }
  DEVICE int first_row(int b) const { return b * p.block_rows + min(b * p.most_tail_rows, in_tails); }
  DEVICE int rows_of(int b) const { return (b + 1 < count ? first_row(b + 1) : rows) - first_row(b); }
};

// Lists the row blocks of all experts. By one CTA; `counts` holds rows per expert, `warps` kWarps ints.
DEVICE void list_m_blocks(const RouteParameters& p, const int* counts, int* warps) {
  const int per_thread = (p.slots.local_num_experts + kRouteThreads - 1) / kRouteThreads;
  const int first = min(int(threadIdx.x) * per_thread, p.slots.local_num_experts);
  const int last = min(first + per_thread, p.slots.local_num_experts);
  int rows = 0, blocks = 0, total_rows, total_blocks;
  for (int e = first; e < last; ++e) {
    rows += counts[e];
    blocks += BlocksOfExpert(p, counts[e]).count;
  }
  int row = exclusive_sum(rows, warps, total_rows), block = exclusive_sum(blocks, warps, total_blocks);
  for (int e = first; e < last; ++e) {
    const BlocksOfExpert of_expert(p, counts[e]);
    p.gemm1_left[e] = of_expert.count * p.gemm1_columns;
    for (int b = 0; b < of_expert.count; ++b) {
      const int group = b / kBlocksPerGroup * kBlocksPerGroup;
      MBlock m;
      m.row0 = row + of_expert.first_row(b);
      m.expert = e;
      m.group_begin = block + group;
      m.rows = int16_t(of_expert.rows_of(b));
      m.group_size = int16_t(min(of_expert.count - group, kBlocksPerGroup));
      p.m_blocks[block + b] = m;
    }
    row += of_expert.rows;
    block += of_expert.count;
  }
  if (threadIdx.x == 0) {
    p.gemm1_left[p.slots.local_num_experts] = total_blocks * p.gemm1_columns;
    *p.num_m_blocks = total_blocks;
    *p.drawn_tiles = 0;
  }
}

// next[e]: rows per expert -> first row of the expert, behind before[e] rows unless that is null, in place.
DEVICE void to_offsets(const RouteParameters& p, const int* before, int* next, int* warps) {
  const int per_thread = (p.slots.local_num_experts + kRouteThreads - 1) / kRouteThreads;
  const int first = min(int(threadIdx.x) * per_thread, p.slots.local_num_experts);
  const int last = min(first + per_thread, p.slots.local_num_experts);
  int rows = 0, total;
  for (int e = first; e < last; ++e) rows += next[e];
  int row = exclusive_sum(rows, warps, total);
  for (int e = first; e < last; ++e) {
    const int count = next[e];
    next[e] = row + (before != nullptr ? before[e] : 0);
    row += count;
  }
  __syncthreads();
}

// What 1024 indices, one a thread, have to be told apart by: where the indices of each expert begin in each warp.
struct PlaceInRound {
  int* next;             // [L] next free row of each expert
  uint16_t* warp_begin;  // [kWarps, L], or null where L is too large for it

  // The row of this thread's index; -1 without an expert. By all threads.
  DEVICE int row(int expert, int num_experts, int num_warps) const {
    return warp_begin ? row_by_counts(expert, num_experts) : row_by_turns(expert, num_warps);
  }

 private:
  DEVICE int row_by_counts(int expert, int num_experts) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < kWarps * num_experts / 2; i += kRouteThreads)
      reinterpret_cast<uint32_t*>(warp_begin)[i] = 0;
    __syncthreads();
    const unsigned peers = __match_any_sync(~0u, expert);
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (expert >= 0 && rank == 0) warp_begin[warp * num_experts + expert] = uint16_t(__popc(peers));
    __syncthreads();
    int total = 0;
    if (int(threadIdx.x) < num_experts) {
      uint16_t* of_expert = warp_begin + threadIdx.x;
      for (int first = 0; first < kWarps; first += 8) {
        int count[8];
#pragma unroll
        for (int w = 0; w < 8; ++w) count[w] = of_expert[(first + w) * num_experts];
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          of_expert[(first + w) * num_experts] = uint16_t(total);
          total += count[w];
        }
      }
    }
    __syncthreads();
    const int row = expert >= 0 ? next[expert] + warp_begin[warp * num_experts + expert] + rank : -1;
    __syncthreads();
    if (int(threadIdx.x) < num_experts) next[threadIdx.x] += total;
    return row;
  }

  // One warp after the other.
  DEVICE int row_by_turns(int expert, int num_warps) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned peers = __match_any_sync(~0u, expert);
    const int rank = __popc(peers & ((1u << lane) - 1));
    int row = -1;
    for (int w = 0; w < num_warps; ++w) {
      if (w == warp) {
        if (expert >= 0) row = next[expert] + rank;
        __syncwarp();
        if (expert >= 0 && rank == 0) next[expert] += __popc(peers);
      }
      __syncthreads();
    }
    return row;
  }
};

// Gives every index of this CTA's chunk its row, in order.
DEVICE void place_chunk(const RouteParameters& p, int64_t first, int* next) {
  const int experts = p.slots.local_num_experts;
  const PlaceInRound place{
      next, experts <= kMostCountedExperts ? reinterpret_cast<uint16_t*>(next + (experts + 3) / 4 * 4) : nullptr};
  const int begin = blockIdx.x * p.chunk_size, end = min(begin + p.chunk_size, p.num_expanded);
  for (int base = begin; base < end; base += kRouteThreads) {
    const int i = base + threadIdx.x;
    const int element = i < end ? __ldcg(p.slots.topk_ids + i) : -1;
    const int row = place.row(p.slots.local_expert(element, first), experts, min(kWarps, (end - base + 31) / 32));
    if (i < end) {
      p.expanded_idx_to_permuted_idx[i] = row;
      if (row >= 0) p.permuted_idx_to_token[row] = i / p.top_k;
      if (row >= 0 && p.permuted_idx_to_expanded_idx) p.permuted_idx_to_expanded_idx[row] = i;
      if (p.expert_weights) p.expert_weights[i] = uint16_t(element);
    }
  }
}

// By a grid of route_scatter. kCountsAll: each CTA counts all slots; else chunks are counted, or there is one.
template <bool kCountsAll>
DEVICE void scatter(const RouteParameters& p) {
  const bool prepares = int(blockIdx.x) > p.num_chunks, lists = int(blockIdx.x) == p.num_chunks;
  // NOTE: route_count starts this kernel after its own wait, and prepare_tokens() reads nothing of it.
  if (!prepares || kCountsAll || p.num_chunks == 1) wait_for_previous_kernel();
  let_next_kernel_start();
  if (prepares) return p.prepare_tokens();
  __shared__ int warps[kWarps];
  const int experts = p.slots.local_num_experts, chunk = lists ? 0 : blockIdx.x;
  int* next = reinterpret_cast<int*>(dynamic_shared_memory());  // [L] rows of each expert, then its next free row
  int* before = next + (experts + 3) / 4 * 4;  // [L] where this CTA counts all: rows of the chunks before its own
  const int64_t first = p.slots.first_local();
  const bool counted = !kCountsAll && p.num_chunks > 1;
  if constexpr (kCountsAll) {
    count_all(p, chunk * p.chunk_size, first, next, before);
  } else if (counted) {
    sum_chunks(p, p.num_chunks, [&](int expert, int rows) { next[expert] = rows; });
    __syncthreads();
  } else {
    count_chunk(p, 0, first, next);
  }
  if (lists) return list_m_blocks(p, next, warps);
  to_offsets(p, kCountsAll ? before : nullptr, next, warps);
  if (counted) {
    sum_chunks(p, chunk, [&](int expert, int rows) { next[expert] += rows; });
    __syncthreads();
  }
  place_chunk(p, first, next);
}

}  // namespace

__global__ void __launch_bounds__(kRouteThreads) route_count(const __grid_constant__ RouteParameters p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int* counts = reinterpret_cast<int*>(dynamic_shared_memory());
  count_chunk(p, blockIdx.x, p.slots.first_local(), counts);
  for (int e = threadIdx.x; e < p.slots.local_num_experts; e += kRouteThreads)
    p.chunk_histogram[int64_t(e) * kMaxRouteChunks + blockIdx.x] = counts[e];
}

__global__ void __launch_bounds__(kRouteThreads) route_scatter(const __grid_constant__ RouteParameters p) {
  scatter<false>(p);
}
__global__ void __launch_bounds__(kRouteThreads) route_count_and_scatter(const __grid_constant__ RouteParameters p) {
  scatter<true>(p);
}

}  // namespace jax_moe::cuda
