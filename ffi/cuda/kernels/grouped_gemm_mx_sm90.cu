// The two grouped GEMM kernels of MxFp8: roles of the warpgroups and their registers, as in grouped_gemm_sm90.cu.
#include "grouped_gemm_mx_sm90.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm1_mx_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA gather,
                  const __grid_constant__ GemmShape shape, const __grid_constant__ MxWeightScales scales,
                  const __grid_constant__ TileSchedule schedule,
                  const __grid_constant__ MxActivationEpilogue epilogue) {
  auto& shared = prepare_gemm<GemmSharedMemory<MxFormat, MxActivationEpilogue>>(129, kMathWarpgroups * 4 + 4);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  wait_for_previous_kernel();
  let_next_kernel_start();  // NOTE: after the wait: GEMM2 reads the tiles of the route before its own
  if (warpgroup == kMathWarpgroups) {
    reduce_registers<72>();
    produce_gathered(shared, gather, &b_map, shape, schedule, thread, MxScaleFeed<2>(scales, thread));
  } else {
    raise_registers<216>();
    multiply<true>(shared, shape, MxMath(), epilogue, warpgroup, thread);
  }
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm2_mx_sm90(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap a_scale_map,
                  const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GemmShape shape,
                  const __grid_constant__ MxWeightScales scales, const __grid_constant__ TileSchedule schedule,
                  const __grid_constant__ MxBf16Epilogue epilogue) {
  auto& shared = prepare_gemm<GemmSharedMemory<MxFormat, MxBf16Epilogue>>(1 + kScaleThreads,
                                                                          kMathWarpgroups * 4 + 1 + kScaleThreads / 32);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  if (warpgroup == kMathWarpgroups) {
    reduce_registers<56>();
    if (thread == 0) produce(shared, TmaA{&a_map, &a_scale_map}, &b_map, shape);
    if (thread == 32)
      for (TileTeller teller(schedule); teller.tell(shared.tiles);) {
      }
    if (thread >= 128 - kScaleThreads) feed_scales(shared, scales, shape, thread - (128 - kScaleThreads));
  } else {
    // NOTE: the math warps need no wait: what they compute and store comes from A, which the producer waits for.
    raise_registers<224>();
    multiply<false>(shared, shape, MxMath(), epilogue, warpgroup, thread);
  }
}

}  // namespace jax_moe::cuda
