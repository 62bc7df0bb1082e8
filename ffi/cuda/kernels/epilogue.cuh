// What a math warpgroup does with its sums: activation and 1x128 or 1x32 requantisation to e4m3 (GEMM1), or bf16
// (GEMM2). Everything before the one rounding is float32 in registers. Options are uniform branches here, outside the
// hot loop. Here is what epilogues are told; epilogue_wide.cuh and epilogue_narrow.cuh do it.
#pragma once
#include "activation.cuh"
#include "mx_scale.cuh"
#include "scheduler.cuh"
#include "warpgroup.cuh"

namespace jax_moe::cuda {

// gemm1_lora_delta, added before the activation; null `delta`: none.
struct LoraDelta {
  const uint16_t* delta;           // bf16 [T*K, M], original row order
  const int32_t* row_to_expanded;  // [T*K] permuted row -> slot
  int64_t stride;                  // M

  DEVICE const uint16_t* of_row(int row) const { return delta + __ldcg(row_to_expanded + row) * stride; }
};

// h[row, c] = e4m3(a / s), s = h_scale[c / 128, row] = the scale of the 128 values a of that row and block. MxFp8: s is
// of 32 values, h_scale[c / 128, row] holds the four E8M0 bytes of 128, and h_values gets e4m3(a / s) * s as bf16
// (mx_values.cuh); of h with h_scale and h_values one may be null. Gated: a tile has up and gate of columns [128 n,
// + 128), else columns [256 n, + 256).
template <bool kIsMx>
struct ActivationEpilogueOf {
  uint8_t* h;            // [rows, I]
  float* h_scale;        // [I/128, scale_stride]
  uint16_t* h_values;    // [rows, I]
  int64_t intermediate;  // I
  int64_t scale_stride;
  ActivationChoice activation;
  LoraDelta lora;
  bool shuffled;  // as MxFp8 has it
  bool stays;     // in L2, all but h_scale

  static constexpr bool kMx = kIsMx;
  static constexpr int kScales = kMx ? 2 : 1;  // of a token, that a warpgroup's values need
  struct Shared {
    float inverse[kMathWarpgroups][kScales][kBlockM];
  };
};
using ActivationEpilogue = ActivationEpilogueOf<false>;
using MxActivationEpilogue = ActivationEpilogueOf<true>;

// y2[row, 256 n + c] = bf16(sum), where that is one of the columns.
template <bool kIsMx>
struct Bf16EpilogueOf {
  uint16_t* y2;  // [rows, stride]
  int64_t stride, columns;
  bool shuffled;
  bool stays;  // in L2

  static constexpr Order kShuffledOrder = kIsMx ? Order::kEights : Order::kFours;
  struct Shared {};
};
using Bf16Epilogue = Bf16EpilogueOf<false>;
using MxBf16Epilogue = Bf16EpilogueOf<true>;

}  // namespace jax_moe::cuda
