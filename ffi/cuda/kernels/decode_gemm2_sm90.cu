// GEMM2 of a small call. A CTA owns a slice of the output's columns and walks all active experts: one warp streams
// their weights, from before GEMM1's end on, one their rows of h; sixteen multiply and keep the weighted sum over
// experts in registers, so that no row of a single expert is ever stored. A warp has its part of every expert, or whole
// experts; the sums of all warps are added in the order of the warps.
#include "decode_gemm_sm90.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kReadyBarrier = 1, kMathBarrier = 2, kScalesBarrier = 3;
constexpr int kProducerThread = kDecodeMathThreads, kRowsThread = kDecodeMathThreads + 32;

struct Fixed {
  PipelineBarriers<kMaxRingStages> ring;
  PipelineBarriers<kMaxHBuffers> h;
  ActiveExperts experts;  // the producer's
  ActiveTokens active;
  WarpScales scales[kDecodeWarps];
};
static_assert(sizeof(Fixed) <= kDecodeFixedBytes, "its place in shared memory");

// By one thread.
DEVICE void produce(Fixed& fixed, uint32_t ring, const CUtensorMap* map, const DecodeGemm2Parameters& p) {
  const WeightStream& s = p.stream;
  RingCursor at;
  const uint64_t policy = evict_first_policy();
  for (int row = blockIdx.x * p.slice_rows; row < p.hidden; row += gridDim.x * p.slice_rows) {
    for (int a = 0; a < fixed.experts.count; ++a) {
      const int expert = fixed.experts.expert[a];
      for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
        fixed.ring.wait_empty(at);
        const uint32_t full = fixed.ring.full_address(at.stage());
        mbarrier_arrive_expect(full, s.stage_bytes);
        tma_load_3d(ring + at.stage() * s.stage_bytes, map, 0, expert * s.expert_y + row,
                    expert * s.expert_z + step * s.chunks, full, policy);
      }
    }
  }
}

// MxFp8: by the scale warps.
DEVICE void produce_scales(Fixed& fixed, uint32_t ring, const DecodeGemm2Parameters& p) {
  const WeightStream& s = p.stream;
  MxScaleLoader<4> scales(p.mx, p.slice_rows, s.chunks);
  ScaleTurns turns;
  for (int row = blockIdx.x * p.slice_rows; row < p.hidden; row += gridDim.x * p.slice_rows) {
    scales.place([&](int r) { return row + r; });
    for (int a = 0; a < fixed.experts.count; ++a)
      for (int step = 0; step < s.steps; ++step)
        turns.next(fixed.ring, s.stages, [&](int stage, uint32_t full) {
          scales.load(ring + s.mx_scales_of_stage(stage), fixed.experts.expert[a], step * s.chunks, full);
        });
  }
  finish_mx_scales();
}

// The rows of h and their scales, expert by expert, by one warp: a lane a token.
template <bool kMx, int kValueBytes>
DEVICE void load_rows(Fixed& fixed, uint32_t h, uint32_t h_scale, const DecodeGemm2Parameters& p) {
  const int lane = threadIdx.x % 32, k_blocks = p.stream.k_blocks, scale_bytes = scale_pitch(k_blocks, kMx) * 4;
  const ActiveTokens& active = fixed.active;
  RingCursor at;
  for (int row = blockIdx.x * p.slice_rows; row < p.hidden; row += gridDim.x * p.slice_rows) {
    for (int a = 0; a < active.experts.count; ++a, at.advance(p.h_buffers)) {
      fixed.h.wait_empty(at);
      __syncwarp();  // NOTE: a lane still waiting would miss the phase that the next fill completes
      const uint32_t full = fixed.h.full_address(at.stage());
      if (lane == 0)
        mbarrier_arrive_expect(full, __popc(active.tokens[a]) * (k_blocks * 128 * kValueBytes + scale_bytes));
      __syncwarp();
      if (!active.names(a, lane)) continue;
      const int slot = active.slot[a][lane];
      bulk_load(h + at.stage() * tokens_bytes(k_blocks, p.num_tokens, kValueBytes) +
                    lane * token_pitch(k_blocks, kValueBytes),
                p.h + int64_t(slot) * k_blocks * 128 * kValueBytes, k_blocks * 128 * kValueBytes, full);
      bulk_load(h_scale + at.stage() * scales_bytes(k_blocks, p.num_tokens, kMx) + lane * scale_bytes,
                p.h_scale + slot * scale_pitch(k_blocks, kMx), scale_bytes, full);
    }
  }
}

