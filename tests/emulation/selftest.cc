// Kernels that do one thing right or wrong on purpose; tests/test_emulation.py asserts what the emulated machine says
// of each. selftest_multiply.cc has those of copies and wgmma, selftest_decode.cc of matrices of a warp,
// selftest_overlap.cc of kernels that overlap, selftest_counters.cc of counters in memory, selftest_registers.cc of
// wgmma with A in registers.
#include "selftest.h"

#include <algorithm>
#include <cstdio>
#include <map>

namespace selftest {
namespace {

using namespace jax_moe::cuda;

// ---- threads that meet ----------------------------------------------------------------------------------------------
std::string Collectives() {
  std::vector<int> wrong(64, -1);
  const std::string error = Launch(
      64, 0,
      +[](int* wrong) {
        const int lane = threadIdx.x % 32, me = threadIdx.x;
        int n = 0;
        n += __shfl_sync(~0u, me, 3) != me - lane + 3;
        n += __shfl_sync(~0u, me, 1, 8) != me - lane + lane / 8 * 8 + 1;
        n += __shfl_up_sync(~0u, me, 2) != (lane < 2 ? me : me - 2);
        n += __shfl_down_sync(~0u, me, 5) != (lane > 26 ? me : me + 5);
        n += __shfl_xor_sync(~0u, float(me), 9) != float(me ^ 9);
        n += __ballot_sync(~0u, lane % 3 == 0) != 0x49249249u;
        n += !__any_sync(~0u, lane == 31) || __all_sync(~0u, lane != 31);
        n += __match_any_sync(~0u, lane / 4) != 0xFu << lane / 4 * 4;
        n += __reduce_add_sync(~0u, lane) != 496 || __reduce_max_sync(~0u, lane) != 31 ||
             __reduce_or_sync(~0u, 1u << lane) != ~0u;
        if (lane < 16) n += __reduce_add_sync(0xFFFFu, 1) != 16;
        wrong[me] = n;
      },
      wrong.data());
  for (const int n : wrong)
    if (error.empty() && n != 0) return "a collective has a wrong result";
  return error;
}

std::string StaticSharedMemoryIsPoisoned() {
  std::vector<int> seen(4, 0);
  const std::string error = Launch(
      4, 32, 64,
      +[](int* seen) {
        __shared__ int word;
        if (threadIdx.x == 0) seen[blockIdx.x] = word == -1 && reinterpret_cast<int*>(dynamic_shared_memory())[5] == -1;
        if (threadIdx.x == 0) word = reinterpret_cast<int*>(dynamic_shared_memory())[5] = 0;
      },
      seen.data());
  for (const int fresh : seen)
    if (error.empty() && !fresh) return "a CTA sees the shared memory of the one before";
  return error;
}

std::string MissingThreadAtBarrier() {
  return Launch(
      64, 0,
      +[](int) {
        if (threadIdx.x != 40) __syncthreads();
      },
      0);
}
std::string DifferentCountsAtBarrier() {
  return Launch(128, 0, +[](int) { named_barrier_sync(3, threadIdx.x < 64 ? 64 : 128); }, 0);
}
std::string DifferentMasks() {
  return Launch(32, 0, +[](int) { __syncwarp(threadIdx.x < 16 ? ~0u : 0xFFFF0000u); }, 0);
}
std::string DifferentInstructions() {
  return Launch(
      32, 0,
      +[](int) {
        if (threadIdx.x < 5)
          __syncwarp();
        else
          __shfl_sync(~0u, 1, 0);
      },
      0);
}
std::string ExitedLane() {
  return Launch(
      32, 0,
      +[](int) {
        if (threadIdx.x == 7) return;
        __syncwarp();
      },
      0);
}
// Barrier `id` of 32 id threads, 1 to 15, each of which tells what those before have told.
std::string NamedBarriers() {
  std::vector<int> seen(480, 0);
  const std::string error = Launch(
      480, 0,
      +[](int* seen) {
        __shared__ int words[480];
        const int me = threadIdx.x;
        words[me] = 1;
        for (int id = 15; id >= 1; --id) {
          if (me >= 32 * id) continue;
          named_barrier_sync(id, 32 * id);
          seen[me] += words[(me + 32) % (32 * id)];
          named_barrier_sync(id, 32 * id);
          words[me] = 1;
        }
      },
      seen.data());
  for (int me = 0; me < 480; ++me)
    if (error.empty() && seen[me] != 15 - me / 32) return "a barrier has let threads through";
  return error;
}
// 3 CTAs of 13 warps count in shared and global memory; the last one to say so adds up.
std::string Atomics() {
  static int counts[3], done, sum;
  std::fill(counts, counts + 3, 0);
  done = sum = 0;
  const std::string error = Launch(
      3, 416, 0,
      +[](int* counts) {
        __shared__ int count;
        __shared__ bool last;
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        atomicAdd(&count, 2);
        __syncthreads();
        if (threadIdx.x == 0) {
          atomicAdd(&counts[blockIdx.x], count);
          __threadfence();
          last = atomicAdd(&done, 1) == 2;
        }
        __syncthreads();
        if (last && threadIdx.x < 3) atomicAdd(&sum, __ldcg(&counts[threadIdx.x]));
      },
      counts);
  return error.empty() && sum != 3 * 832 ? "atomics have lost a count" : error;
}
// What all threads leave in shared memory, with the barrier between or without.
std::string NeighbourReads(bool barrier) {
  struct Parameters {
    int* sums;
    bool barrier;
  };
  std::vector<int> sums(256, 0);
  const std::string error = Launch(
      256, 0,
      +[](Parameters p) {
        __shared__ int words[256];
        words[threadIdx.x] = 1;
        if (p.barrier) __syncthreads();
        for (int i = 0; i < 256; ++i) p.sums[threadIdx.x] += words[i];
      },
      Parameters{sums.data(), barrier});
  for (const int sum : sums)
    if (error.empty() && sum != 256) return "a thread read what its neighbour had not yet written";
  return error;
}
std::string NeighbourReadsAfterBarrier() { return NeighbourReads(true); }
std::string NeighbourReadsWithoutBarrier() { return NeighbourReads(false); }

// ---- mbarriers ------------------------------------------------------------------------------------------------------
std::string UninitialisedMbarrier() {
  return Launch(32, 64, +[](int) { mbarrier_wait(smem_address(dynamic_shared_memory()), 1); }, 0);
}
std::string FreshMbarrierPassesParityOne() {
  return Launch(
      32, 64,
      +[](int) {
        const uint32_t barrier = smem_address(dynamic_shared_memory());
        if (threadIdx.x == 0) mbarrier_init(barrier, 1);
        __syncwarp();
        mbarrier_wait(barrier, 1);
      },
      0);
}
std::string BytesThatNeverCome() {
  return Launch(
      32, 64,
      +[](int) {
        const uint32_t barrier = smem_address(dynamic_shared_memory());
        if (threadIdx.x == 0) {
          mbarrier_init(barrier, 1);
          mbarrier_arrive_expect(barrier, 512);
        }
        __syncwarp();
        mbarrier_wait(barrier, 0);
      },
      0);
}
std::string OneArrivalTooMany() {
  return Launch(
      32, 64,
      +[](int) {
        const uint32_t barrier = smem_address(dynamic_shared_memory());
        if (threadIdx.x > 0) return;
        mbarrier_init(barrier, 1);
        mbarrier_arrive_expect(barrier, 512);
        mbarrier_arrive(barrier);
      },
      0);
}
std::string OverwrittenMbarrier() {
  return Launch(
      32, 64,
      +[](int) {
        const uint32_t barrier = smem_address(dynamic_shared_memory());
        if (threadIdx.x > 0) return;
        mbarrier_init(barrier, 1);
        store_shared_u32(barrier + 4, 7);
        mbarrier_arrive(barrier);
      },
      0);
}

// ---- memory ---------------------------------------------------------------------------------------------------------
std::string PastDynamicSharedMemory() {
  return Launch(32, 64, +[](int) { dynamic_shared_memory()[64 + threadIdx.x] = 1; }, 0);
}
std::string MisalignedShared() {
  return Launch(32, 64, +[](int) { load_shared_v4(smem_address(dynamic_shared_memory()) + 8); }, 0);
}
std::string MisalignedGlobal() {
  alignas(16) static int words[64];
  return Launch(32, 0, +[](int* words) { __ldg(reinterpret_cast<const uint4*>(words + threadIdx.x)); }, words);
}
std::string MisalignedPlainStore() {
  alignas(16) static int words[64];
  return Launch(32, 0, +[](int* words) { *reinterpret_cast<uint4*>(words + 1) = {}; }, words);
}
std::string IntegerOverflow() {
  static int word = 0x7FFFFFFF;
  return Launch(32, 0, +[](int* word) { *word += int(threadIdx.x) + 1; }, &word);
}
template <int kOffset>
std::string OutsideBuffer() {
  auto* buffer = static_cast<int*>(emulation::allocate_guarded(160, kOffset < 0, "victim"));
  const std::string error = Launch(32, 0, +[](int* p) { p[kOffset] = threadIdx.x; }, buffer);
  emulation::free_guarded(buffer);
  return error;
}
std::string StackOverflow() {
  return Launch(
      32, 0,
      +[](int) {
        volatile char big[emulation::kStackBytes - 2048];  // its end is in the page that traps
        big[0] = 1;
      },
      0);
}
std::string SharedMemoryNotAskedFor() {
  return Launch(32, 48 * 1024 + 16, +[](int) {}, 0);
}
std::string TooManyRegisters() {
  return Launch(384, 0, +[](int) { raise_registers<176>(); }, 0);
}
std::string RegistersOfOneWarp() {
  return Launch(
      256, 0,
      +[](int) {
        if (threadIdx.x >= 224) reduce_registers<40>();
      },
      0);
}

const std::map<std::string, std::string (*)()>& Tests() {
  static std::map<std::string, std::string (*)()> tests = [] {
    std::map<std::string, std::string (*)()> all{
        {"collectives", Collectives},
        {"static_shared_memory_is_poisoned", StaticSharedMemoryIsPoisoned},
        {"named_barriers", NamedBarriers},
        {"atomics", Atomics},
        {"missing_thread_at_barrier", MissingThreadAtBarrier},
        {"different_counts_at_barrier", DifferentCountsAtBarrier},
        {"different_masks", DifferentMasks},
        {"different_instructions", DifferentInstructions},
        {"exited_lane", ExitedLane},
        {"neighbour_reads", NeighbourReadsAfterBarrier},
        {"neighbour_reads_without_barrier", NeighbourReadsWithoutBarrier},
        {"uninitialised_mbarrier", UninitialisedMbarrier},
        {"fresh_mbarrier_passes_parity_one", FreshMbarrierPassesParityOne},
        {"bytes_that_never_come", BytesThatNeverCome},
        {"one_arrival_too_many", OneArrivalTooMany},
        {"overwritten_mbarrier", OverwrittenMbarrier},
        {"past_dynamic_shared_memory", PastDynamicSharedMemory},
        {"misaligned_shared", MisalignedShared},
        {"misaligned_global", MisalignedGlobal},
        {"misaligned_plain_store", MisalignedPlainStore},
        {"integer_overflow", IntegerOverflow},
        {"after_buffer", OutsideBuffer<40>},
        {"before_buffer", OutsideBuffer<-1>},
        {"stack_overflow", StackOverflow},
        {"shared_memory_not_asked_for", SharedMemoryNotAskedFor},
        {"too_many_registers", TooManyRegisters},
        {"registers_of_one_warp", RegistersOfOneWarp},
    };
    for (const auto* more : {&MultiplyTests(), &DecodeTests(), &OverlapTests(), &CounterTests(), &RegisterTests()})
      all.insert(more->begin(), more->end());
    return all;
  }();
  return tests;
}

}  // namespace
}  // namespace selftest

