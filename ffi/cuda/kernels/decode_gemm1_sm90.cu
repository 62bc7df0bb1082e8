// GEMM1 of a small call. One warp finds the active experts and streams their weights, one lists their rows; sixteen
// quantise the tokens once, then multiply: each takes the up or the gate rows and another 128 of K of every stage, and
// their sums meet in shared memory at a tile's end.
#include "decode_fragment.cuh"
#include "decode_gemm_sm90.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kExpertsBarrier = 1, kTokensBarrier = 2, kMathBarrier = 3;
constexpr int kProducerThread = kDecodeMathThreads, kListThread = kDecodeMathThreads + 32;
constexpr int kParts = kDecodeWarps / 2;  // warps that share the rows of a group

struct Fixed {
  PipelineBarriers<kMaxRingStages> ring;
  ActiveExperts experts;  // the producer's
  ActiveTokens active;
};
static_assert(sizeof(Fixed) <= kDecodeFixedBytes, "its place in shared memory");

struct Tile {  // 16 rows from `first` on and 16 from `second` on: up and gate, or neighbours
  int a, expert, index, first, second;
};

DEVICE Tile tile_at(const DecodeGemm1Parameters& p, const ActiveExperts& experts, int t, bool gated) {
  const int a = t / p.num_tiles, index = t - a * p.num_tiles, first = index * (gated ? 16 : 32);
  return {a, experts.expert[a], index, first, first + (gated ? p.intermediate : 16)};
}

// By one thread.
DEVICE void produce(Fixed& fixed, uint32_t ring, const CUtensorMap* map, const DecodeGemm1Parameters& p, bool gated) {
  const WeightStream& s = p.stream;
  RingCursor at;
  const int num_tiles = fixed.experts.count * p.num_tiles;
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x) {
    const Tile tile = tile_at(p, fixed.experts, t, gated);
    const int y = tile.expert * s.expert_y, z = tile.expert * s.expert_z;
    for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
      fixed.ring.wait_empty(at);
      const uint32_t full = fixed.ring.full_address(at.stage), to = ring + at.stage * s.stage_bytes;
      mbarrier_arrive_expect(full, s.stage_bytes);
      tma_load_3d(to, map, 0, y + tile.first, z + step * s.chunks, full);
      tma_load_3d(to + s.stage_bytes / 2, map, 0, y + tile.second, z + step * s.chunks, full);
    }
  }
}

// The call's tokens on their way into shared memory, in 16-byte pieces, by the math threads.
// NOTE: the first pieces are asked for before anything else: behind the weights they would wait for a whole ring of
// them.
class TokenLoader {
 public:
  DEVICE TokenLoader(const DecodeGemm1Parameters& p, uint32_t codes, float* scales)
      : p_(p), codes_(codes), scales_(scales), per_token_(p.stream.k_blocks * (p.x_is_bf16 ? 16 : 8)) {
    load(threadIdx.x);
    if (p.x_is_bf16) return;
    if (int(threadIdx.x) < p.num_tokens * p.stream.k_blocks) first_scale_ = given_scale(threadIdx.x);
  }

