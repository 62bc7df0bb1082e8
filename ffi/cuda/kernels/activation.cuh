// The function between the two GEMMs, in float32 on the accumulators: one functor an activation. A new one is added
// here, in ffi/cpu/activation.h and in jax_moe/reference.py.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

// gate * sigmoid(gate) * up.
// NOTE: tanh.approx would save one special-function operation of two, but its error (2^-11) moves as many e4m3 codes
// across a rounding boundary as the whole GEMM does.
struct Swiglu {
  static DEVICE float apply(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }
};

}  // namespace jax_moe::cuda
