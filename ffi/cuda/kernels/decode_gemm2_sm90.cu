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
constexpr int kLoadsInFlight = 4;  // of 128 values, a loader warp; as many again are being quantised

struct Fixed {
  PipelineBarriers<kMaxRingStages> ring;
  PipelineBarriers<kMaxHBuffers> h;  // full: every loader warp; empty: every math warp
  ActiveExperts experts;             // the producer's
  ActiveRows rows;
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
  const int lane = threadIdx.x % 32, k_blocks = p.stream.k_blocks;
  const ActiveRows& rows = fixed.rows;
  const int num_blocks = rows.begin[rows.experts.count] * k_blocks;
  RingCursor at;
  for (int slice = blockIdx.x * p.slice_rows; slice < p.hidden; slice += gridDim.x * p.slice_rows) {
    int a = 0, row = 0,
        row_begin = 0;  // the expert whose buffer is open; the row of the block at hand, its first block
    if (rows.experts.count > 0) fixed.h.wait_empty(at);
    const auto close = [&] {  // hands the open buffer over and opens the next
      __syncwarp();
      if (lane == 0) mbarrier_arrive(fixed.h.full_address(at.stage));
      at.advance(p.h_buffers);
      if (++a < rows.experts.count) fixed.h.wait_empty(at);
    };
    uint4 v[kLoadsInFlight], next[kLoadsInFlight];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const int block = first + i * kLoaderWarps;
        if (block < num_blocks) next[i] = load_fresh_v4(p.h + int64_t(block) * 128 + lane * 4);
      }
    };
    load(warp);
    for (int first = warp; first < num_blocks; first += kLoadsInFlight * kLoaderWarps) {
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) v[i] = next[i];
      load(first + kLoadsInFlight * kLoaderWarps);
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const int block = first + i * kLoaderWarps;
        if (block >= num_blocks) break;
        const float x[4] = {__uint_as_float(v[i].x), __uint_as_float(v[i].y), __uint_as_float(v[i].z),
                            __uint_as_float(v[i].w)};
        float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
        for (int d = 16; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
        const float scale = block_scale(amax), inverse = 1.f / scale;
        while (block >= row_begin + k_blocks) ++row, row_begin += k_blocks;
        while (row >= rows.begin[a + 1]) close();
        const int chunk = block - row_begin, token = rows.token[row];
        store_shared_u32(h + ((at.stage * k_blocks + chunk) * p.num_tokens + token) * 128 +
                             ((lane / 4 ^ (token & 7)) << 4) + lane % 4 * 4,
                         to_e4m3x2(x[0] * inverse, x[1] * inverse) | uint32_t(to_e4m3x2(x[2] * inverse, x[3] * inverse))
                                                                         << 16);
        if (lane == 0) h_scale[(at.stage * k_blocks + chunk) * kTokenTiles * 8 + token] = scale;
      }
    }
    while (a < rows.experts.count) close();
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = p.slice_rows / 16;
  const int group = warp % groups, part = warp / groups;  // of the rows; of the K blocks of a stage
  const ActiveRows& rows = fixed.rows;
  const int count = rows.experts.count;
  RingCursor at, h_at;
  for (int first = blockIdx.x * p.slice_rows; first < p.hidden; first += gridDim.x * p.slice_rows) {
    float sums[kTokenTiles][4] = {};
    float scales, next_scales = count > 0 ? load_step_scales(s, rows.experts.expert[0], first, part) : 0.f;
    for (int a = 0; a < count; ++a, h_at.advance(p.h_buffers)) {
      scales = next_scales;
      if (a + 1 < count) next_scales = load_step_scales(s, rows.experts.expert[a + 1], first, part);
      // Routing weights of this thread's two tokens of a tile. NOTE: a token that is not routed here is left out, not
      // multiplied by 0: no NaN of another token's expert gets in.
      float weight[kTokenTiles][2];
      bool routed[kTokenTiles][2];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = rows.row[a][n * 8 + lane % 4 * 2 + i];  // -1 past the last token, too
          routed[n][i] = row >= 0;
          weight[n][i] = row >= 0 ? rows.weight[row] : 0.f;
        }
      }
      fixed.h.wait_full(h_at);
      for (int step = 0; step < s.steps; ++step, at.advance(s.stages)) {
        const int chunk = step * s.chunks + part, h_chunk = h_at.stage * s.k_blocks + chunk;
        fixed.ring.wait_full(at);
        if (part < s.chunks && chunk < s.k_blocks) {
          float product[kTokenTiles][4];
          multiply_chunk(product, ring + at.stage * s.stage_bytes + (part * groups + group) * 2048,
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
  if (warp == kDecodeWarps) fixed.rows.build(p.slots, p.weights, true, p.num_tokens, p.top_k);
  // Arrivals: all threads but the producer's warp. Publishes the rows.
  named_barrier_sync(kReadyBarrier, kProducerThread);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const uint32_t h = smem_address(memory + layout.h);
  float* h_scale = reinterpret_cast<float*>(memory + layout.h_scale);
  if (warp < kDecodeWarps)
    multiply<kTokenTiles>(fixed, smem_address(memory), h, h_scale, reinterpret_cast<float*>(memory + layout.partial),
                          p);
  else
    load_h<kTokenTiles>(fixed, h, h_scale, p, warp - kDecodeWarps);
}

}  // namespace

DecodeGemm2Kernel FindDecodeGemm2(int token_tiles) { return token_tiles == 1 ? decode_gemm2<1> : decode_gemm2<2>; }

}  // namespace jax_moe::cuda
