// The grouped GEMMs of DeepSeekFp8.
#include "grouped_gemm_sm90.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekFormat> p) {
  run_grouped_gemms(p);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_pairs_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekPairsFormat> p) {
  run_grouped_gemms(p);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_few_pairs_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekFewPairsFormat> p) {
  run_grouped_gemms(p);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_few_sm90(const __grid_constant__ GroupedGemmParameters<DeepSeekFewFormat> p) {
  run_grouped_gemms(p);
}

}  // namespace jax_moe::cuda
