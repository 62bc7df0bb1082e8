// GEMM1 of a small call. One warp finds the active experts and streams their weights. Sixteen quantise the tokens once,
// then multiply, each its share of a tile, up rows or gate rows. One lists the tokens of the experts, then adds up the
// shares of every tile and finishes it, while the others are at the next.
#include "decode_gemm_sm90.cuh"
#include "decode_tokens.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kExpertsBarrier = 1, kTokensBarrier = 2, kScalesBarrier = 3;
constexpr int kProducerThread = kDecodeMathThreads, kFinishThread = kDecodeMathThreads + 32;

struct Fixed {
  PipelineBarriers<kMaxRingStages> ring;
  PipelineBarriers<kTileBuffers> sums;  // full: all shares of a tile are there; empty: the finishing warp has read them
  PipelineBarriers<1> tokens;           // full: fresh tokens have landed
  ActiveExperts experts;                // the producer's
  ActiveTokens active;
  WarpScales scales[kDecodeWarps];
};
static_assert(sizeof(Fixed) <= kDecodeFixedBytes, "its place in shared memory");

struct Tile {  // 16 rows from `first` on and 16 from `second` on: up and gate, or neighbours
  int a, expert, index, first, second;
};

// `apart`: up rows are before all gate rows. Where they take turns, neighbours have both.
DEVICE Tile tile_at(const DecodeGemm1Parameters& p, const ActiveExperts& experts, int t, bool apart) {
  const int a = divide(t, p.num_tiles), index = t - a * p.num_tiles, first = index * (apart ? 16 : 32);
  return {a, experts.expert[a], index, first, first + (apart ? p.intermediate : 16)};
}

// By one thread.
DEVICE void produce(Fixed& fixed, uint32_t ring, const CUtensorMap* map, const DecodeGemm1Parameters& p, bool apart) {
  const WeightStream& s = p.stream;
  RingCursor at;
  const int num_tiles = fixed.experts.count * p.num_tiles;
  const uint64_t policy = evict_first_policy();
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x) {
    const Tile tile = tile_at(p, fixed.experts, t, apart);
    const int y = tile.expert * s.expert_y, z = tile.expert * s.expert_z;
    for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
      fixed.ring.wait_empty(at);
      const uint32_t full = fixed.ring.full_address(at.stage()), to = ring + at.stage() * s.stage_bytes;
      mbarrier_arrive_expect(full, s.stage_bytes);
      tma_load_3d(to, map, 0, y + tile.first, z + step * s.chunks, full, policy);
      tma_load_3d(to + s.stage_bytes / 2, map, 0, y + tile.second, z + step * s.chunks, full, policy);
    }
  }
}

// MxFp8: by the scale warps.
DEVICE void produce_scales(Fixed& fixed, uint32_t ring, const DecodeGemm1Parameters& p, bool apart) {
  const WeightStream& s = p.stream;
  const int num_tiles = fixed.experts.count * p.num_tiles;
  MxScaleLoader<1> scales(p.mx, kDecodeGemm1Rows, s.chunks);
  ScaleTurns turns;
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x) {
    const Tile tile = tile_at(p, fixed.experts, t, apart);
    scales.place([&](int r) { return r < 16 ? tile.first + r : tile.second + r - 16; });
    for (int step = 0; step < s.steps; ++step)
      turns.next(fixed.ring, s.stages, [&](int stage, uint32_t full) {
        scales.load(ring + s.mx_scales_of_stage(stage), tile.expert, step * s.chunks, full);
      });
  }
  finish_mx_scales();
}

// Shuffled rows of MxFp8: this lane's rows of a tile, one from each 8, are neighbours, gated ones two columns' up and
// gate rows in turns. `to` is at the tile's first column.
template <class Function>
DEVICE void store_shuffled_mx(const Function& function, const float (&sums)[2][4], int i, float* to) {
  const int lane = threadIdx.x % 32;
  if constexpr (Function::kGated)
    reinterpret_cast<float2*>(to)[lane / 4] =
        make_float2(function(sums[0][i + 2], sums[0][i]), function(sums[1][i + 2], sums[1][i]));
  else
    reinterpret_cast<float4*>(to)[lane / 4] =
        make_float4(function(sums[0][i]), function(sums[0][i + 2]), function(sums[1][i]), function(sums[1][i + 2]));
}

