// wgmma of bf16 whose A is in registers: D[64][16] = A[64][32] B[16][32]^T, two steps of 16 of K in flight; right, and
// with the mistakes of who makes fragments while others are multiplied. And a step's formats, code by code.
#include <cmath>

#include "../../ffi/cuda/kernels/mx_values.cuh"
#include "../../ffi/cuda/kernels/wgmma_sm90.cuh"
#include "number_formats.h"
#include "selftest.h"

namespace selftest {
namespace {

using namespace jax_moe::cuda;

enum class Mistake { kNone, kOverwrittenFragment, kNoProxyFence, kNoWgmmaFence };

constexpr int kM = 64, kN = 16, kK = 32, kThreads = 128;
struct Parameters {
  float* d;
};

int Value(int row, int k, int salt) { return (row * 5 + k * 3 + row * k % 7 + salt) % 9 - 4; }
uint32_t Bf16(int value) { return __bfloat16_as_ushort(__float2bfloat16_rn(float(value))); }

template <Mistake kMistake>
void Kernel(Parameters p) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const uint32_t b = smem_address(dynamic_shared_memory());
  if (int n = threadIdx.x; n < kN) {
    for (int k = 0; k < kK; k += 2)  // rows of 128 bytes, of which K takes 64, swizzled
      store_shared_u32(b + n * 128 + ((k / 8 ^ (n & 7)) << 4) + k % 8 * 2,
                       Bf16(Value(n, k, 4)) | Bf16(Value(n, k + 1, 4)) << 16);
    if (kMistake != Mistake::kNoProxyFence) fence_proxy_async();
  }
  __syncthreads();
  const uint64_t tokens = wgmma_descriptor(b);
  float d[8] = {};
  uint32_t a[2][4];
  for (int step = 0; step < 2; ++step) {
    uint32_t (&fragment)[4] = a[kMistake == Mistake::kOverwrittenFragment ? 0 : step];
    for (int i = 0; i < 4; ++i) {
      const int m = row + i % 2 * 8, k = step * 16 + lane % 4 * 2 + i / 2 * 8;
      fragment[i] = Bf16(Value(m, k, 0)) | Bf16(Value(m, k + 1, 0)) << 16;
    }
    if (kMistake != Mistake::kNoWgmmaFence) wgmma_fence();
    wgmma_m64k16_bf16<kN>(d, fragment, tokens + 2 * step);
    wgmma_commit();
  }
  wgmma_wait();
  for (int i = 0; i < 8; ++i) p.d[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <Mistake kMistake>
std::string Test() {
  std::vector<float> d(kM * kN, NAN);
  const std::string error = Launch(kThreads, kN * 128, Kernel<kMistake>, Parameters{d.data()});
  if (!error.empty()) return error;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      int sum = 0;
      for (int k = 0; k < kK; ++k) sum += Value(m, k, 0) * Value(n, k, 4);
      if (d[m * kN + n] != float(sum)) return "wrong product at (" + std::to_string(m) + ", " + std::to_string(n) + ")";
    }
  return "";
}

// All codes under scales from the smallest to the largest that bf16 holds exactly.
std::string Values() {
  for (const int byte : {3, 64, 127, 200, 246})
    for (uint32_t code = 0; code < 256; ++code) {
      const uint2 pairs = mx_values(code | 0x38000000, mx_scale(uint32_t(byte), 0));
      const float found = emulation::from_bf16(uint16_t(pairs.x)), last = emulation::from_bf16(uint16_t(pairs.y >> 16));
      const float expected = std::ldexp(emulation::from_e4m3(uint8_t(code)), byte - 127);
      if (std::isnan(expected) ? !std::isnan(found) : found != expected)
        return "a wrong value of code " + std::to_string(code);
      if (last != std::ldexp(1.f, byte - 127)) return "a wrong value in the last place";
    }
  return "";
}

}  // namespace

const std::map<std::string, std::string (*)()>& RegisterTests() {
  static const std::map<std::string, std::string (*)()> tests{
      {"registers", Test<Mistake::kNone>},
      {"registers_overwritten", Test<Mistake::kOverwrittenFragment>},
      {"registers_no_proxy_fence", Test<Mistake::kNoProxyFence>},
      {"registers_no_wgmma_fence", Test<Mistake::kNoWgmmaFence>},
      {"mx_values", Values},
  };
  return tests;
}

}  // namespace selftest