// Adds up the warps' shares of a slice in their order and stores it.
template <int kTokenTiles, bool kMx>
DEVICE void store_slice(const DecodeGemm2Parameters& p, int first, const float* partial) {
  const int groups = p.slice_rows / 16;
  for (int i = threadIdx.x; i < groups * kTokenTiles * 128; i += kDecodeMathThreads) {
    const int group = i / (kTokenTiles * 128), in_group = i - group * kTokenTiles * 128;
    float sum = 0.f;
#pragma unroll 8
    for (int w = group; w < kDecodeWarps; w += groups) sum += partial[w * kTokenTiles * 128 + in_group];
    // As mma_m16n8k16_f16 leaves it: four values a lane.
    const int lane = in_group / 4 % 32, token = in_group / 128 * 8 + lane % 4 * 2 + in_group % 2;
    if (token >= p.num_tokens) continue;
    const int row = lane / 4 + in_group / 2 % 2 * 8;
    int column = first + group * 16 + row;
    if (p.shuffled) {
      if constexpr (kMx)
        column += plain_mx_row(column % 32) - column % 32;
      else
        column += plain_row(row) - row;
    }
    p.output[int64_t(token) * p.hidden + column] = uint16_t(to_bf16x2(sum, 0.f));
  }
}

template <int kTokenTiles, bool kMx, int kValueBytes>
DEVICE void multiply(Fixed& fixed, uint32_t ring, uint32_t h, uint32_t h_scale, const float* token_weight,
                     float* partial, const DecodeGemm2Parameters& p) {
  const WeightStream& s = p.stream;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = p.slice_rows / 16;
  const WarpShare share(s, s.steps == 1);
  const ActiveTokens& active = fixed.active;
  const int count = __shfl_sync(~0u, active.experts.count, 0);  // as WarpShare has its own
  const auto find = [&](int i) -> ScaleQueue::Place {
    const int slice = divide(i, max(count, 1)), first = (int(blockIdx.x) + slice * int(gridDim.x)) * p.slice_rows;
    if (count == 0 || first >= p.hidden) return {-1, 0};
    return {active.experts.expert[i - slice * count], first};
  };
  std::conditional_t<kMx, NoScaleQueue, ScaleQueue> scales(s, share, find, smem_address(&fixed.scales[warp]));
  const LaneAddresses<kTokenTiles, kMx, kValueBytes> at(s, share, ring, 2048, h, h_scale, p.num_tokens);
  scales.wait();
  int number = 0;                 // of this warp's tiles, experts of a slice
  int tile = share.first_tile();  // of this CTA's
  WarpStages stages(s, share);
  RingCursor h_at;
  h_at.advance(p.h_buffers, tile);
  int begin = 0;  // the slice's first tile
  for (int first = blockIdx.x * p.slice_rows; first < p.hidden; first += gridDim.x * p.slice_rows, begin += count) {
    float sums[kTokenTiles][4] = {};
    for (; tile < begin + count; tile += share.tile_step()) {
      const int a = tile - begin;
      // Of this thread's two tokens of a tile of tokens. NOTE: a token that is not routed here is left out, not
      // multiplied by 0: no NaN of another token's expert gets in.
      const uint32_t named = active.tokens[a];
      float weight[kTokenTiles][2];
      bool routed[kTokenTiles][2];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = n * 8 + lane % 4 * 2 + i;
          routed[n][i] = named >> token & 1;
          weight[n][i] = token_weight[a * p.num_tokens + min(token, p.num_tokens - 1)];
        }
      }
      fixed.h.wait_full(h_at);
      const uint32_t h_offset = h_at.stage() * tokens_bytes(s.k_blocks, p.num_tokens, kValueBytes);
      const uint32_t scale_offset = h_at.stage() * scales_bytes(s.k_blocks, p.num_tokens, kMx);
      float of_expert[kTokenTiles][4] = {};  // MxFp8: without the routing weight
      const bool has_part = stages.has_part(s);
      int block = 0;  // of this warp's in the tile
      stages.for_tile(s, share, fixed.ring, [&](int stage, int step) {
        const uint32_t rows = at.rows + stage * s.stage_bytes;
        share.for_blocks(s, step, [&](int chunk, int in_stage) {
          uint32_t tokens[kTokenTiles];
          at.find_tokens(chunk, h_offset, tokens);
          if constexpr (kMx) {
            multiply_mx_chunk<kValueBytes>(of_expert, rows + in_stage * groups * 2048, tokens,
                                           at.find_factors(s, stage, chunk, in_stage, scale_offset), p.num_tokens == 1);
          } else {
            float row_scale[kTokenTiles][2];
            at.find_scales(chunk, scale_offset, row_scale);
            const float scale = scales.at(block++);
            float product[kTokenTiles][4];
            multiply_named<kValueBytes>(product, named, rows + in_stage * groups * 2048, tokens);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
              const float factor[2] = {scale * row_scale[n][0] * weight[n][0], scale * row_scale[n][1] * weight[n][1]};
#pragma unroll
              for (int i = 0; i < 4; ++i)
                if (routed[n][i % 2]) sums[n][i] += factor[i % 2] * product[n][i];
            }
          }
        });
      });
      if constexpr (kMx) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (has_part && routed[n][i % 2]) sums[n][i] += weight[n][i % 2] * of_expert[n][i];
        }
      }
      __syncwarp();
      if (lane == 0) fixed.h.release(h_at);
      h_at.advance(p.h_buffers, share.tile_step());
      scales.advance(s, share, find, ++number);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
      reinterpret_cast<float4*>(partial)[(warp * kTokenTiles + n) * 32 + lane] =
          make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    // Arrivals: all math threads. The first publishes the shares, the second says that they have been read.
    named_barrier_sync(kMathBarrier, kDecodeMathThreads);
    store_slice<kTokenTiles, kMx>(p, first, partial);
    if (first + int(gridDim.x) * p.slice_rows < p.hidden) named_barrier_sync(kMathBarrier, kDecodeMathThreads);
  }
  scales.finish();
}

