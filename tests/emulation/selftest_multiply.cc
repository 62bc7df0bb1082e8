// A small warp-specialised multiply, D[64][128] = A[64][256] B[128][256]^T with one stage of shared memory: right, and
// with one mistake each. A and B come by bulk copies, or A by cp.async.
#include <cmath>

#include "selftest.h"

namespace selftest {
namespace {

using namespace jax_moe::cuda;

enum class Mistake {
  kNone,
  kNoProxyFence,  // after cp.async
  kNoCpAsyncWait,
  kNoWgmmaFence,
  kNoWgmmaCommit,
  kEarlyAccumulatorRead,
  kEarlyAccumulatorWrite,
  kEarlyRelease,      // of the stage, before wgmma has read it
  kLaneZeroReleases,  // before the other lanes have seen the phase
  kTooFewBytes,
  kTooManyBytes,
  kOtherOrder,     // of the wgmmas, in one warp
  kMisplacedTile,  // not at a multiple of 1024
  kUnswizzledA,
};

constexpr int kM = 64, kN = 128, kK = 256, kValidM = 50, kMathThreads = 128, kThreads = 160;

struct Shared {
  uint8_t a[kM * 128], b[kN * 128];
  uint64_t full, empty;
};
struct Parameters {
  CUtensorMap a_map, b_map;
  const uint8_t* a;
  float* d;
};

template <Mistake kMistake, bool kCpAsync>
void Produce(const Parameters& p, Shared& shared) {
  const uint32_t full = smem_address(&shared.full), a = smem_address(shared.a);
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < kK / 128; ++k) {
    mbarrier_wait(smem_address(&shared.empty), k % 2 ^ 1);
    __syncwarp();
    if (lane == 0) {
      constexpr int kOff = kMistake == Mistake::kTooFewBytes ? -16 : kMistake == Mistake::kTooManyBytes ? 16 : 0;
      mbarrier_arrive_expect(full, sizeof shared.b + (kCpAsync ? 0 : sizeof shared.a) + kOff);
      tma_load_2d(smem_address(shared.b), &p.b_map, k * 128, 0, full);
      if (!kCpAsync) tma_load_2d(a, &p.a_map, k * 128, 0, full);
    }
    if (!kCpAsync) continue;
    for (int row = lane / 8; row < kValidM; row += 4) {
      const int piece = lane % 8, at = kMistake == Mistake::kUnswizzledA ? piece : piece ^ (row & 7);
      cp_async_16(a + row * 128 + at * 16, p.a + row * kK + k * 128 + piece * 16);
    }
    cp_async_commit();
    if (kMistake != Mistake::kNoCpAsyncWait) cp_async_wait<0>();
    if (kMistake != Mistake::kNoProxyFence) fence_proxy_async();
    mbarrier_arrive(full);
  }
}

template <Mistake kMistake>
void Multiply(const Parameters& p, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t empty = smem_address(&shared.empty);
  float acc[64], sums[64] = {};
  const auto release = [&] {
    if (kMistake != Mistake::kLaneZeroReleases) __syncwarp();
    if (lane == 0) mbarrier_arrive(empty);
  };
  for (int k = 0; k < kK / 128; ++k) {
    mbarrier_wait(smem_address(&shared.full), k % 2);
    const uint64_t b = wgmma_descriptor(smem_address(shared.b));
    uint64_t a = wgmma_descriptor(smem_address(shared.a));
    if (kMistake == Mistake::kMisplacedTile) a += 128 / 16;
    register_fence(acc);
    if (kMistake != Mistake::kNoWgmmaFence) wgmma_fence();
    for (int i = 0; i < 4; ++i) {
      const int part = kMistake == Mistake::kOtherOrder && warp == 2 ? i ^ 1 : i;
      wgmma_m64k32_e4m3(acc, a + 2 * part, b + 2 * part, i);
    }
    if (kMistake != Mistake::kNoWgmmaCommit) wgmma_commit();
    register_fence(acc);
    if (kMistake == Mistake::kEarlyRelease || kMistake == Mistake::kLaneZeroReleases) release();
    if (kMistake == Mistake::kEarlyAccumulatorRead) sums[7] += acc[7];
    if (kMistake == Mistake::kEarlyAccumulatorWrite) acc[5] = 0.f;
    wgmma_wait();
    register_fence(acc);
    if (kMistake != Mistake::kEarlyRelease && kMistake != Mistake::kLaneZeroReleases) release();
    for (int i = 0; i < 64; ++i) sums[i] += acc[i];
  }
  for (int i = 0; i < 64; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < kValidM) p.d[row * kN + column] = sums[i];
  }
}

