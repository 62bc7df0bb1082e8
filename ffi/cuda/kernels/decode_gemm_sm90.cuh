// Decode: a call of few tokens as kernels that do little but read weights. Weight rows are the M side of the matrix
// product and all tokens its N side, so weights read once serve every token that needs them. They come through a ring
// of TMA boxes; e4m3 codes are widened to f16, which is exact, and summed in float32. decode_gemm1: tiles of 16 up and
// 16 gate rows (or 32 rows), h = activation, float32, a row a slot. decode_quantize: h to e4m3. decode_gemm2: slices of
// output columns.
#pragma once
#include "activation.cuh"
#include "active_experts.cuh"
#include "decode_fragment.cuh"
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
  StageShares shares;  // of math warps
  int stage_blocks;    // of a stage, that a warp multiplies
  int tile_blocks;     // of a tile
  int expert_y, expert_z;
  int stages;            // of the ring
  uint32_t stage_bytes;  // a multiple of 1024

  // DeepSeekFp8: the scales of the 128 rows of an expert that have this one.
  DEVICE const float* scale_of(int expert, int row) const {
    return scale + (int64_t(expert) * (rows / 128) + row / 128) * k_blocks;
  }
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
  float* scales;  // [T * K, scale_pitch]
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

// n / d, of numbers below 2^20, by a few instructions.
DEVICE int divide(int n, int d) { return int((float(n) + .5f) * approximate_reciprocal(float(d))); }

