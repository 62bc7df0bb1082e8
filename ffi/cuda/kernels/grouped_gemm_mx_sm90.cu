// The grouped GEMMs of MxFp8.
#include "grouped_gemm_sm90.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_mx_sm90(const __grid_constant__ GroupedGemmParameters<MxFormat> p) {
  run_grouped_gemms(p);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_mx_few_pairs_sm90(const __grid_constant__ GroupedGemmParameters<MxFewPairsFormat> p) {
  run_grouped_gemms(p);
}

__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_mx_few_sm90(const __grid_constant__ GroupedGemmParameters<MxFewFormat> p) {
  run_grouped_gemms(p);
}

}  // namespace jax_moe::cuda
