// The activations one by one, and the loop over a scale block of the chosen one.
#include "activation.h"

#include <cmath>

#include "quantize.h"

namespace jax_moe::cpu {
namespace {

// NOTE: comparisons, not std::min and std::max: a NaN stays one.
JAX_MOE_INLINE float Swiglu(const Activation& parameters, float gate, float up) {
  const float limit = parameters.clamp_limit;
  gate = gate > limit ? limit : gate;
  up = up < -limit ? -limit : up;
  up = up > limit ? limit : up;
  return gate / (1.f + std::exp(-parameters.alpha * gate)) * (up + parameters.beta);
}

// gate times the cumulative normal distribution. NOTE: 1 + erf would cancel for a negative gate.
JAX_MOE_INLINE float Geglu(float gate, float up) {
  constexpr float kInverseSqrt2 = 0.70710678f;
  return up * (gate * (0.5f * std::erfc(-gate * kInverseSqrt2)));
}

JAX_MOE_INLINE float Relu2(float x) { return x < 0.f ? 0.f : x * x; }

template <class Isa>
JAX_MOE_INLINE void ActivateAndQuantizeOn(const Activation& activation, const float* x, const float* gate,
                                          uint8_t* codes, float* scale) {
  float a[kScaleBlock];
  switch (activation.type) {
    case ActivationType::kSwiglu:
      for (int i = 0; i < kScaleBlock; ++i) a[i] = Swiglu(activation, gate[i], x[i]);
      break;
    case ActivationType::kGeglu:
      for (int i = 0; i < kScaleBlock; ++i) a[i] = Geglu(gate[i], x[i]);
      break;
    case ActivationType::kRelu2:
      for (int i = 0; i < kScaleBlock; ++i) a[i] = Relu2(x[i]);
      break;
    case ActivationType::kIdentity:
      return QuantizeBlock(activation.mx, x, codes, scale);
  }
  QuantizeBlock(activation.mx, a, codes, scale);
}

template <class Isa>
JAX_MOE_INLINE void AddDeltaOn(const uint16_t* delta, float* values) {
  for (int i = 0; i < kScaleBlock; ++i) values[i] += FloatFromBfloat16(delta[i]);
}

}  // namespace

Activation::Activation(const Call& call, int64_t expert)
    : type(ActivationType(call.problem.activation_type)), mx(call.problem.mx()) {
  const auto read = [&](const Buffer& parameter, float& value) {
    if (parameter.data) value = static_cast<const float*>(parameter.data)[expert];
  };
  read(call.buffers.gemm1_alpha, alpha);
  read(call.buffers.gemm1_beta, beta);
  read(call.buffers.gemm1_clamp_limit, clamp_limit);
}

JAX_MOE_DISPATCH(void, AddDelta, (const uint16_t* delta, float* values), (delta, values))
JAX_MOE_DISPATCH(void, ActivateAndQuantize,
                 (const Activation& activation, const float* x, const float* gate, uint8_t* codes, float* scale),
                 (activation, x, gate, codes, scale))

}  // namespace jax_moe::cpu
