// The two grouped GEMM kernels: roles of the warpgroups and their registers. Gathering needs more registers in the
// producer (216 / 72) than one TMA thread does (232 / 40); the sum over three warpgroups must stay below 65536.
#include "grouped_gemm_sm90.cuh"

namespace jax_moe::cuda {
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm1_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA gather,
               const __grid_constant__ GemmShape shape, const __grid_constant__ TileSchedule schedule,
               const __grid_constant__ ActivationEpilogue epilogue) {
  auto& shared = prepare_gemm<GemmSharedMemory<DeepSeekFormat, ActivationEpilogue>>(129, kMathWarpgroups * 4 + 4);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  if (threadIdx.x == kMathWarpgroups * 128) prefetch_first_b(&b_map, shape, schedule.num_columns);
  wait_for_previous_kernel();
  let_next_kernel_start();  // NOTE: after the wait: GEMM2 reads the tiles of the route before its own
  if (warpgroup == kMathWarpgroups) {
    reduce_registers<72>();
    produce_gathered(shared, gather, &b_map, shape, schedule, thread, NoScaleFeed{});
  } else {
    raise_registers<216>();
    multiply<true>(shared, shape, DeepSeekMath(shape), epilogue, warpgroup, thread);
  }
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm2_sm90(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap a_scale_map,
               const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GemmShape shape,
               const __grid_constant__ TileSchedule schedule, const __grid_constant__ Bf16Epilogue epilogue) {
  auto& shared = prepare_gemm<GemmSharedMemory<DeepSeekFormat, Bf16Epilogue>>(1, kMathWarpgroups * 4 + 1);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  if (warpgroup == kMathWarpgroups) {
    reduce_registers<40>();
    if (thread == 0) produce(shared, TmaA{&a_map, &a_scale_map}, &b_map, shape);
    if (thread == 32)
      for (TileTeller teller(schedule); teller.tell(shared.tiles);) {
      }
  } else {
    // NOTE: the math warps need no wait: what they compute and store comes from A, which the producer waits for.
    raise_registers<232>();
    multiply<false>(shared, shape, DeepSeekMath(shape), epilogue, warpgroup, thread);
  }
}

}  // namespace jax_moe::cuda