  // To e4m3 rows of token_pitch bytes, and their scales.
  DEVICE void finish() {
    const int count = p_.num_tokens * per_token_;
    // Whole warps stay together: 16 lanes make a block of 128.
    for (int first = threadIdx.x; first - int(threadIdx.x % 32) < count; first += kInFlight * kDecodeMathThreads) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) store(first + i * kDecodeMathThreads, v_[i], count);
      load(first + kInFlight * kDecodeMathThreads);
    }
    if (p_.x_is_bf16) return;
    for (int i = threadIdx.x; i < p_.num_tokens * p_.stream.k_blocks; i += kDecodeMathThreads)
      scales_[i / p_.stream.k_blocks * scale_pitch(p_.stream.k_blocks) + i % p_.stream.k_blocks] =
          i < kDecodeMathThreads ? first_scale_ : given_scale(i);
  }

 private:
  static constexpr int kInFlight = 4;

  DEVICE void load(int first) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int piece = first + i * kDecodeMathThreads;
      v_[i] =
          piece < p_.num_tokens * per_token_ ? __ldg(static_cast<const uint4*>(p_.x) + piece) : make_uint4(0, 0, 0, 0);
    }
  }
  DEVICE float given_scale(int i) const {
    const int token = i / p_.stream.k_blocks, chunk = i - token * p_.stream.k_blocks;
    return __ldg(p_.x_scale + chunk * p_.block_stride + token * p_.token_stride);
  }
  DEVICE void store(int piece, const uint4& v, int count) {
    if (piece - int(threadIdx.x % 32) >= count) return;
    const int token = piece / per_token_, in_token = piece - token * per_token_;
    const uint32_t row = codes_ + token * token_pitch(p_.stream.k_blocks);
    if (!p_.x_is_bf16) {
      if (piece < count) store_shared_v4(row + in_token * 16, v);
      return;
    }
    float scale;
    const uint2 codes = quantize_bf16(v, scale);
    if (piece >= count) return;
    store_shared_v2(row + in_token * 8, codes);
    if (in_token % 16 == 0) scales_[token * scale_pitch(p_.stream.k_blocks) + in_token / 16] = scale;
  }

  const DecodeGemm1Parameters& p_;
  uint32_t codes_;
  float* scales_;
  int per_token_;
  uint4 v_[kInFlight];
  float first_scale_ = 0.f;
};

// Sums the warps' parts of a tile in their order, applies the activation and stores h.
template <int kTokenTiles>
DEVICE void finish_tile(const DecodeGemm1Parameters& p, const ActiveTokens& active, const Tile& tile,
                        const float* partial) {
  with_activation(p.activation, tile.expert, [&](const auto& function) {
    constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
    constexpr int kColumns = kGated ? 16 : 32;
    for (int i = threadIdx.x; i < p.num_tokens * kColumns; i += kDecodeMathThreads) {
      const int column = i % kColumns, token = i / kColumns;
      if (!active.names(tile.a, token)) continue;
      const float* from = partial + token / 8 * 128 + fragment_index(stored_row(column % 16, p.shuffled), token % 8);
      const auto sum_of_group = [&](int group) {
        float sum = 0.f;
#pragma unroll
        for (int part = 0; part < kParts; ++part) sum += from[(part * 2 + group) * kTokenTiles * 128];
        return sum;
      };
      float result;
      if constexpr (kGated)
        result = function(sum_of_group(1), sum_of_group(0));
      else
        result = function(sum_of_group(column / 16));
      p.h[int64_t(active.slot[tile.a][token]) * p.intermediate + tile.index * kColumns + column] = result;
    }
  });
}