template <int kTokenTiles, bool kMx, int kValueBytes>
__global__ void __launch_bounds__(decode_threads(kMx), 1)
    decode_gemm2(const __grid_constant__ CUtensorMap map, const __grid_constant__ DecodeGemm2Parameters p) {
  uint8_t* memory = dynamic_shared_memory();
  const DecodeGemm2Layout layout(p.stream.ring_bytes<kMx>(), p.stream.k_blocks, p.num_tokens, p.top_k, kTokenTiles,
                                 p.h_buffers, kValueBytes, kMx);
  Fixed& fixed = *reinterpret_cast<Fixed*>(memory + layout.fixed);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == kProducerThread) {
    prefetch_tensor_map(&map);
    fixed.ring.initialize(kFullArrivals<kMx>, p.stream.shares.warps());
    fixed.h.initialize(1, p.stream.steps == 1 ? p.stream.shares.warps() : kDecodeWarps);
  }
  __syncthreads();
  // NOTE: weights and ids are no kernel's of this call, and what came before GEMM1 was complete when GEMM1 let the next
  // kernel start: they may be read before the wait. The math warps need no wait: all they compute comes from h,
  // and the zeros of a call without a local expert overwrite nothing that a kernel of this call has written.
  if (warp == kProducerThread / 32) {
    int expert[kSlotsPerLane], ranks[kSlotsPerLane];
    load_slot_experts(p.slots, p.num_tokens * p.top_k, expert);
    fixed.experts.build(expert, ranks);
    if constexpr (kMx) named_barrier_arrive(kScalesBarrier, 32 + kScaleWarps * 32);
    if (threadIdx.x == kProducerThread) produce(fixed, smem_address(memory), &map, p);
  } else if (warp == kRowsThread / 32) {
    fixed.active.build(p.slots, p.weights, reinterpret_cast<float*>(memory + layout.weight), p.num_tokens, p.top_k);
    named_barrier_arrive(kReadyBarrier, kDecodeMathThreads + 32);
    wait_for_previous_kernel();
    let_next_kernel_start();
    load_rows<kMx, kValueBytes>(fixed, smem_address(memory + layout.h), smem_address(memory + layout.h_scale), p);
  } else if (kMx && warp > kRowsThread / 32) {
    // Arrivals: the producer's warp and these. Publishes the experts.
    named_barrier_sync(kScalesBarrier, 32 + kScaleWarps * 32);
    produce_scales(fixed, smem_address(memory), p);
  } else {
    // Arrivals: all math threads and the rows' warp. Publishes experts and tokens.
    named_barrier_sync(kReadyBarrier, kDecodeMathThreads + 32);
    multiply<kTokenTiles, kMx, kValueBytes>(
        fixed, smem_address(memory), smem_address(memory + layout.h), smem_address(memory + layout.h_scale),
        reinterpret_cast<const float*>(memory + layout.weight), reinterpret_cast<float*>(memory + layout.partial), p);
  }
}

}  // namespace

DecodeGemm2Kernel FindDecodeGemm2(int token_tiles, bool mx, int value_bytes) {
  return find_decode_kernel(token_tiles, mx, value_bytes, [](auto tiles, auto is_mx, auto bytes) -> DecodeGemm2Kernel {
    return decode_gemm2<tiles.value, is_mx.value, bytes.value>;
  });
}

}  // namespace jax_moe::cuda
