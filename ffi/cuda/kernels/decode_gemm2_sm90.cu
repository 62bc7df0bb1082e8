// GEMM2 of a small call. A CTA owns a slice of the output's columns and walks all active experts: one warp streams
// their weights, from before GEMM1's end on, seven quantise h, sixteen multiply and keep the weighted sum over experts
// in registers, so that no row of a single expert is ever stored. Experts are summed in ascending order.
#include "decode_fragment.cuh"
#include "decode_gemm_sm90.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {
namespace {

constexpr int kReadyBarrier = 1, kMathBarrier = 2;
constexpr int kProducerThread = kDecodeMathThreads + kLoaderWarps * 32;
constexpr int kLoadsInFlight = 4;  // of 128 values, a loader warp

struct Fixed {
  PipelineBarriers<kMaxRingStages> ring;
  PipelineBarriers<kMaxHBuffers> h;  // full: every loader warp; empty: every math warp
  ActiveExperts experts;             // the producer's
  ActiveTokens active;
};
static_assert(sizeof(Fixed) <= kDecodeFixedBytes, "its place in shared memory");

// By one thread.
DEVICE void produce(Fixed& fixed, uint32_t ring, const CUtensorMap* map, const DecodeGemm2Parameters& p) {
  const WeightStream& s = p.stream;
  RingCursor at;
  for (int row = blockIdx.x * p.slice_rows; row < p.hidden; row += gridDim.x * p.slice_rows) {
    for (int a = 0; a < fixed.experts.count; ++a) {
      const int expert = fixed.experts.expert[a];
      for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
        fixed.ring.wait_empty(at);
        const uint32_t full = fixed.ring.full_address(at.stage);
        mbarrier_arrive_expect(full, s.stage_bytes);
        tma_load_3d(ring + at.stage * s.stage_bytes, map, 0, expert * s.expert_y + row,
                    expert * s.expert_z + step * s.chunks, full);
      }
    }
  }
}

// The rows of h, expert by expert, to e4m3 [k_blocks][T][128], swizzled, with their scales. Blocks of 128 are dealt out
// to the loader warps; each walks all experts, so that buffers are filled and freed in order.
template <int kTokenTiles>
DEVICE void load_h(Fixed& fixed, uint32_t h, float* h_scale, const DecodeGemm2Parameters& p, int warp) {
  const int lane = threadIdx.x % 32, k_blocks = p.stream.k_blocks, count = fixed.active.experts.count;
  RingCursor at;
  for (int slice = blockIdx.x * p.slice_rows; slice < p.hidden; slice += gridDim.x * p.slice_rows) {
    // Two walks over the warp's blocks: one that loads, kLoadsInFlight blocks ahead, and one that quantises.
    struct Walk {
      int a = 0, row = 0, chunk;  // expert, the token's place among those that name it, K block
      uint32_t rest = 0;          // tokens of the expert from `row` on
    };
    const auto settle = [&](Walk& walk, auto&& leave) {  // carries chunk over into rows and experts
      while (walk.a < count && walk.chunk >= k_blocks) {
        walk.chunk -= k_blocks;
        walk.rest &= walk.rest - 1;
        while (walk.rest == 0) {
          leave(walk.a);
          if (++walk.a == count) return;
          walk.rest = fixed.active.tokens[walk.a];
        }
      }
    };
    Walk ahead, behind;
    ahead.chunk = behind.chunk = warp;
    if (count > 0) ahead.rest = behind.rest = fixed.active.tokens[0];
    uint4 v[kLoadsInFlight];
    const auto load = [&](uint4& to) {
      settle(ahead, [](int) {});
      if (ahead.a == count) return;
      const int slot = fixed.active.slot[ahead.a][__ffs(ahead.rest) - 1];
      to = load_fresh_v4(p.h + (int64_t(slot) * k_blocks + ahead.chunk) * 128 + lane * 4);
      ahead.chunk += kLoaderWarps;
    };
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) load(v[i]);
    if (count > 0) fixed.h.wait_empty(at);
    const auto close = [&](int a) {  // hands an expert's buffer over and opens the next one
      __syncwarp();
      if (lane == 0) mbarrier_arrive(fixed.h.full_address(at.stage));
      at.advance(p.h_buffers);
      if (a + 1 < count) fixed.h.wait_empty(at);
    };
    while (behind.a < count) {
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        settle(behind, close);
        if (behind.a == count) break;
        const float x[4] = {__uint_as_float(v[i].x), __uint_as_float(v[i].y), __uint_as_float(v[i].z),
                            __uint_as_float(v[i].w)};
        load(v[i]);
        float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
        for (int d = 16; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
        const float scale = block_scale(amax), inverse = 1.f / scale;
        const int chunk = at.stage * k_blocks + behind.chunk, token = __ffs(behind.rest) - 1;
        store_shared_u32(h + (chunk * p.num_tokens + token) * 128 + ((lane / 4 ^ (token & 7)) << 4) + lane % 4 * 4,
                         to_e4m3x2(x[0] * inverse, x[1] * inverse) | uint32_t(to_e4m3x2(x[2] * inverse, x[3] * inverse))
                                                                         << 16);
        if (lane == 0) h_scale[chunk * kTokenTiles * 8 + token] = scale;
        behind.chunk += kLoaderWarps;
      }
    }
  }
}

