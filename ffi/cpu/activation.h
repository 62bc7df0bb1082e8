// The function between the two GEMMs, in float32: one function an activation. A new one is added here, in
// ffi/cuda/kernels/activation.cuh and in jax_moe/reference.py.
#pragma once
#include <cmath>

namespace jax_moe::cpu {

inline float Swiglu(float gate, float up) { return gate / (1.f + std::exp(-gate)) * up; }

}  // namespace jax_moe::cpu
