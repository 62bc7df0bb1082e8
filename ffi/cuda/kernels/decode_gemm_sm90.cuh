// Decode: a call of few tokens as kernels that do little but read weights. Weight rows are the M side of the matrix
// product and all tokens its N side, so weights read once serve every token that needs them. They come through a ring
// of TMA boxes; e4m3 codes are widened to f16, which is exact, and summed in float32. decode_gemm1: tiles of 16 up and
// 16 gate rows (or 32 rows), h = activation, float32, a row a slot. decode_quantize: h to e4m3. decode_gemm2: slices of
// output columns.
#pragma once
#include "activation.cuh"
#include "active_experts.cuh"
#include "decode_layout.h"
#include "decode_mx.cuh"
#include "pipeline.cuh"

namespace jax_moe::cuda {

// How weights [L, rows, K] reach the ring: boxes [chunks][box rows][128 B] at (0, e * expert_y + row, e * expert_z +
// chunk) of a map {128, rows, K / 128}, in either layout.
struct WeightStream {
  const float* scale;  // [L, rows / 128, k_blocks]; not of MxFp8
  int rows;            // of an expert
  int k_blocks;        // K / 128
  int chunks;          // K blocks of a stage
  int steps;           // stages that all of K takes
  int expert_y, expert_z;
  int stages;            // of the ring
  uint32_t stage_bytes;  // a multiple of 1024

