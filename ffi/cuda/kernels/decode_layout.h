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

inline constexpr int kDecodeWarps = 16;  // of math; a stage's 16-row groups and K blocks are dealt out to them
inline constexpr int kDecodeMathThreads = kDecodeWarps * 32;
inline constexpr int kLoaderWarps = 7;  // of decode_gemm2: they quantise h
inline constexpr int kDecodeGemm1Threads = kDecodeMathThreads + 64;
inline constexpr int kDecodeGemm2Threads = kDecodeMathThreads + kLoaderWarps * 32 + 32;
inline constexpr int kDecodeGemm1Rows = 32;     // of a tile, in two groups
inline constexpr int kDecodeFixedBytes = 9216;  // barriers and lists
inline constexpr int kMaxRingStages = 16;
inline constexpr int kMaxHBuffers = 8;
inline constexpr int kMaxDecodeSteps = 32;  // stages that a tile's K takes: each lane holds the scale of one

struct DecodeGemm1Layout {
  uint32_t x;        // e4m3 [k_blocks][T][128]
  uint32_t x_scale;  // f32 [k_blocks][8 token_tiles]
  uint32_t partial;  // f32 [2][kDecodeWarps][token_tiles][128]
  uint32_t fixed;
  uint32_t bytes;
  HOST_DEVICE DecodeGemm1Layout(uint32_t ring_bytes, int k_blocks, int num_tokens, int token_tiles) {
    x = ring_bytes;
    x_scale = x + k_blocks * num_tokens * 128;
    partial = x_scale + k_blocks * token_tiles * 32;
    fixed = partial + 2 * kDecodeWarps * token_tiles * 512;
    bytes = fixed + kDecodeFixedBytes;
  }
};

struct DecodeGemm2Layout {
  uint32_t h;        // e4m3 [h_buffers][k_blocks][T][128]
  uint32_t h_scale;  // f32 [h_buffers][k_blocks][8 token_tiles]
  uint32_t partial;  // f32 [kDecodeWarps][token_tiles][128]
  uint32_t fixed;
  uint32_t bytes;
  HOST_DEVICE DecodeGemm2Layout(uint32_t ring_bytes, int k_blocks, int num_tokens, int token_tiles, int h_buffers) {
    h = ring_bytes;
    h_scale = h + h_buffers * k_blocks * num_tokens * 128;
    partial = h_scale + h_buffers * k_blocks * token_tiles * 32;
    fixed = partial + kDecodeWarps * token_tiles * 512;
    bytes = fixed + kDecodeFixedBytes;
  }
};

}  // namespace jax_moe::cuda
