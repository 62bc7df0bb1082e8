// wgmma with fp8 operands from shared memory: D[64][kN] (+)= A[64][32] B[kN][32]^T, one overload a shape: d has kN / 2
// accumulators. Thread t of the warpgroup holds D rows 16 (t / 32) + t % 32 / 4 (+ 8) and columns 8 j + 2 (t % 4) (+ 1):
// d[4 j + 0, 1] the first row, d[4 j + 2, 3] the second. Until wgmma_wait() the accumulators must not be touched.
#pragma once
#include "ptx.cuh"

#ifndef JAX_MOE_EMULATION
namespace jax_moe::cuda {

// clang-format off
#define NAMES8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define NAMES_8 NAMES8(0, 1, 2, 3, 4, 5, 6, 7)
#define NAMES_16 NAMES_8 ", " NAMES8(8, 9, 10, 11, 12, 13, 14, 15)
#define NAMES_24 NAMES_16 ", " NAMES8(16, 17, 18, 19, 20, 21, 22, 23)
#define NAMES_32 NAMES_24 ", " NAMES8(24, 25, 26, 27, 28, 29, 30, 31)
#define NAMES_40 NAMES_32 ", " NAMES8(32, 33, 34, 35, 36, 37, 38, 39)
#define NAMES_48 NAMES_40 ", " NAMES8(40, 41, 42, 43, 44, 45, 46, 47)
#define NAMES_56 NAMES_48 ", " NAMES8(48, 49, 50, 51, 52, 53, 54, 55)
#define NAMES_64 NAMES_56 ", " NAMES8(56, 57, 58, 59, 60, 61, 62, 63)
#define ACC8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACC_8 ACC8(0)
#define ACC_16 ACC_8, ACC8(8)
#define ACC_24 ACC_16, ACC8(16)
#define ACC_32 ACC_24, ACC8(24)
#define ACC_40 ACC_32, ACC8(32)
#define ACC_48 ACC_40, ACC8(40)
#define ACC_56 ACC_48, ACC8(48)
#define ACC_64 ACC_56, ACC8(56)
// kCount accumulators are operands 0 to kCount - 1; A, B, P: the numbers of the three behind them. `accumulate` 0 overwrites D.
#define WGMMA(kN, kCount, A, B, P) \
  DEVICE void wgmma_m64k32_e4m3(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" NAMES_##kCount "}, %" #A ", %" #B ", p, 1, 1;\n}\n" \
        : ACC_##kCount : "l"(a), "l"(b), "r"(accumulate)); \
  }
WGMMA(16, 8, 8, 9, 10)
WGMMA(32, 16, 16, 17, 18)
WGMMA(48, 24, 24, 25, 26)
WGMMA(64, 32, 32, 33, 34)
WGMMA(80, 40, 40, 41, 42)
WGMMA(96, 48, 48, 49, 50)
WGMMA(112, 56, 56, 57, 58)
WGMMA(128, 64, 64, 65, 66)
#undef WGMMA
// clang-format on

}  // namespace jax_moe::cuda
#endif