extern "C" {

// The error of a test by its name, empty when it went through.
void emulated_selftest(const char* name, unsigned seed, char* message, int message_bytes) {
  emulation::settings.seed = seed;
  const auto& tests = selftest::Tests();
  const auto found = tests.find(name);
  const std::string error = found == tests.end() ? std::string("no such test: ") + name : found->second();
  std::snprintf(message, message_bytes, "%s", error.c_str());
}

// e4m3 and bf16 codes of float32 values, as kernels convert them.
void emulated_convert(const float* values, int64_t count, uint8_t* e4m3, uint16_t* bf16) {
  for (int64_t i = 0; i < count; ++i) {
    e4m3[i] = uint8_t(__nv_cvt_float2_to_fp8x2(make_float2(0.f, values[i]), __NV_SATFINITE, __NV_E4M3) >> 8);
    bf16[i] = __bfloat16_as_ushort(__floats2bfloat162_rn(0.f, values[i]).y);
  }
}

// f16 codes of e4m3 codes, four at a time.
void emulated_decode(const uint32_t* codes, int64_t count, uint32_t* f16) {
  for (int64_t i = 0; i < count; ++i) jax_moe::cuda::e4m3x4_to_f16x4(codes[i], f16[2 * i], f16[2 * i + 1]);
}

}  // extern "C"
