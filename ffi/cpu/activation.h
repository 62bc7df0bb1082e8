// The function between the two GEMMs, in float32. A new one is added in activation.cc, in
// ffi/cuda/kernels/activation.cuh and in jax_moe/reference.py.
#pragma once
#include <limits>

#include "stages.h"

namespace jax_moe::cpu {

// What the caller asked for, with the parameters of one expert.
struct Activation {
  ActivationType type;
  float alpha = 1.f, beta = 0.f, clamp_limit = std::numeric_limits<float>::infinity();  // Swiglu only

  Activation(const Call& call, int64_t expert);
};

// values += delta, for kScaleBlock columns. delta: bf16.
void AddDelta(const uint16_t* delta, float* values);

// codes = e4m3(a / scale) for the kScaleBlock activations a of x (not gated) or of up = x and gate; returns the scale.
float ActivateAndQuantize(const Activation& activation, const float* x, const float* gate, uint8_t* codes);

}  // namespace jax_moe::cpu
