// The kernel form of QuantizeTokens.
#include "quantize.cuh"

namespace jax_moe::cuda {

__global__ void __launch_bounds__(kQuantizeThreads) quantize_tokens(const __grid_constant__ QuantizeTokens tokens) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  tokens.run(blockIdx.x, gridDim.x, AllTokens());
}

}  // namespace jax_moe::cuda