// Sums the warps' parts of a slice in their order and stores it.
template <int kTokenTiles>
DEVICE void store_slice(const DecodeGemm2Parameters& p, int first, int groups, const float* partial) {
  for (int i = threadIdx.x; i < p.slice_rows * p.num_tokens; i += kDecodeMathThreads) {
    const int token = i / p.slice_rows, column = i - token * p.slice_rows;
    const float* from = partial + (column / 16 * kTokenTiles + token / 8) * 128 +
                        fragment_index(stored_row(column % 16, p.shuffled), token % 8);
    float sum = 0.f;
    for (int part = 0; part < kDecodeWarps; part += groups) sum += from[part * kTokenTiles * 128];
    p.output[int64_t(token) * p.hidden + first + column] = uint16_t(to_bf16x2(sum, 0.f));
  }
}

template <int kTokenTiles>
DEVICE void multiply(Fixed& fixed, uint32_t ring, uint32_t h, const float* h_scale, float* partial,
                     const DecodeGemm2Parameters& p) {
  const WeightStream& s = p.stream;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = p.slice_rows / 16, parts = kDecodeWarps / groups;  // of the rows; warps that share a group's K
  const int group = warp % groups, part = warp / groups;
  const ActiveTokens& active = fixed.active;
  const int count = active.experts.count;
  RingCursor at, h_at;
  for (int first = blockIdx.x * p.slice_rows; first < p.hidden; first += gridDim.x * p.slice_rows) {
    float sums[kTokenTiles][4] = {};
    const auto load_scales = [&](int a) {
      return a < count ? load_step_scales(s, active.experts.expert[a], first, parts, part, a * s.k_blocks) : 0.f;
    };
    float scales, next_scales = load_scales(0);
    for (int a = 0; a < count; ++a, h_at.advance(p.h_buffers)) {
      scales = next_scales;
      next_scales = load_scales(a + 1);
      // Routing weights of this thread's two tokens of a tile. NOTE: a token that is not routed here is left out, not
      // multiplied by 0: no NaN of another token's expert gets in.
      float weight[kTokenTiles][2];
      bool routed[kTokenTiles][2];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = n * 8 + lane % 4 * 2 + i;
          routed[n][i] = active.names(a, token);
          weight[n][i] = routed[n][i] ? active.weight[active.slot[a][token]] : 0.f;
        }
      }
      fixed.h.wait_full(h_at);
      for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
        const int in_stage = chunk_in_stage(parts, part, a * s.k_blocks, step, s);
        const int chunk = step * s.chunks + in_stage, h_chunk = h_at.stage * s.k_blocks + chunk;
        fixed.ring.wait_full(at);
        if (in_stage < s.chunks && chunk < s.k_blocks) {
          float product[kTokenTiles][4];
          multiply_chunk(product, ring + at.stage * s.stage_bytes + (in_stage * groups + group) * 2048,
                         h + h_chunk * p.num_tokens * 128, p.num_tokens - 1);
          const float w_s = __shfl_sync(~0u, scales, step);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            const float2 t_s =
                *reinterpret_cast<const float2*>(h_scale + (h_chunk * kTokenTiles + n) * 8 + lane % 4 * 2);
            const float scale[2] = {w_s * t_s.x * weight[n][0], w_s * t_s.y * weight[n][1]};
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (routed[n][i % 2]) sums[n][i] += scale[i % 2] * product[n][i];
          }
        }
        __syncwarp();
        if (lane == 0) fixed.ring.release(at);
      }
      if (lane == 0) fixed.h.release(h_at);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
      reinterpret_cast<float4*>(partial)[(warp * kTokenTiles + n) * 32 + lane] =
          make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    // Arrivals: all math threads. The first publishes the parts, the second says that they have been read.
    named_barrier_sync(kMathBarrier, kDecodeMathThreads);
    store_slice<kTokenTiles>(p, first, groups, partial);
    named_barrier_sync(kMathBarrier, kDecodeMathThreads);
  }
}

