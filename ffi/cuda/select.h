// Which kernels and grids a problem gets: a pure function of the problem and the number of SMs, testable and printable
// without a device. A new kernel, tile or GPU makes its entry here.
#pragma once
#include <string>

#include "../moe.h"

namespace jax_moe::cuda {

inline constexpr int kMaxSharedBytes = 232448;  // dynamic shared memory that one CTA may have

// A stage of a decode kernel's ring holds `chunks` blocks of 128 of K; a tile's K takes `steps` of them.
struct DecodeTile {
  int chunks, steps;
  int teams;  // of math warps (decode_layout.h)
  int stages, stage_bytes;
  int shared_bytes;
  int grid;
  int value_bytes;  // of tokens in shared memory (decode_layout.h)
};
struct DecodeConfig {
  bool used;
  int token_tiles;    // of 8 tokens
  int quantize_ctas;  // of a kernel that quantises the tokens; 0: gemm1's CTAs do, or there is nothing to do
  int slice_columns;  // of the output, a tile of gemm2
  int h_buffers;
  bool overlap_previous;  // gemm1 starts before the kernel before this call has ended
  DecodeTile gemm1, gemm2;
};

// Of both grouped GEMMs: for many rows an expert or few, DeepSeekFp8 or MxFp8, weights by K blocks or by pairs of them.
enum class GroupedKernel { kMany, kManyPairs, kFew, kFewPairs, kMxMany, kMxFew, kMxFewPairs };
const char* NameOf(GroupedKernel kernel);

struct Config {
  DecodeConfig decode;
  // The rest is for the grouped kernels.

  int route_chunks;         // CTAs of the route kernels
  int route_chunk_size;     // expanded indices a CTA
  bool route_counts_apart;  // by a launch of its own
  int quantize_ctas;        // of the last route kernel, for tokens or E8M0 scales that are not yet what the GEMM reads
  GroupedKernel gemm_kernel;
  bool tokens_are_values;          // MxFp8 by bf16 wgmmas: x and h have their scales folded in
  int block_rows, most_tail_rows;  // kBlockM or kFewRows; rows that a few blocks of an expert may have beyond
  int gemm_grid;                   // persistent CTAs
  int gemm1_columns;               // column tiles of a row block
  int l2_bytes;                    // that L2 reads at a time, 128 or 256
  bool paired_weights;             // two K blocks of weights are asked for together
  bool h_stays, y2_stays;          // in L2, until finalize has read y2 and discards them
};

Config Select(const Problem& problem, int num_sms);
int LaunchedStages(const Problem& problem, const Config& config);  // a mask of Stage

}  // namespace jax_moe::cuda
