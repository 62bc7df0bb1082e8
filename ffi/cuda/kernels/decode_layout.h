// Sizes of the decode kernels and what their dynamic shared memory holds, for the kernels and for select.cc alike: a
// ring of weight stages first, then the parts below, at these byte offsets.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace jax_moe::cuda {

inline constexpr int kDecodeWarps = 16;  // of math
inline constexpr int kDecodeMathThreads = kDecodeWarps * 32;
// Behind them a warp that streams weights and one for all else; with MxFp8 two that bring the scales of weights.
inline constexpr int kScaleWarps = 2;
HOST_DEVICE constexpr int decode_threads(bool mx) { return kDecodeMathThreads + 64 + (mx ? kScaleWarps * 32 : 0); }
inline constexpr int kDecodeGemm1Rows = 32;  // of a tile, in two groups
inline constexpr int kMaxRingStages = 16;
inline constexpr int kMaxHBuffers = 8;
inline constexpr int kTileBuffers = 2;               // tiles of decode_gemm1 whose sums are being collected
inline constexpr int kDecodeFixedBytes = 13 * 1024;  // barriers, lists and scales

// How the math warps share the stages of `groups` x 16 rows by some K blocks: stages go to `teams` teams in turn, whose
// warps take a group and every `split`-th K block each.
// NOTE: the ring has a multiple of `teams` stages, so that a stage is always the same team's: a wait for a phase of it
// would not know an earlier phase that only another team has waited for.
inline constexpr int kFewestTeams = 2, kMostTeams = 8;  // powers of two
struct StageShares {
  int teams, groups, split;
  StageShares() = default;
  StageShares(int rows, int teams) : teams(teams), groups(rows / 16), split(kDecodeWarps / teams / groups) {}
  HOST_DEVICE int warps() const { return groups * split; }  // of a team
  // K blocks of a stage and of a tile that one warp multiplies, at most: at most 32. NOTE: of a tile's several stages
  // one each, since a warp counts them as they come where its scales have a place for all.
  int blocks_of_stage(int chunks) const { return (chunks + split - 1) / split; }
  int blocks_of_tile(int chunks, int steps) const { return (steps + teams - 1) / teams * blocks_of_stage(chunks); }
};

// A token's values and its scales, a row each; with MxFp8 four factors (mx_sums.cuh) are where a scale is. Values are
// e4m3 codes (1 byte), or f16 (2), exact as well, which spares every warp that multiplies them a conversion: each 16 as
// the pairs 0 2 4 6, then 1 3 5 7. NOTE: the pitch puts rows 16 bytes apart modulo 128, so that eight of them are read
// without bank conflicts.
inline constexpr int kCodeBytes = 1, kHalfBytes = 2;
HOST_DEVICE constexpr int token_pitch(int k_blocks, int value_bytes) { return k_blocks * 128 * value_bytes + 16; }
HOST_DEVICE constexpr int scale_pitch(int k_blocks, bool mx) { return mx ? 4 * k_blocks : (k_blocks + 3) / 4 * 4; }
HOST_DEVICE constexpr int tokens_bytes(int k_blocks, int num_tokens, int value_bytes) {
  return token_pitch(k_blocks, value_bytes) * num_tokens;
}
HOST_DEVICE constexpr int scales_bytes(int k_blocks, int num_tokens, bool mx) {
  return scale_pitch(k_blocks, mx) * num_tokens * 4;
}
// MxFp8: scales as a kernel before leaves them, words of four E8M0 bytes.
HOST_DEVICE constexpr int word_pitch(int k_blocks) { return scale_pitch(k_blocks, false); }
// MxFp8: the scales of a stage of weights; the codes of 32 columns have one.
HOST_DEVICE constexpr uint32_t mx_stage_bytes(uint32_t stage_bytes) { return stage_bytes / 32; }
HOST_DEVICE constexpr int partial_bytes(int token_tiles) { return kDecodeWarps * token_tiles * 512; }

struct DecodeGemm1Layout {
  uint32_t x, x_scale;  // one token after the other
  uint32_t x_words;     // MxFp8: of fresh tokens
  uint32_t partial;     // f32 [kTileBuffers][kDecodeWarps][token_tiles][128]
  uint32_t fixed, bytes;
  HOST_DEVICE DecodeGemm1Layout(uint32_t ring_bytes, int k_blocks, int num_tokens, int token_tiles, int value_bytes,
                                bool mx) {
    x = ring_bytes;
    x_scale = x + tokens_bytes(k_blocks, num_tokens, value_bytes);
    x_words = x_scale + scales_bytes(k_blocks, num_tokens, mx);
    partial = x_words + (mx ? word_pitch(k_blocks) * num_tokens * 4 : 0);
    fixed = partial + kTileBuffers * partial_bytes(token_tiles);
    bytes = fixed + kDecodeFixedBytes;
  }
};

struct DecodeGemm2Layout {
  uint32_t h, h_scale;  // the same, h_buffers times
  uint32_t partial;     // f32 [kDecodeWarps][token_tiles][128]
  uint32_t weight;      // f32 [slots, T]: of an active expert and a token
  uint32_t fixed, bytes;
  HOST_DEVICE DecodeGemm2Layout(uint32_t ring_bytes, int k_blocks, int num_tokens, int top_k, int token_tiles,
                                int h_buffers, int value_bytes, bool mx) {
    h = ring_bytes;
    h_scale = h + h_buffers * tokens_bytes(k_blocks, num_tokens, value_bytes);
    partial = h_scale + h_buffers * scales_bytes(k_blocks, num_tokens, mx);
    weight = partial + partial_bytes(token_tiles);
    fixed = weight + (num_tokens * top_k * num_tokens * 4 + 15) / 16 * 16;
    bytes = fixed + kDecodeFixedBytes;
  }
};

}  // namespace jax_moe::cuda
