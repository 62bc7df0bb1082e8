// The function between the two GEMMs, in float32 on the accumulators: one functor an activation, gated (gate, up) or
// not. A new one is added here and in `with_activation`, in ffi/cpu/activation.h and in jax_moe/reference.py.
#pragma once
#include "../../moe.h"
#include "ptx.cuh"

namespace jax_moe::cuda {

// NOTE: tanh.approx would save one special-function operation of two, but its error (2^-11) moves as many e4m3 codes
// across a rounding boundary as the whole GEMM does.
DEVICE float silu(float x, float alpha = 1.f) {
  constexpr float kLog2E = 1.44269504f;
  return x * approximate_reciprocal(1.f + approximate_exp2(-alpha * x * kLog2E));
}

struct Swiglu {
  static constexpr bool kGated = true;
  DEVICE float operator()(float gate, float up) const { return silu(gate) * up; }
};

// With the parameters of an expert. NOTE: comparisons, not fminf: a NaN stays one.
struct ParametricSwiglu {
  static constexpr bool kGated = true;
  float alpha, beta, limit;
  DEVICE float operator()(float gate, float up) const {
    gate = gate > limit ? limit : gate;
    up = up < -limit ? -limit : up;
    up = up > limit ? limit : up;
    return silu(gate, alpha) * (up + beta);
  }
};

struct Geglu {
  static constexpr bool kGated = true;
  DEVICE float operator()(float gate, float up) const { return up * (gate * normcdff(gate)); }
};

struct Relu2 {
  static constexpr bool kGated = false;
  DEVICE float operator()(float x) const { return x < 0.f ? 0.f : x * x; }
};

struct Identity {
  static constexpr bool kGated = false;
  DEVICE float operator()(float x) const { return x; }
};

// What the caller asked for; the arrays have one float32 a local expert, or are null. NOTE: read past L1: an epilogue
// that is practised reads them before the kernel that wrote them may have ended, and L1 would keep what it found.
struct ActivationChoice {
  ActivationType type;
  const float* alpha;
  const float* beta;
  const float* clamp_limit;
};

// Calls use(functor) for the choice and an expert: one uniform branch a tile.
template <class Use>
DEVICE void with_activation(const ActivationChoice& choice, int expert, const Use& use) {
  switch (choice.type) {
    case ActivationType::kSwiglu:
      if (choice.alpha == nullptr && choice.beta == nullptr && choice.clamp_limit == nullptr) {
        use(Swiglu{});
      } else {
        use(ParametricSwiglu{choice.alpha ? __ldcg(choice.alpha + expert) : 1.f,
                             choice.beta ? __ldcg(choice.beta + expert) : 0.f,
                             choice.clamp_limit ? __ldcg(choice.clamp_limit + expert) : INFINITY});
      }
      break;
    case ActivationType::kGeglu:
      use(Geglu{});
      break;
    case ActivationType::kRelu2:
      use(Relu2{});
      break;
    case ActivationType::kIdentity:
      use(Identity{});
      break;
  }
}

}  // namespace jax_moe::cuda