// By one warp: adds up the shares of every tile in the order of the warps, applies the activation and stores h.
template <int kTokenTiles, bool kMx>
DEVICE void finish(Fixed& fixed, const float* partial, const DecodeGemm1Parameters& p, bool apart) {
  const int lane = threadIdx.x % 32;
  const ActiveTokens& active = fixed.active;
  const int num_tiles = active.experts.count * p.num_tiles;
  PipelineCursor<kTileBuffers> at;
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x, at.advance()) {
    const Tile tile = tile_at(p, active.experts, t, apart);
    fixed.sums.wait_full(at);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      float sums[2][4] = {};  // of the two groups: rows r and r + 8, tokens t and t + 1
      const float4* from =
          reinterpret_cast<const float4*>(partial) + (at.stage() * kDecodeWarps * kTokenTiles + n) * 32 + lane;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float4 v = from[w * kTokenTiles * 32];
        float* sum = sums[w % 2];
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
      with_activation(p.activation, tile.expert, [&](const auto& function) {
        constexpr bool kGated = std::decay_t<decltype(function)>::kGated;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = n * 8 + lane % 4 * 2 + i % 2;
          if (!active.names(tile.a, token)) continue;
          const int row = lane / 4 + i / 2 * 8;  // as stored
          const int column = !kMx && p.shuffled ? plain_row(row) : row;
          float* to = p.h + int64_t(active.slot[tile.a][token]) * p.intermediate + tile.index * (kGated ? 16 : 32);
          if (kMx && p.shuffled) {
            if (i < 2) store_shuffled_mx(function, sums, i, to);
            continue;
          }
          to += column;
          if constexpr (kGated) {
            *to = function(sums[1][i], sums[0][i]);
          } else {
            to[0] = function(sums[0][i]);
            to[16] = function(sums[1][i]);
          }
        }
      });
    }
    fixed.sums.release(at);
  }
}

template <int kTokenTiles, bool kMx, int kValueBytes>
DEVICE void multiply(Fixed& fixed, uint32_t ring, uint32_t x, float* x_scale, const uint32_t* x_words, float* partial,
                     const DecodeGemm1Parameters& p, bool apart) {
  const WeightStream& s = p.stream;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const WarpShare share(s, false);
  TokenLoader<kMx, kValueBytes> tokens(p, x, x_scale);  // of fresh tokens, nothing
  // Arrivals: all math threads and the producer's warp. Publishes the experts.
  named_barrier_sync(kExpertsBarrier, kDecodeMathThreads + 32);
  const int num_tiles = fixed.experts.count * p.num_tiles;
  const auto find = [&](int i) -> ScaleQueue::Place {
    const int t = int(blockIdx.x) + i * int(gridDim.x);
    if (t >= num_tiles) return {-1, 0};
    const Tile tile = tile_at(p, fixed.experts, t, apart);
    return {tile.expert, share.group() == 0 ? tile.first : tile.second};
  };
  std::conditional_t<kMx, NoScaleQueue, ScaleQueue> scales(s, share, find, smem_address(&fixed.scales[warp]));
  if (p.x_is_fresh) {
    fixed.tokens.wait_full(PipelineCursor<1>());
    if constexpr (kMx) make_factors(x_scale, x_words, p);
  } else {
    tokens.finish();
  }
  // Arrivals: all math threads and the finishing warp. Publishes the tokens and who names them.
  named_barrier_sync(kTokensBarrier, kDecodeMathThreads + 32);
  scales.wait();
  const LaneAddresses<kTokenTiles, kMx, kValueBytes> at(s, share, ring, s.chunks * 2048, x, smem_address(x_scale),
                                                        p.num_tokens);
  int number = 0;  // of this CTA's tiles
  WarpStages stages(s, share);
  PipelineCursor<kTileBuffers> sums_at;
  for (int t = blockIdx.x; t < num_tiles; t += gridDim.x, sums_at.advance()) {
    float sums[kTokenTiles][4] = {};
    const uint32_t named = kTokenTiles > 1 ? fixed.active.tokens[divide(t, p.num_tiles)] : 0;
    int block = 0;  // of this warp's in the tile
    stages.for_tile(s, share, fixed.ring, [&](int stage, int step) {
      const uint32_t rows = at.rows + stage * s.stage_bytes;
      share.for_block(s, step, [&](int chunk, int in_stage) {
        uint32_t tokens[kTokenTiles];
        at.find_tokens(chunk, 0, tokens);
        if constexpr (kMx) {
          multiply_mx_chunk<kValueBytes>(sums, rows + in_stage * 2048, tokens,
                                         at.find_factors(s, stage, chunk, in_stage, 0), p.num_tokens == 1);
        } else {
          float token_scale[kTokenTiles][2];
          at.find_scales(chunk, 0, token_scale);
          const float scale = scales.at(block++);
          float product[kTokenTiles][4];
          multiply_named<kValueBytes>(product, named, rows + in_stage * 2048, tokens);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] += scale * token_scale[n][i % 2] * product[n][i];
          }
        }
      });
    });
    scales.advance(s, share, find, ++number);
    fixed.sums.wait_empty(sums_at);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
      reinterpret_cast<float4*>(partial)[((sums_at.stage() * kDecodeWarps + warp) * kTokenTiles + n) * 32 + lane] =
          make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    mbarrier_arrive(fixed.sums.full_address(sums_at.stage()));
  }
  scales.finish();
}