template <int kTokenTiles>
DEVICE void multiply(Fixed& fixed, uint32_t ring, uint32_t x, float* x_scale, float* partial,
                     const DecodeGemm1Parameters& p, bool gated) {
  const WeightStream& s = p.stream;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % 2, part = warp / 2;
  TokenLoader tokens(p, x, x_scale);
  // Arrivals: all math threads and the producer's warp. Publishes the experts.
  named_barrier_sync(kExpertsBarrier, kDecodeMathThreads + 32);
  const ActiveExperts& experts = fixed.experts;
  const int num_tiles = experts.count * p.num_tiles;
  RingCursor at;
  float scales, next_scales = 0.f;
  int turn = 0;  // of the warps: see chunk_in_stage
  const auto load_scales = [&](int t, int its_turn) {
    const Tile tile = tile_at(p, experts, t, gated);
    next_scales = load_step_scales(s, tile.expert, group == 0 ? tile.first : tile.second, kParts, part, its_turn);
  };
  if (int(blockIdx.x) < num_tiles) load_scales(blockIdx.x, 0);
  tokens.finish();
  // Arrivals: all math threads and the warp that lists the tokens. Publishes both.
  named_barrier_sync(kTokensBarrier, kDecodeMathThreads + 32);
  const float* token_scale[kTokenTiles][2];  // of this thread's two columns of a tile
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      token_scale[n][i] = x_scale + min(n * 8 + lane % 4 * 2 + i, p.num_tokens - 1) * scale_pitch(s.k_blocks);
  }
  int buffer = 0;
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x, buffer ^= 1, turn += s.k_blocks) {
    scales = next_scales;
    if (t + int(gridDim.x) < num_tiles) load_scales(t + gridDim.x, turn + s.k_blocks);
    float sums[kTokenTiles][4] = {};
    for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
      const int in_stage = chunk_in_stage(kParts, part, turn, step, s), chunk = step * s.chunks + in_stage;
      fixed.ring.wait_full(at);
      if (in_stage < s.chunks && chunk < s.k_blocks) {
        float product[kTokenTiles][4];
        multiply_chunk(product, ring + at.stage * s.stage_bytes + (group * s.chunks + in_stage) * 2048, x + chunk * 128,
                       token_pitch(s.k_blocks), p.num_tokens - 1);
        const float scale = __shfl_sync(~0u, scales, step);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] += scale * token_scale[n][i % 2][chunk] * product[n][i];
        }
      }
      __syncwarp();
      if (lane == 0) fixed.ring.release(at);
    }
    float* parts = partial + buffer * (kDecodeWarps * kTokenTiles * 128);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
      reinterpret_cast<float4*>(parts)[(warp * kTokenTiles + n) * 32 + lane] =
          make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    // Arrivals: all math threads. Publishes the parts; those of the tile before last have been read by now.
    named_barrier_sync(kMathBarrier, kDecodeMathThreads);
    finish_tile<kTokenTiles>(p, fixed.active, tile_at(p, experts, t, gated), parts);
  }
}

template <int kTokenTiles>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_gemm1(const __grid_constant__ CUtensorMap map, const __grid_constant__ DecodeGemm1Parameters p) {
  uint8_t* memory = dynamic_shared_memory();
  const DecodeGemm1Layout layout(p.stream.stages * p.stream.stage_bytes, p.stream.k_blocks, p.num_tokens, kTokenTiles);
  Fixed& fixed = *reinterpret_cast<Fixed*>(memory + layout.fixed);
  const bool gated = p.stream.rows != p.intermediate;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == kProducerThread) {
    prefetch_tensor_map(&map);
    fixed.ring.initialize(1, kDecodeWarps);
  }
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();  // NOTE: after the wait, so that what came before this kernel is complete for the next one
  if (warp == kProducerThread / 32) {
    int expert[kSlotsPerLane], ranks[kSlotsPerLane];
    load_slot_experts(p.slots, p.num_tokens * p.top_k, expert);
    fixed.experts.build(expert, ranks);
    named_barrier_arrive(kExpertsBarrier, kDecodeMathThreads + 32);
    if (threadIdx.x == kProducerThread) produce(fixed, smem_address(memory), &map, p, gated);
  } else if (warp == kListThread / 32) {
    fixed.active.build(p.slots, {}, false, p.num_tokens, p.top_k);
    named_barrier_arrive(kTokensBarrier, kDecodeMathThreads + 32);
  } else {
    multiply<kTokenTiles>(fixed, smem_address(memory), smem_address(memory + layout.x),
                          reinterpret_cast<float*>(memory + layout.x_scale),
                          reinterpret_cast<float*>(memory + layout.partial), p, gated);
  }
}

}  // namespace

DecodeGemm1Kernel FindDecodeGemm1(int token_tiles) { return token_tiles == 1 ? decode_gemm1<1> : decode_gemm1<2>; }

}  // namespace jax_moe::cuda