template <Mistake kMistake, bool kCpAsync>
void Kernel(Parameters p) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&shared.full), kCpAsync ? 33 : 1);
    mbarrier_init(smem_address(&shared.empty), 4);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < kMathThreads)
    Multiply<kMistake>(p, shared);
  else
    Produce<kMistake, kCpAsync>(p, shared);
}

// Small whole numbers, so that every sum is exact.
int Value(int row, int k, int salt) { return (row * 7 + k * 3 + row * k % 5 + salt) % 9 - 4; }

template <Mistake kMistake, bool kCpAsync>
std::string Test() {
  std::vector<uint8_t> memory((kM + kN) * kK + 16);
  uint8_t* a = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16);
  uint8_t* b = a + kM * kK;
  for (int k = 0; k < kK; ++k) {
    for (int m = 0; m < kM; ++m)
      a[m * kK + k] = __nv_cvt_float_to_fp8(float(Value(m, k, 0)), __NV_SATFINITE, __NV_E4M3);
    for (int n = 0; n < kN; ++n)
      b[n * kK + k] = __nv_cvt_float_to_fp8(float(Value(n, k, 4)), __NV_SATFINITE, __NV_E4M3);
  }
  std::vector<float> d(kValidM * kN, NAN);
  Parameters p{};
  p.a = a;
  p.d = d.data();
  const auto encode = [](CUtensorMap* map, void* data, uint64_t rows, uint32_t box_rows) {
    const cuuint64_t sizes[] = {kK, rows}, strides[] = {kK};
    const cuuint32_t box[] = {128, box_rows}, steps[] = {1, 1};
    return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, data, sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  if (encode(&p.a_map, a, kValidM, kM) != CUDA_SUCCESS || encode(&p.b_map, b, kN, kN) != CUDA_SUCCESS)
    return "tensor map refused";
  const std::string error = Launch(kThreads, sizeof(Shared), &Kernel<kMistake, kCpAsync>, p);
  if (!error.empty()) return error;
  for (int m = 0; m < kValidM; ++m)
    for (int n = 0; n < kN; ++n) {
      int sum = 0;
      for (int k = 0; k < kK; ++k) sum += Value(m, k, 0) * Value(n, k, 4);
      if (d[m * kN + n] != float(sum))
        return "wrong product at (" + std::to_string(m) + ", " + std::to_string(n) +
               "): " + std::to_string(d[m * kN + n]);
    }
  return "";
}

std::string TensorMapRules() {
  alignas(16) static uint8_t data[4096];
  CUtensorMap map;
  const auto encode = [&](uint8_t* at, uint64_t stride, uint32_t box_columns, uint32_t box_rows) {
    const cuuint64_t sizes[] = {64, 8}, strides[] = {stride};
    const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
    return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, at, sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  if (encode(data, 64, 128, 8) != CUDA_SUCCESS) return "a legal map was refused";
  if (encode(data + 8, 64, 128, 8) == CUDA_SUCCESS) return "a misaligned base was taken";
  if (encode(data, 72, 128, 8) == CUDA_SUCCESS) return "a stride that is no multiple of 16 was taken";
  if (encode(data, 64, 256, 8) == CUDA_SUCCESS) return "a box wider than the swizzle was taken";
  if (encode(data, 64, 128, 257) == CUDA_SUCCESS) return "a box of 257 rows was taken";
  return "";
}

}  // namespace

const std::map<std::string, std::string (*)()>& MultiplyTests() {
  static const std::map<std::string, std::string (*)()> tests{
      {"tensor_map_rules", TensorMapRules},
      {"multiply", Test<Mistake::kNone, false>},
      {"multiply_gathered", Test<Mistake::kNone, true>},
      {"no_proxy_fence", Test<Mistake::kNoProxyFence, true>},
      {"no_cp_async_wait", Test<Mistake::kNoCpAsyncWait, true>},
      {"no_wgmma_fence", Test<Mistake::kNoWgmmaFence, false>},
      {"no_wgmma_commit", Test<Mistake::kNoWgmmaCommit, false>},
      {"early_accumulator_read", Test<Mistake::kEarlyAccumulatorRead, false>},
      {"early_accumulator_write", Test<Mistake::kEarlyAccumulatorWrite, false>},
      {"early_release", Test<Mistake::kEarlyRelease, false>},
      {"lane_zero_releases", Test<Mistake::kLaneZeroReleases, false>},
      {"too_few_bytes", Test<Mistake::kTooFewBytes, false>},
      {"too_many_bytes", Test<Mistake::kTooManyBytes, false>},
      {"other_order", Test<Mistake::kOtherOrder, false>},
      {"misplaced_tile", Test<Mistake::kMisplacedTile, false>},
      {"unswizzled_a", Test<Mistake::kUnswizzledA, true>},
  };
  return tests;
}

}  // namespace selftest
