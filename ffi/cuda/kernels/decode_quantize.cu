// Between the two GEMMs of a small call: h to e4m3 with 1x128 scales, or 1x32 of MxFp8. A kernel of its own, because a
// block of 128 comes from eight tiles of GEMM1; it needs next to nothing of an SM, so it is there when GEMM1 ends.
#include "decode_gemm_sm90.cuh"
#include "fp8.cuh"

namespace jax_moe::cuda {
namespace {

template <bool kMx>
DEVICE void quantize_h(const DecodeQuantizeParameters& p) {
  // NOTE: at once: GEMM2 reads only weights and ids before its wait, and those were complete when GEMM1 let this start.
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, block = (blockIdx.x * kDecodeQuantizeThreads + threadIdx.x) / 32;
  const int slot = block / p.k_blocks, chunk = block - slot * p.k_blocks;
  // Slots without a row: not local, or not the token's first that names its expert.
  bool has_row = slot < p.num_slots;
  if (has_row) {
    const int64_t first = p.slots.first_local();
    const int expert = p.slots.local_expert(__ldcg(p.slots.topk_ids + slot), first);
    has_row = expert >= 0;
    for (int before = slot / p.top_k * p.top_k; before < slot; ++before)
      has_row &= p.slots.local_expert(__ldcg(p.slots.topk_ids + before), first) != expert;
  }
  wait_for_previous_kernel();
  if (!has_row) return;
  const int64_t at = int64_t(block) * 128 + lane * 4;
  float scale;
  uint32_t codes, mx_scale;
  if constexpr (kMx)
    codes = quantize_f32_mx(load_fresh_v4(p.h + at), mx_scale);
  else
    codes = quantize_f32(load_fresh_v4(p.h + at), scale);
  if (p.value_bytes == kHalfBytes) {
    uint32_t even, odd;
    e4m3x4_to_f16x4(codes, even, odd);
    uint32_t* to = reinterpret_cast<uint32_t*>(p.values) + int64_t(block) * 64 + lane / 4 * 8 + lane % 4;
    to[0] = even;
    to[4] = odd;
  } else {
    *reinterpret_cast<uint32_t*>(p.values + at) = codes;
  }
  float* scales = p.scales + slot * scale_pitch(p.k_blocks, kMx);
  if constexpr (kMx) {
    if (lane % 8 == 0) scales[chunk * 4 + lane / 8] = mx_token_factor(mx_scale);
  } else if (lane == 0 || (chunk + 1 == p.k_blocks && chunk + lane < scale_pitch(p.k_blocks, kMx))) {
    // GEMM2 loads whole rows of scales: what follows a row's last is 0, not whatever was there.
    scales[chunk + lane] = lane == 0 ? scale : 0.f;
  }
}

}  // namespace

__global__ void __launch_bounds__(kDecodeQuantizeThreads)
    decode_quantize(const __grid_constant__ DecodeQuantizeParameters p) {
  quantize_h<false>(p);
}

__global__ void __launch_bounds__(kDecodeQuantizeThreads)
    decode_quantize_mx(const __grid_constant__ DecodeQuantizeParameters p) {
  quantize_h<true>(p);
}

}  // namespace jax_moe::cuda
