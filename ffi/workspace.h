// What a call keeps between its stages, and the one walk that lays it out. Carve is walked twice with the same lines:
// to learn the size (affine in the number of tokens) and to hand out pointers. Both backends use it, so that a module
// exported for both platforms has one workspace size.
#pragma once
#include <algorithm>

#include "moe.h"

namespace jax_moe {

// Blocks of kBlockM or kFewRows rows of one expert, the unit of the GEMM schedules, the last one of an expert with
// fewer. Where the kernels can, up to kMostTails of them have up to kMostTailRows more, if none is left then: that
// costs less than a block of so few. Blocks are numbered in row order; groups of up to kBlocksPerGroup neighbours of
// one expert walk the weight columns together, so that a weight tile is read from memory once.
inline constexpr int kBlockM = 128, kMostTailRows = 16, kMostTails = 4;
inline constexpr int kFewRows = 32;  // of a block where experts have few rows
inline constexpr int kBlocksPerGroup = 16;
struct alignas(16) MBlock {
  int32_t row0;         // first permuted row
  int32_t expert;       // local expert
  int32_t group_begin;  // number of the group's first block
  int16_t rows;         // of a call with blocks of kBlockM 1..kBlockM + kMostTailRows
  int16_t group_size;   // 1..kBlocksPerGroup
};

// A call of at most so many tokens, slots and local experts may take the decode kernels.
inline constexpr int kMaxDecodeTokens = 16;
inline constexpr int kMaxDecodeSlots = 128;
inline constexpr int kMaxDecodeExperts = 4096;

// A large call is routed in at most this many chunks of consecutive expanded indices.
inline constexpr int kMaxRouteChunks = 128;
// Up to so many local experts its CTAs have counters for each of their warps.
inline constexpr int kMostCountedExperts = 1024;

// A larger call has y2 for half of the columns at a time, half after half: y2 is most of its workspace, and reading h
// twice costs little then.
inline constexpr int64_t kMostTokensOfWholeY2 = 8192;
inline constexpr int64_t kSlabStep = 256;  // a column tile of GEMM2

// Columns of H that are in y2 together.
struct Slab {
  int64_t first, columns;
};

// NOTE: with MxFp8 each float of a scale array holds four E8M0 bytes instead, those of its 4 x 32 columns in order.
struct Workspace {
  uint8_t* x;                             // e4m3 [T, H]       quantised hidden_states (bf16 input only)
  float* x_scale;                         // [T, H/128]        its scales, up to 3 more a row (bf16 input only)
  uint16_t* x_values;                     // bf16 [T, H]       the same memory: MxFp8, on a GPU, scales folded in
  int32_t* expanded_idx_to_permuted_idx;  // [T*K]             or the result of that name
  int32_t* permuted_idx_to_token;         // [T*K]
  int32_t* permuted_idx_to_expanded_idx;  // [T*K]             (LoRA only, else null)
  int32_t* expert_offsets;                // [L + 1]           on a CPU: first permuted row of each local expert
  int32_t* gemm1_left;                    // the same memory   on a GPU: what GEMM1 has still to do (handover.cuh)
  int32_t* chunk_histogram;               // [L, kMaxRouteChunks]
  int32_t* num_m_blocks;                  // [1]
  int32_t* drawn_tiles;                   // [1]               tiles of the GEMMs that CTAs have drawn
  MBlock* m_blocks;                       // [T*ceil(K/kFewRows) + L + 1]
  float* permuted_x_scale;                // [H/128, scale_stride]; on a GPU [H/128, T], only where MxFp8 needs it
  uint8_t* h;          // e4m3 [T*K, I]     activation of a permuted row, or the result gemm1_activation_output
  float* h_scale;      // [I/128, scale_stride], or the result gemm1_activation_scale
  uint16_t* h_values;  // bf16 [T*K, I]     MxFp8, on a GPU: h with scales folded in; its memory unless that is a result
  uint16_t* y2;        // bf16 [T*K, y2_columns]    or the result gemm2_output without do_finalize
  int64_t y2_columns;  // H, or those of the first slab, the widest
  // Of calls that could take the decode kernels: the activation of a slot, in float32, then quantised.
  float* decode_h;        // f32 [kMaxDecodeSlots, I]
  uint8_t* decode_codes;  // e4m3 [kMaxDecodeSlots, I]
  float* decode_scales;   // [kMaxDecodeSlots, I/128 rounded up to a multiple of 4], MxFp8 [kMaxDecodeSlots, I/32]
  int64_t scale_stride;   // Problem::scale_stride()
  AffineBytes size;       // an upper bound for every number of tokens, on this one's side of kMostTokensOfWholeY2

  // That from column `first` on.
  Slab slab(const Problem& problem, int64_t first) const {
    return {first, std::min(y2_columns, problem.hidden_size - first)};
  }
};

// Columns of a whole y2, or of its widest slab.
int64_t Y2Columns(const Problem& problem);

// Whether its options let a problem take the decode kernels, whatever its number of tokens.
bool MayDecode(const Problem& problem);

// Pointers are offsets from buffers.workspace.data rounded up to 256 bytes; with null data only `size` means anything.
Workspace CarveWorkspace(const Problem& problem, const Buffers& buffers);

}  // namespace jax_moe
