// wgmma with fp8 operands from shared memory: D[64][kN] (+)= A[64][32] B[kN][32]^T, one overload a shape: d has kN / 2
// accumulators. With bf16: D += A[64][16] B[kN][16]^T, A from registers as mma_m16n8k16_f16 has it, of each warp's 16
// rows. Thread t of the warpgroup holds D rows 16 (t / 32) + t % 32 / 4 (+ 8) and columns 8 j + 2 (t % 4) (+ 1): d[4 j
// + 0, 1] the first row, d[4 j + 2, 3] the second. Until wgmma_wait() the accumulators must not be touched.
#pragma once
#include "ptx.cuh"

#ifndef JAX_MOE_EMULATION
namespace jax_moe::cuda {

// clang-format off
#define NAMES4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NAMES_4 NAMES4(0, 1, 2, 3)
#define NAMES_8 NAMES_4 ", " NAMES4(4, 5, 6, 7)
#define NAMES_12 NAMES_8 ", " NAMES4(8, 9, 10, 11)
#define NAMES_16 NAMES_12 ", " NAMES4(12, 13, 14, 15)
#define NAMES_20 NAMES_16 ", " NAMES4(16, 17, 18, 19)
#define NAMES_24 NAMES_20 ", " NAMES4(20, 21, 22, 23)
#define NAMES_28 NAMES_24 ", " NAMES4(24, 25, 26, 27)
#define NAMES_32 NAMES_28 ", " NAMES4(28, 29, 30, 31)
#define NAMES_36 NAMES_32 ", " NAMES4(32, 33, 34, 35)
#define NAMES_40 NAMES_36 ", " NAMES4(36, 37, 38, 39)
#define NAMES_44 NAMES_40 ", " NAMES4(40, 41, 42, 43)
#define NAMES_48 NAMES_44 ", " NAMES4(44, 45, 46, 47)
#define NAMES_52 NAMES_48 ", " NAMES4(48, 49, 50, 51)
#define NAMES_56 NAMES_52 ", " NAMES4(52, 53, 54, 55)
#define NAMES_60 NAMES_56 ", " NAMES4(56, 57, 58, 59)
#define NAMES_64 NAMES_60 ", " NAMES4(60, 61, 62, 63)
#define ACC_4 ACC4(0)
#define ACC_8 ACC_4, ACC4(4)
#define ACC_12 ACC_8, ACC4(8)
#define ACC_16 ACC_12, ACC4(12)
#define ACC_20 ACC_16, ACC4(16)
#define ACC_24 ACC_20, ACC4(20)
#define ACC_28 ACC_24, ACC4(24)
#define ACC_32 ACC_28, ACC4(28)
#define ACC_36 ACC_32, ACC4(32)
#define ACC_40 ACC_36, ACC4(36)
#define ACC_44 ACC_40, ACC4(40)
#define ACC_48 ACC_44, ACC4(44)
#define ACC_52 ACC_48, ACC4(48)
#define ACC_56 ACC_52, ACC4(52)
#define ACC_60 ACC_56, ACC4(56)
#define ACC_64 ACC_60, ACC4(60)
// kCount accumulators are operands 0 to kCount - 1; A, B, P: the numbers of the three behind them. `accumulate` 0 overwrites D.
#define WGMMA(kN, kCount, A, B, P) \
  DEVICE void wgmma_m64k32_e4m3(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" NAMES_##kCount "}, %" #A ", %" #B ", p, 1, 1;\n}\n" \
        : ACC_##kCount : "l"(a), "l"(b), "r"(accumulate)); \
  }
WGMMA(8, 4, 4, 5, 6)
WGMMA(16, 8, 8, 9, 10)
WGMMA(24, 12, 12, 13, 14)
WGMMA(32, 16, 16, 17, 18)
WGMMA(64, 32, 32, 33, 34)
WGMMA(128, 64, 64, 65, 66)
#undef WGMMA
template <int kN>
DEVICE void wgmma_m64k16_bf16(float* d, const uint32_t* a, uint64_t b);
// Operands as above, four registers of A first.
#define WGMMA_BF16(kN, kCount, A0, A1, A2, A3, B) \
  template <> \
  DEVICE void wgmma_m64k16_bf16<kN>(float* d, const uint32_t* a, uint64_t b) { \
    asm volatile( \
        "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.bf16.bf16 {" NAMES_##kCount "}, {" NAMES4(A0, A1, A2, A3) "}, %" #B \
        ", 1, 1, 1, 0;\n" \
        : ACC_##kCount : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
WGMMA_BF16(16, 8, 8, 9, 10, 11, 12)
WGMMA_BF16(32, 16, 16, 17, 18, 19, 20)
WGMMA_BF16(64, 32, 32, 33, 34, 35, 36)
WGMMA_BF16(96, 48, 48, 49, 50, 51, 52)
WGMMA_BF16(128, 64, 64, 65, 66, 67, 68)
#undef WGMMA_BF16
// clang-format on

}  // namespace jax_moe::cuda
#endif