  // Behind the ring: with MxFp8 the scales of each stage.
  template <bool kMx>
  DEVICE uint32_t ring_bytes() const {
    return stages * (stage_bytes + (kMx ? mx_stage_bytes(stage_bytes) : 0));
  }
  DEVICE uint32_t mx_scales_of_stage(int stage) const {
    return stages * stage_bytes + stage * mx_stage_bytes(stage_bytes);
  }
};

struct DecodeGemm1Parameters {
  SlotExperts slots;
  int num_tokens, top_k;
  const void* x;  // bf16 or e4m3 [T, H]
  bool x_is_bf16;
  bool x_is_fresh;      // e4m3 of the kernel before, scales [T, scale_pitch]: this one starts reading weights meanwhile
  const void* x_scale;  // of e4m3: element (block, token) at block * block_stride + token * token_stride
  int64_t block_stride, token_stride;
  WeightStream stream;
  int intermediate;  // I
  int num_tiles;     // of an expert
  bool shuffled;
  ActivationChoice activation;
  float* h;  // [T * K, I], a row a slot
  MxScaleStream mx;
};

struct DecodeQuantizeParameters {
  SlotExperts slots;
  int num_slots, top_k;
  int k_blocks;     // I / 128
  const float* h;   // [T * K, I]
  uint8_t* values;  // e4m3 [T * K, I], or f16 as decode_layout.h has it
  int value_bytes;
  float* scales;  // [T * K, scale_pitch]; with MxFp8 words of four
};

struct DecodeGemm2Parameters {
  SlotExperts slots;
  SlotWeights weights;
  int num_tokens, top_k;
  const uint8_t* h;      // [T * K, I], a row a slot: e4m3 or f16, as gemm2 has them in shared memory
  const float* h_scale;  // [T * K, scale_pitch]
  WeightStream stream;
  int hidden;      // H
  int slice_rows;  // of weights, 16 to 128: columns of the output
  int h_buffers;   // experts whose quantised h is held at a time
  bool shuffled;
  uint16_t* output;  // bf16 [T, H]
  MxScaleStream mx;
};

// Position in a ring whose number of stages is known at run time.
class RingCursor {
 public:
  DEVICE int stage() const { return stage_; }
  DEVICE uint32_t parity() const { return parity_; }
  DEVICE void advance(int stages, int by = 1) {
    stage_ += by;
    while (stage_ >= stages) {
      stage_ -= stages;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// A math warp's part of the stages, in the order of the ring.
class WarpShare {
 public:
  DEVICE WarpShare(const WeightStream& stream, int rows)
      : shares_(rows), blocks_(shares_.blocks_of_stage(stream.chunks)) {
    const int warp = threadIdx.x / 32;
    group_ = warp % shares_.groups;
    part_ = warp / shares_.groups % shares_.split;
    team_ = warp / shares_.warps();
  }
  DEVICE int group() const { return group_; }

  // Of a tile whose first stage is number `stage` of all: the first of its steps that is this warp's. The next one is
  // kTeams later.
  DEVICE int first_step(int stage) const { return (team_ - stage) & (StageShares::kTeams - 1); }

  // Calls use(K block, its place in the stage, its number in the tile) for this warp's blocks of the stage at `step`,
  // its `round`-th of the tile.
  template <class Use>
  DEVICE void for_blocks(const WeightStream& stream, int step, int round, const Use& use) const {
    for (int i = 0; i < blocks_; ++i) {
      const int in_stage = part_ + i * shares_.split, chunk = step * stream.chunks + in_stage;
      if (in_stage >= stream.chunks || chunk >= stream.k_blocks) return;
      use(chunk, in_stage, round * blocks_ + i);
    }
  }

 private:
  friend class ScaleQueue;
  StageShares shares_;
  int blocks_;  // of a stage
  int group_, part_, team_;
};

// A warp's weight scales, tile after tile in the order of use: 32 at a time, one a lane, read 32 ahead.
class ScaleQueue {
 public:
  // find(tile number) gives the expert and the row of a tile's weights, an expert of -1 after the last one.
  struct Place {
    int expert, row;
  };
  template <class Find>
  DEVICE ScaleQueue(const WeightStream& stream, const WarpShare& share, const Find& find)
      : tile_blocks_(share.shares_.blocks_of_tile(stream.chunks, stream.steps)), batch_(32 / tile_blocks_) {
    now_ = load(stream, share, find, 0);
    next_ = load(stream, share, find, batch_);
  }
  // Goes on to the next tile, number `tile`.
  template <class Find>
  DEVICE void advance(const WeightStream& stream, const WarpShare& share, const Find& find, int tile) {
    if (++in_batch_ < batch_) return;
    in_batch_ = 0;
    now_ = next_;
    next_ = load(stream, share, find, tile + batch_);
  }
  DEVICE float at(int block) const { return __shfl_sync(~0u, now_, in_batch_ * tile_blocks_ + block); }

 private:
  template <class Find>
  DEVICE float load(const WeightStream& stream, const WarpShare& share, const Find& find, int first) const {
    const int lane = threadIdx.x % 32, in_batch = lane / tile_blocks_, block = lane - in_batch * tile_blocks_;
    if (in_batch >= batch_) return 0.f;
    const int tile = first + in_batch, round = block / share.blocks_;
    const int step = share.first_step(tile * stream.steps) + round * StageShares::kTeams;
    const int in_stage = share.part_ + (block - round * share.blocks_) * share.shares_.split;
    const int chunk = step * stream.chunks + in_stage;
    if (step >= stream.steps || in_stage >= stream.chunks || chunk >= stream.k_blocks) return 0.f;
    const Place place = find(tile);
    if (place.expert < 0) return 0.f;
    return __ldg(stream.scale + (int64_t(place.expert) * (stream.rows / 128) + place.row / 128) * stream.k_blocks +
                 chunk);
  }

  int tile_blocks_, batch_;  // blocks of this warp in a tile; tiles whose blocks are held at a time
  int in_batch_ = 0;
  float now_, next_;
};

// MxFp8: the words of this lane's first row of a group of 16 in a stage; those of its other row are 8 rows on.
template <bool kMx>
DEVICE const uint32_t* stage_words(const WeightStream& s, const uint8_t* ring, int stage, int group) {
  if constexpr (!kMx) return nullptr;
  const int row = group * 16 + threadIdx.x % 32 / 4;
  return reinterpret_cast<const uint32_t*>(ring + s.mx_scales_of_stage(stage)) + row * s.chunks;
}

// Arrivals that fill a stage: the thread that asks for boxes, with MxFp8 every lane of its warp for its scales too.
template <bool kMx>
inline constexpr int kFullArrivals = kMx ? 33 : 1;

// With MxFp8 in the place of ScaleQueue: the words come with their stage.
struct NoScaleQueue {
  template <class Find>
  DEVICE NoScaleQueue(const WeightStream&, const WarpShare&, const Find&) {}
  template <class Find>
  DEVICE void advance(const WeightStream&, const WarpShare&, const Find&, int) {}
};

using DecodeGemm1Kernel = void (*)(CUtensorMap, DecodeGemm1Parameters);
using DecodeGemm2Kernel = void (*)(CUtensorMap, DecodeGemm2Parameters);
// token_tiles: of 8 tokens, 1 or 2; value_bytes: of the tokens in shared memory, kHalfBytes with one tile only.
DecodeGemm1Kernel FindDecodeGemm1(int token_tiles, bool mx, int value_bytes);
DecodeGemm2Kernel FindDecodeGemm2(int token_tiles, bool mx, int value_bytes);

// use(token tiles, whether MxFp8, bytes of a value), as constants.
template <class Use>
auto find_decode_kernel(int token_tiles, bool mx, int value_bytes, const Use& use) {
  const auto of_format = [&](auto is_mx) {
    if (token_tiles == 2)
      return use(std::integral_constant<int, 2>(), is_mx, std::integral_constant<int, kCodeBytes>());
    const std::integral_constant<int, 1> one;
    return value_bytes == kHalfBytes ? use(one, is_mx, std::integral_constant<int, kHalfBytes>())
                                     : use(one, is_mx, std::integral_constant<int, kCodeBytes>());
  };
  return mx ? of_format(std::true_type()) : of_format(std::false_type());
}

inline constexpr int kDecodeQuantizeThreads = 128;  // a warp a block of 128
__global__ void decode_quantize(const __grid_constant__ DecodeQuantizeParameters p);
__global__ void decode_quantize_mx(const __grid_constant__ DecodeQuantizeParameters p);

}  // namespace jax_moe::cuda