template <int kTokenTiles, bool kMx, int kValueBytes>
__global__ void __launch_bounds__(decode_threads(kMx), 1)
    decode_gemm1(const __grid_constant__ CUtensorMap map, const __grid_constant__ DecodeGemm1Parameters p) {
  uint8_t* memory = dynamic_shared_memory();
  const DecodeGemm1Layout layout(p.stream.ring_bytes<kMx>(), p.stream.k_blocks, p.num_tokens, kTokenTiles, kValueBytes,
                                 kMx);
  Fixed& fixed = *reinterpret_cast<Fixed*>(memory + layout.fixed);
  const bool apart = p.stream.rows != p.intermediate && !(kMx && p.shuffled);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == kProducerThread) {
    prefetch_tensor_map(&map);
    fixed.ring.initialize(kFullArrivals<kMx>, p.stream.shares.warps());
    fixed.sums.initialize(kDecodeMathThreads, 32);
    fixed.tokens.initialize(1, 1);
  }
  __syncthreads();
  // NOTE: where tokens are fresh, only they come from the kernel before: it let this one start when all that came
  // before it, ids too, was complete. Else ids and tokens may be the caller's previous kernel's.
  if (!p.x_is_fresh) {
    wait_for_previous_kernel();
    let_next_kernel_start();  // NOTE: after the wait, so that what came before this kernel is complete for the next one
  }
  if (warp == kProducerThread / 32) {
    int expert[kSlotsPerLane], ranks[kSlotsPerLane];
    load_slot_experts(p.slots, p.num_tokens * p.top_k, expert);
    fixed.experts.build(expert, ranks);
    named_barrier_arrive(kExpertsBarrier, kDecodeMathThreads + 32);
    if constexpr (kMx) named_barrier_arrive(kScalesBarrier, 32 + kScaleWarps * 32);
    if (threadIdx.x == kProducerThread) produce(fixed, smem_address(memory), &map, p, apart);
  } else if (warp == kFinishThread / 32) {
    fixed.active.build(p.slots, {}, nullptr, p.num_tokens, p.top_k);
    named_barrier_arrive(kTokensBarrier, kDecodeMathThreads + 32);
    if (p.x_is_fresh) {
      wait_for_previous_kernel();
      let_next_kernel_start();
      load_tokens(fixed.tokens.full_address(0), smem_address(memory + layout.x),
                  smem_address(memory + (kMx ? layout.x_words : layout.x_scale)), p);
    }
    finish<kTokenTiles, kMx>(fixed, reinterpret_cast<const float*>(memory + layout.partial), p, apart);
  } else if (kMx && warp > kFinishThread / 32) {
    // Arrivals: the producer's warp and these. Publishes the experts.
    named_barrier_sync(kScalesBarrier, 32 + kScaleWarps * 32);
    produce_scales(fixed, smem_address(memory), p, apart);
  } else {
    multiply<kTokenTiles, kMx, kValueBytes>(fixed, smem_address(memory), smem_address(memory + layout.x),
                                            reinterpret_cast<float*>(memory + layout.x_scale),
                                            reinterpret_cast<const uint32_t*>(memory + layout.x_words),
                                            reinterpret_cast<float*>(memory + layout.partial), p, apart);
  }
}

}  // namespace

DecodeGemm1Kernel FindDecodeGemm1(int token_tiles, bool mx, int value_bytes) {
  return find_decode_kernel(token_tiles, mx, value_bytes, [](auto tiles, auto is_mx, auto bytes) -> DecodeGemm1Kernel {
    return decode_gemm1<tiles.value, is_mx.value, bytes.value>;
  });
}

}  // namespace jax_moe::cuda
