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

// All tokens to e4m3 [k_blocks][T][128], swizzled, with their scales, by the math warps. 16 lanes a block of 128.
template <int kTokenTiles>
DEVICE void quantize_tokens(const DecodeGemm1Parameters& p, uint32_t x, float* x_scale) {
  constexpr int kInFlight = 4, kBlocksPerRound = kDecodeMathThreads / 16;
  const int k_blocks = p.stream.k_blocks, num_blocks = p.num_tokens * k_blocks;
  const int piece = threadIdx.x % 16;
  const uint4* from = static_cast<const uint4*>(p.x) + piece;
  for (int base = threadIdx.x / 32 * 2; base < num_blocks; base += kInFlight * kBlocksPerRound) {
    const int first = base + threadIdx.x % 32 / 16;
    uint4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int block = first + i * kBlocksPerRound;
      v[i] = block < num_blocks ? __ldg(from + int64_t(block) * 16) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (base + i * kBlocksPerRound >= num_blocks) break;
      const int block = first + i * kBlocksPerRound;
      float scale;
      const uint2 codes = quantize_bf16(v[i], scale);
      if (block >= num_blocks) continue;
      const int token = block / k_blocks, chunk = block - token * k_blocks;
      store_shared_v2(x + (chunk * p.num_tokens + token) * 128 + ((piece / 2 ^ (token & 7)) << 4) + piece % 2 * 8,
                      codes);
      if (piece == 0) x_scale[chunk * kTokenTiles * 8 + token] = scale;
    }
  }
}

// The same for tokens that are e4m3 already.
template <int kTokenTiles>
DEVICE void copy_tokens(const DecodeGemm1Parameters& p, uint32_t x, float* x_scale) {
  const int k_blocks = p.stream.k_blocks;
  for (int i = threadIdx.x; i < p.num_tokens * k_blocks * 8; i += kDecodeMathThreads) {
    const int token = i / (k_blocks * 8), piece = i - token * k_blocks * 8, chunk = piece / 8;
    store_shared_v4(x + (chunk * p.num_tokens + token) * 128 + ((piece % 8 ^ (token & 7)) << 4),
                    __ldg(static_cast<const uint4*>(p.x) + i));
  }
  for (int i = threadIdx.x; i < p.num_tokens * k_blocks; i += kDecodeMathThreads) {
    const int token = i / k_blocks, chunk = i - token * k_blocks;
    x_scale[chunk * kTokenTiles * 8 + token] = __ldg(p.x_scale + chunk * p.block_stride + token * p.token_stride);
  }
}

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
  const ActiveExperts& experts = fixed.experts;
  const int num_tiles = experts.count * p.num_tiles;
  RingCursor at;
  float scales, next_scales = 0.f;
  const auto load_scales = [&](int t) {
    const Tile tile = tile_at(p, experts, t, gated);
    next_scales = load_step_scales(s, tile.expert, group == 0 ? tile.first : tile.second, kParts, part, 0);
  };
  if (int(blockIdx.x) < num_tiles) load_scales(blockIdx.x);
  if (p.x_is_bf16)
    quantize_tokens<kTokenTiles>(p, x, x_scale);
  else
    copy_tokens<kTokenTiles>(p, x, x_scale);
  // Arrivals: all math threads and the warp that lists the tokens. Publishes both.
  named_barrier_sync(kTokensBarrier, kDecodeMathThreads + 32);
  int buffer = 0;
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x, buffer ^= 1) {
    scales = next_scales;
    if (t + int(gridDim.x) < num_tiles) load_scales(t + gridDim.x);
    float sums[kTokenTiles][4] = {};
    for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
      const int in_stage = chunk_in_stage(kParts, part, 0, step, s), chunk = step * s.chunks + in_stage;
      fixed.ring.wait_full(at);
      if (in_stage < s.chunks && chunk < s.k_blocks) {
        float product[kTokenTiles][4];
        multiply_chunk(product, ring + at.stage * s.stage_bytes + (group * s.chunks + in_stage) * 2048,
                       x + chunk * p.num_tokens * 128, p.num_tokens - 1);
        const float scale = __shfl_sync(~0u, scales, step);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const float2 t_s = *reinterpret_cast<const float2*>(x_scale + (chunk * kTokenTiles + n) * 8 + lane % 4 * 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] += scale * (i % 2 ? t_s.y : t_s.x) * product[n][i];
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
__global__ void __launch_bounds__(kDecodeGemm1Threads, 1)
    decode_gemm1(const __grid_constant__ CUtensorMap map, const __grid_constant__ DecodeGemm1Parameters p) {
  uint8_t* memory = dynamic_shared_memory();
  const DecodeGemm1Layout layout(p.stream.stages * p.stream.stage_bytes, p.stream.k_blocks, p.num_tokens, kTokenTiles);
  Fixed& fixed = *reinterpret_cast<Fixed*>(memory + layout.fixed);
  const bool gated = p.stream.rows != p.intermediate;
  const int num_slots = p.num_tokens * p.top_k, warp = threadIdx.x / 32;
  if (threadIdx.x == kProducerThread) {
    prefetch_tensor_map(&map);
    fixed.ring.initialize(1, kDecodeWarps);
  }
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();  // NOTE: after the wait, so that what came before this kernel is complete for the next one
  if (warp == kProducerThread / 32) {
    int expert[kSlotsPerLane], ranks[kSlotsPerLane];
    load_slot_experts(p.slots, num_slots, expert);
    fixed.experts.build(expert, num_slots, ranks);
    named_barrier_arrive(kExpertsBarrier, kDecodeMathThreads + 32);
    if (threadIdx.x == kProducerThread) produce(fixed, smem_address(memory), &map, p, gated);
  } else if (warp == kListThread / 32) {
    fixed.active.build(p.slots, {}, false, p.num_tokens, p.top_k);
    named_barrier_arrive(kTokensBarrier, kDecodeMathThreads + 32);
  } else {
    // Arrivals: all math threads and the producer's warp. Publishes the experts.
    named_barrier_sync(kExpertsBarrier, kDecodeMathThreads + 32);
    multiply<kTokenTiles>(fixed, smem_address(memory), smem_address(memory + layout.x),
                          reinterpret_cast<float*>(memory + layout.x_scale),
                          reinterpret_cast<float*>(memory + layout.partial), p, gated);
  }
}

}  // namespace

DecodeGemm1Kernel FindDecodeGemm1() { return decode_gemm1<kMaxDecodeTokens / 8>; }

}  // namespace jax_moe::cuda
