// Counters in memory: warp 1 gives y away, warp 0 waits for it and reads; then nobody gives, and nobody gives enough.
#include "../../ffi/cuda/kernels/handover.cuh"
#include "selftest.h"

namespace selftest {
namespace {

using namespace jax_moe::cuda;

enum class Mistake { kNone, kNobodyGives, kOneIsMissing };

constexpr int kCount = 32;
struct Parameters {
  int *y, *z;
  int* left;  // of one expert, and of all
};

template <Mistake kMistake>
void Pass(Parameters p) {
  const Handover handover{p.left, 1};
  const int lane = threadIdx.x % kCount;
  if (threadIdx.x < kCount) {
    handover.wait(0);
    p.z[lane] = p.y[lane] + (handover.of_all() == 0 ? 0 : 1000);
    return;
  }
  p.y[lane] = lane * lane;
  __syncwarp();
  if (lane == 0 && kMistake != Mistake::kNobodyGives) handover.give(0);
}

template <Mistake kMistake>
std::string Test() {
  int* arrays[3];
  for (int*& array : arrays) array = static_cast<int*>(emulation::allocate_guarded(kCount * 4, false, "array"));
  const Parameters p{arrays[0], arrays[1], arrays[2]};
  p.left[0] = p.left[1] = kMistake == Mistake::kOneIsMissing ? 2 : 1;
  std::string error = Launch(2 * kCount, 0, Pass<kMistake>, p);
  for (int i = 0; i < kCount; ++i)
    if (error.empty() && p.z[i] != i * i) error = "a wrong result";
  for (int* array : arrays) emulation::free_guarded(array);
  return error;
}

}  // namespace

const std::map<std::string, std::string (*)()>& CounterTests() {
  static const std::map<std::string, std::string (*)()> tests{
      {"counters", Test<Mistake::kNone>},
      {"counters_nobody_gives", Test<Mistake::kNobodyGives>},
      {"counters_one_is_missing", Test<Mistake::kOneIsMissing>},
  };
  return tests;
}

}  // namespace selftest
