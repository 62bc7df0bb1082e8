// A chain of three kernels, two of which overlap the one before: y = 2 x, z[i] = y[i] + w[i], y[i] = z[31 - i]. Right,
// and with one access too early or on the wrong path each.
#include <vector>

#include "../../ffi/cuda/launch.h"
#include "overlap.h"
#include "selftest.h"

namespace selftest {
namespace {

using namespace jax_moe::cuda;

enum class Mistake {
  kNone,
  kNoWait,
  kEarlyRead,
  kEarlyBulkCopy,
  kEarlyCpAsync,
  kEarlyWrite,         // of what the kernel before has written
  kEarlyWriteOfInput,  // which the kernel before reads
  kEarlyAtomic,
  kReadOnlyPath,
  kReadOnlyOwn,     // what this kernel writes
  kLaneZeroWaits,   // and the others go on
  kMbarrierOrders,  // no mistake: lane 0 waits, the others learn it from the mbarrier of its copy
  kNobodyWaits,     // in a kernel that needs nothing
  kUnknownBefore,   // the first kernel overlaps whatever ran before
};

constexpr int kCount = 32;
struct Parameters {
  CUtensorMap y_map;
  int *x, *y, *z, *w;
};

void Double(Parameters p) {
  let_next_kernel_start();
  p.y[threadIdx.x] = 2 * p.x[threadIdx.x];
}

template <Mistake kMistake>
void Add(Parameters p) {
  const int i = threadIdx.x;
  uint8_t* shared = dynamic_shared_memory();
  const uint32_t memory = smem_address(shared), barrier = memory + kCount * 4;
  if (i == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  int w = __ldg(&p.w[i]), early = 0;  // nobody writes it
  if (kMistake == Mistake::kEarlyRead) early = p.y[i];
  if (kMistake == Mistake::kEarlyWrite) p.y[i] = 0;
  if (kMistake == Mistake::kEarlyWriteOfInput) p.x[i] = 0;
  if (kMistake == Mistake::kEarlyAtomic) atomicAdd(&p.y[i], 1);
  if (kMistake == Mistake::kEarlyCpAsync && i < kCount / 4) cp_async_16(memory + i * 16, p.y + i * 4);
  const auto copy_y = [&] {
    if (i > 0) return;
    mbarrier_arrive_expect(barrier, kCount * 4);
    tma_load_2d(memory, &p.y_map, 0, 0, barrier);
  };
  if (kMistake == Mistake::kEarlyBulkCopy) copy_y();
  constexpr bool kOneWaits = kMistake == Mistake::kLaneZeroWaits || kMistake == Mistake::kMbarrierOrders;
  if (kOneWaits ? i == 0 : kMistake != Mistake::kNoWait) wait_for_previous_kernel();
  if (kMistake == Mistake::kLaneZeroWaits) early = p.y[i];
  let_next_kernel_start();
  if (kMistake != Mistake::kEarlyBulkCopy) copy_y();
  mbarrier_wait(barrier, 0);
  if (kMistake == Mistake::kReadOnlyPath) early = __ldg(&p.y[i]);
  if (kMistake == Mistake::kMbarrierOrders) early = p.y[i];
  p.z[i] = reinterpret_cast<const int*>(shared)[i] + w + (early == -1 ? 1 : 0);
  if (kMistake == Mistake::kReadOnlyOwn) p.w[i] = __ldg(&p.z[i]);
}

// One thread waits for all.
void Reverse(Parameters p) {
  if (threadIdx.x == 0) wait_for_previous_kernel();
  __syncthreads();
  const uint4 v = load_fresh_v4(p.z + threadIdx.x / 4 * 4);
  const unsigned words[] = {v.x, v.y, v.z, v.w};
  p.y[kCount - 1 - threadIdx.x] = int(words[threadIdx.x % 4]);
}

void Nothing(Parameters) {}

template <Mistake kMistake>
std::string Test() {
  constexpr unsigned kBytes = kCount * 4;
  int* arrays[4];
  const char* names[] = {"x", "y", "z", "w"};
  for (int i = 0; i < 4; ++i) arrays[i] = static_cast<int*>(emulation::allocate_guarded(kBytes, false, names[i]));
  Parameters p{{}, arrays[0], arrays[1], arrays[2], arrays[3]};
  for (int i = 0; i < kCount; ++i) {
    p.x[i] = i * i;
    p.w[i] = 1000 - i;
  }
  const cuuint64_t sizes[] = {kCount, 1}, strides[] = {kBytes};
  const cuuint32_t box[] = {kCount, 1}, steps[] = {1, 1};
  if (cuTensorMapEncodeTiled(&p.y_map, CU_TENSOR_MAP_DATA_TYPE_INT32, 2, p.y, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return "tensor map refused";
  emulation::forget_earlier_kernels();
  const LaunchShape plain{1, kCount, kBytes + 8}, overlapping{1, kCount, kBytes + 8, true};
  jax_moe::Status status =
      jax_moe::cuda::Launch("first", Double, kMistake == Mistake::kUnknownBefore ? overlapping : plain, nullptr, p);
  if (kMistake == Mistake::kNobodyWaits && status.ok())
    status = jax_moe::cuda::Launch("nothing", Nothing, overlapping, nullptr, p);
  if (status.ok()) status = jax_moe::cuda::Launch("second", Add<kMistake>, overlapping, nullptr, p);
  if (status.ok()) status = jax_moe::cuda::Launch("third", Reverse, overlapping, nullptr, p);
  std::string error = status.message;
  for (int i = 0; i < kCount; ++i)
    if (error.empty() && p.y[kCount - 1 - i] != 2 * i * i + 1000 - i) error = "a wrong result";
  for (int* array : arrays) emulation::free_guarded(array);
  return error;
}

}  // namespace

const std::map<std::string, std::string (*)()>& OverlapTests() {
  static const std::map<std::string, std::string (*)()> tests{
      {"overlap", Test<Mistake::kNone>},
      {"overlap_mbarrier_orders", Test<Mistake::kMbarrierOrders>},
      {"overlap_no_wait", Test<Mistake::kNoWait>},
      {"overlap_early_read", Test<Mistake::kEarlyRead>},
      {"overlap_early_bulk_copy", Test<Mistake::kEarlyBulkCopy>},
      {"overlap_early_cp_async", Test<Mistake::kEarlyCpAsync>},
      {"overlap_early_write", Test<Mistake::kEarlyWrite>},
      {"overlap_early_write_of_input", Test<Mistake::kEarlyWriteOfInput>},
      {"overlap_early_atomic", Test<Mistake::kEarlyAtomic>},
      {"overlap_read_only_path", Test<Mistake::kReadOnlyPath>},
      {"overlap_read_only_own", Test<Mistake::kReadOnlyOwn>},
      {"overlap_lane_zero_waits", Test<Mistake::kLaneZeroWaits>},
      {"overlap_nobody_waits", Test<Mistake::kNobodyWaits>},
      {"overlap_unknown_before", Test<Mistake::kUnknownBefore>},
  };
  return tests;
}

}  // namespace selftest
