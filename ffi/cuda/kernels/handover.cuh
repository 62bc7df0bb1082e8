// From GEMM1 to GEMM2 inside a kernel: a tile of GEMM2 reads the h of its expert, which CTAs that drew earlier tiles
// write. Counters in memory say how much of it is missing; whoever sees that nothing is may read.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

inline constexpr int kNoExpert = -1;

struct Handover {
  int32_t* left;    // [L + 1] tiles of GEMM1 that are missing, of each expert and of all; null: it was a kernel before
  int num_experts;  // L

  // By a thread that knows a tile to be stored.
  DEVICE void give(int expert) const {
    fence_proxy_async_global();
    fence_memory();
    decrement_relaxed(left + expert);
    decrement_relaxed(left + num_experts);
  }
  // How many are missing, of an expert or of all. Who sees none calls seen(), and may read.
  DEVICE int of_expert(int expert) const { return load_relaxed(left + expert); }
  DEVICE int of_all() const { return load_relaxed(left + num_experts); }
  static DEVICE void seen() {
    fence_memory();
    fence_proxy_async_global();
  }
  DEVICE void wait(int expert) const {
    while (of_expert(expert) > 0) back_off();
    seen();
  }
};

}  // namespace jax_moe::cuda