template <int kTokenTiles>
__global__ void __launch_bounds__(kDecodeGemm2Threads, 1)
    decode_gemm2(const __grid_constant__ CUtensorMap map, const __grid_constant__ DecodeGemm2Parameters p) {
  uint8_t* memory = dynamic_shared_memory();
  const DecodeGemm2Layout layout(p.stream.stages * p.stream.stage_bytes, p.stream.k_blocks, p.num_tokens, kTokenTiles,
                                 p.h_buffers);
  Fixed& fixed = *reinterpret_cast<Fixed*>(memory + layout.fixed);
  const int num_slots = p.num_tokens * p.top_k, warp = threadIdx.x / 32;
  if (threadIdx.x == kProducerThread) {
    prefetch_tensor_map(&map);
    fixed.ring.initialize(1, kDecodeWarps);
    fixed.h.initialize(kLoaderWarps, kDecodeWarps);
  }
  __syncthreads();
  // NOTE: weights and ids are no kernel's of this call, and what came before GEMM1 was complete when GEMM1 let this
  // kernel start: they may be read before the wait.
  if (warp == kProducerThread / 32) {
    int expert[kSlotsPerLane], ranks[kSlotsPerLane];
    load_slot_experts(p.slots, num_slots, expert);
    fixed.experts.build(expert, num_slots, ranks);
    if (threadIdx.x == kProducerThread) produce(fixed, smem_address(memory), &map, p);
    return;
  }
  if (warp == kDecodeWarps) fixed.active.build(p.slots, p.weights, true, p.num_tokens, p.top_k);
  // Arrivals: all threads but the producer's warp. Publishes experts and tokens.
  named_barrier_sync(kReadyBarrier, kProducerThread);
  const uint32_t h = smem_address(memory + layout.h);
  float* h_scale = reinterpret_cast<float*>(memory + layout.h_scale);
  if (warp < kDecodeWarps) {
    // NOTE: what is computed here depends on h, which the loaders read after GEMM1: no wait of its own is needed.
    multiply<kTokenTiles>(fixed, smem_address(memory), h, h_scale, reinterpret_cast<float*>(memory + layout.partial),
                          p);
  } else {
    wait_for_previous_kernel();
    let_next_kernel_start();
    load_h<kTokenTiles>(fixed, h, h_scale, p, warp - kDecodeWarps);
  }
}

}  // namespace

DecodeGemm2Kernel FindDecodeGemm2() { return decode_gemm2<kMaxDecodeTokens / 8>; }

}  // namespace jax_moe::cuda
