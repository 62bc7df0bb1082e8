// The function between the two GEMMs, in float32. A new one is added in activation.cc, in
// ffi/cuda/kernels/activation.cuh and in jax_moe/reference.py.
#pragma once
#include <limits>

#include "stages.h"

namespace jax_moe::cpu {

// What the caller asked for, with the parameters of one expert.
struct Activation {
  ActivationType type;
  bool mx;                                                                              // how the result is quantised
  float alpha = 1.f, beta = 0.f, clamp_limit = std::numeric_limits<float>::infinity();  // Swiglu only

  Activation(const Call& call, int64_t expert);
};

// values += delta, for kScaleBlock columns. delta: bf16.
void AddDelta(const uint16_t* delta, float* values);

// The codes and the scale, or with MxFp8 four scales, of the kScaleBlock activations of x (not gated) or of up = x and
// gate.
void ActivateAndQuantize(const Activation& activation, const float* x, const float* gate, uint8_t* codes, float* scale);

}  // namespace jax_moe::cpu
