// The two grouped GEMM kernels of DeepSeekFp8.
#include "grouped_gemm_sm90.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm1_sm90(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ GatherA rows,
               const __grid_constant__ TokenScales scales, const __grid_constant__ GemmShape shape,
               const __grid_constant__ TileSchedule schedule, const __grid_constant__ ActivationEpilogue epilogue) {
  run_gemm1<DeepSeekFormat>(&b_map, rows, scales, shape, schedule, epilogue);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm2_sm90(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap large_a_map,
               const __grid_constant__ CUtensorMap b_map, const __grid_constant__ TokenScales scales,
               const __grid_constant__ GemmShape shape, const __grid_constant__ TileSchedule schedule,
               const __grid_constant__ Bf16Epilogue epilogue) {
  run_gemm2<DeepSeekFormat>({&a_map, &large_a_map}, &b_map, scales, shape, schedule, epilogue);
}

}  // namespace jax_moe::cuda
