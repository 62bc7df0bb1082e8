// The two grouped GEMM kernels of MxFp8.
#include "grouped_gemm_sm90.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm1_mx_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA rows,
                  const __grid_constant__ MxScales scales, const __grid_constant__ GemmShape shape,
                  const __grid_constant__ TileSchedule schedule,
                  const __grid_constant__ MxActivationEpilogue epilogue) {
  run_gemm1<MxFormat>(&b_map, rows, scales, shape, schedule, epilogue);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm2_mx_sm90(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap large_a_map,
                  const __grid_constant__ CUtensorMap b_map, const __grid_constant__ MxScales scales,
                  const __grid_constant__ GemmShape shape, const __grid_constant__ TileSchedule schedule,
                  const __grid_constant__ MxBf16Epilogue epilogue) {
  run_gemm2<MxFormat>({&a_map, &large_a_map}, &b_map, scales, shape, schedule, epilogue);
}

}  // namespace jax_moe::cuda