// Position in a ring whose number of stages is known at run time.
class RingCursor {
 public:
  DEVICE int stage() const { return stage_; }
  DEVICE uint32_t parity() const { return parity_; }
  DEVICE void advance(int stages, int by = 1) {  // by at most `stages`
    stage_ += by;
    if (stage_ >= stages) {
      stage_ -= stages;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// A math warp's part of the stages. Its tiles are all, of which it has some of the steps, or, of tiles that are one
// stage each, those that are its team's.
class WarpShare {
 public:
  DEVICE WarpShare(const WeightStream& stream, bool whole_tiles)
      : teams_(stream.shares.teams), split_(stream.shares.split) {
    const int warp = threadIdx.x / 32, of_group = divide(warp, stream.shares.groups);
    // NOTE: from one lane: the compiler knows then that all have the same, and keeps what follows in uniform registers.
    group_ = __shfl_sync(~0u, warp & (stream.shares.groups - 1), 0);
    part_ = __shfl_sync(~0u, of_group & (split_ - 1), 0);
    team_ = __shfl_sync(~0u, divide(of_group, split_), 0);
    first_tile_ = __shfl_sync(~0u, whole_tiles ? team_ : 0, 0);
    tile_step_ = __shfl_sync(~0u, whole_tiles ? teams_ : 1, 0);
  }
  DEVICE int group() const { return group_; }
  DEVICE int teams() const { return teams_; }
  DEVICE int team() const { return team_; }

  // The number, among all tiles of the CTA, of this warp's first, and from one to the next.
  DEVICE int first_tile() const { return first_tile_; }
  DEVICE int tile_step() const { return tile_step_; }
  // Of a tile of this warp whose first stage is number `stage` of all: the first of its steps that is this warp's. The
  // next one is `teams` later.
  DEVICE int first_step(int stage) const { return (team_ - stage) & (teams_ - 1); }

  // Calls use(K block, its place in the stage) for this warp's blocks of the stage at `step`.
  template <class Use>
  DEVICE void for_blocks(const WeightStream& stream, int step, const Use& use) const {
    const int first = step * stream.chunks, count = min(stream.chunks, stream.k_blocks - first);
#pragma unroll 1
    for (int in_stage = part_; in_stage < count; in_stage += split_) use(first + in_stage, in_stage);
  }
  // The same where a warp has one of a stage at most.
  template <class Use>
  DEVICE void for_block(const WeightStream& stream, int step, const Use& use) const {
    const int chunk = step * stream.chunks + part_;
    if (part_ < stream.chunks && chunk < stream.k_blocks) use(chunk, part_);
  }

 private:
  friend class ScaleQueue;
  int teams_, split_;
  int group_, part_, team_, first_tile_, tile_step_;
};

// A math warp's stages: `teams` apart, whatever tiles they are of.
class WarpStages {
 public:
  DEVICE explicit WarpStages(const WeightStream& stream, const WarpShare& share)
      : step_(share.first_step(share.first_tile() * stream.steps)) {
    at_.advance(stream.stages, share.team());
  }
  // Calls use(stage of the ring, step) for each of a tile of this warp's, when it has landed, and gives it back.
  template <class Use>
  DEVICE void for_tile(const WeightStream& stream, const WarpShare& share, const PipelineBarriers<kMaxRingStages>& ring,
                       const Use& use) {
    for (; step_ < stream.steps; step_ += share.teams()) {
      ring.wait_full(at_);
      use(at_.stage(), step_);
      __syncwarp();
      if (threadIdx.x % 32 == 0) ring.release(at_);
      at_.advance(stream.stages, share.teams());
    }
    step_ -= stream.steps * share.tile_step();
  }
  // Whether the tile to come has a step of this warp's.
  DEVICE bool has_part(const WeightStream& stream) const { return step_ < stream.steps; }

 private:
  RingCursor at_;
  int step_;
};

// A warp's weight scales, tile after tile of its own in the order of use: 32 at a time, a lane a scale, 32 ahead.
// NOTE: by cp.async: who waited for one of them in a register would wait for everything that is loaded meanwhile.
struct WarpScales {
  float scale[2][32];
};
class ScaleQueue {
 public:
  // find(number of a CTA's tile) gives the expert and the row of its weights, an expert of -1 after the last one.
  struct Place {
    int expert, row;
  };
  template <class Find>
  DEVICE ScaleQueue(const WeightStream& stream, const WarpShare& share, const Find& find, uint32_t memory)
      : tile_blocks_(stream.tile_blocks), batch_(divide(32, tile_blocks_)), at_(memory), other_(memory + 128) {
    ask(stream, share, find, 0, at_);
    ask(stream, share, find, batch_, other_);
  }
  // Before the first use.
  DEVICE void wait() const {
    cp_async_wait<1>();
    __syncwarp();
  }
  // Of the present tile.
  DEVICE float at(int block) const { return load_shared_f32(at_ + (first_ + block) * 4); }
  // Goes on to the next tile, number `tile` of this warp's.
  template <class Find>
  DEVICE void advance(const WeightStream& stream, const WarpShare& share, const Find& find, int tile) {
    first_ += tile_blocks_;
    if (first_ < tile_blocks_ * batch_) return;
    first_ = 0;
    const uint32_t read = at_;
    at_ = other_, other_ = read;
    cp_async_wait<0>();  // asked for a batch ago
    __syncwarp();
    ask(stream, share, find, tile + batch_, other_);
  }
  DEVICE void finish() const { cp_async_wait<0>(); }

 private:
  template <class Find>
  DEVICE void ask(const WeightStream& stream, const WarpShare& share, const Find& find, int first, uint32_t to) const {
    const int lane = threadIdx.x % 32, in_batch = divide(lane, tile_blocks_), block = lane - in_batch * tile_blocks_;
    const int round = divide(block, stream.stage_blocks);
    const int tile = share.first_tile() + (first + in_batch) * share.tile_step();
    const int step = share.first_step(tile * stream.steps) + round * share.teams_;
    const int in_stage = share.part_ + (block - round * stream.stage_blocks) * share.split_;
    const int chunk = step * stream.chunks + in_stage;
    if (in_batch < batch_ && step < stream.steps && in_stage < stream.chunks && chunk < stream.k_blocks)
      if (const Place place = find(tile); place.expert >= 0)
        cp_async_4(to + lane * 4, stream.scale_of(place.expert, place.row) + chunk);
    cp_async_commit();
  }

  int tile_blocks_, batch_;  // blocks of this warp in a tile; tiles whose blocks are held at a time
  uint32_t at_, other_;      // the present batch, and the one on its way
  int first_ = 0;            // of those of the batch, the present tile's
};

// With MxFp8 in its place: the words come with their stage.
struct NoScaleQueue {
  template <class Find>
  DEVICE NoScaleQueue(const WeightStream&, const WarpShare&, const Find&, uint32_t) {}
  template <class Find>
  DEVICE void advance(const WeightStream&, const WarpShare&, const Find&, int) {}
  DEVICE void wait() const {}
  DEVICE void finish() const {}
};

// Where this thread reads what it multiplies with: what is the same for all tiles, once.
template <int kTokenTiles, bool kMx, int kValueBytes>
struct LaneAddresses {
  uint32_t rows;                    // of its warp's group in stage 0 of the ring
  uint32_t words;                   // MxFp8: those of its first row there; those of its other one are 8 rows on
  uint32_t tokens[kTokenTiles];     // from the first token
  uint32_t scales[kTokenTiles][2];  // of its two tokens of a tile

  // Rows of 16 begin `group_bytes` apart; tokens and their scales are at `tokens_at` and `scales_at`.
  DEVICE LaneAddresses(const WeightStream& s, const WarpShare& share, uint32_t ring, uint32_t group_bytes,
                       uint32_t tokens_at, uint32_t scales_at, int num_tokens) {
    const int lane = threadIdx.x % 32;
    rows = ring + share.group() * group_bytes + lane_rows();
    hold(rows);
    words = ring + s.mx_scales_of_stage(0) + (share.group() * 16 + lane / 4) * s.chunks * 4;
    if constexpr (kMx) hold(words);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      tokens[n] = tokens_at + lane_tokens(n, token_pitch(s.k_blocks, kValueBytes), num_tokens - 1);
      hold(tokens[n]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales[n][i] = scales_at + min(n * 8 + lane % 4 * 2 + i, num_tokens - 1) * scale_pitch(s.k_blocks, kMx) * 4;
        hold(scales[n][i]);
      }
    }
  }
  // Of a K block: where the tokens begin. The offset, in bytes, is that of further ones.
  DEVICE void find_tokens(int chunk, uint32_t offset, uint32_t (&at)[kTokenTiles]) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) at[n] = tokens[n] + offset + chunk * (128 * kValueBytes);
  }
  // Their scales.
  DEVICE void find_scales(int chunk, uint32_t offset, float (&scale)[kTokenTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[n][i] = load_shared_f32(scales[n][i] + offset + chunk * 4);
    }
  }
  // With MxFp8: the factors of the tokens, and the words of this thread's two rows, of a stage and a K block in it.
  DEVICE MxFactors<kTokenTiles> find_factors(const WeightStream& s, int stage, int chunk, int in_stage,
                                             uint32_t offset) const {
    MxFactors<kTokenTiles> found;
    const uint32_t from = words + stage * mx_stage_bytes(s.stage_bytes);
    found.rows[0] = load_shared_u32(from + in_stage * 4);
    found.rows[1] = load_shared_u32(from + (8 * s.chunks + in_stage) * 4);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) found.tokens[n][i] = load_shared_v4(scales[n][i] + offset + chunk * 16);
    }
    return found;
  }
};

// With MxFp8 warps of their own bring the scales of weights, one stage after the other in turns. NOTE: it takes some
// dozens of instructions a stage; by the warp that asks for boxes these would come later than the memory could bring
// them, above all the first of them.
class ScaleTurns {
 public:
  // Calls load(stage, its full barrier) if the next stage of the ring is this warp's, once it is empty; goes on.
  template <class Load>
  DEVICE void next(const PipelineBarriers<kMaxRingStages>& ring, int stages, const Load& load) {
    if (turn_ == 0) {
      ring.wait_empty(at_);
      load(at_.stage(), ring.full_address(at_.stage()));
    }
    turn_ = turn_ == 0 ? kScaleWarps - 1 : turn_ - 1;
    at_.advance(stages);
  }

 private:
  RingCursor at_;
  int turn_ = (int(threadIdx.x) - kDecodeMathThreads) / 32 - 2;  // stages until this warp's next
};

// Arrivals that fill a stage: the thread that asks for boxes, with MxFp8 every lane of the warp that asks for scales.
template <bool kMx>
inline constexpr int kFullArrivals = kMx ? 33 : 1;

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
