// The emulated machine from inside: the CTA that runs now, its threads (fibers), and how a thread waits.
// scheduler.cc runs CTAs, barriers.cc is where threads meet, shared_memory.cc and copies.cc move bytes, wgmma.cc
// multiplies, host_api.cc is the CUDA runtime.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "fiber.h"
#include "include/cuda_runtime.h"
#include "include/emulated_ptx.h"
#include "races.h"

namespace emulation {

struct Collective;

struct CpAsync {
  uint32_t smem;
  const void* global;
  uint32_t bytes;
  bool landed;
};
struct WgmmaOp {
  float* d;
  uint64_t a, b;
  const uint32_t* a_registers;  // bf16; null: a and b are e4m3
  uint32_t a_values[4];         // of these registers, as long as it is in flight
  int n;
  bool accumulate;
};
struct Accumulator {  // of the wgmmas in flight
  float* d;
  int n;
  float value[64];  // what the thread will see
};
struct Wait {        // for reports
  const char* what;  // printf format of the two numbers
  unsigned long long a, b;
  const char* where = "";
};
struct ByteRange {
  uint32_t begin, bytes;
};

struct Thread {
  int index;
  bool ready, done;
  int priority;
  Fiber fiber;
  Wait waits_for;
  const void* waits_on;                         // a barrier or collective
  Collective* held;                             // whose payloads this thread may still read
  std::vector<std::vector<CpAsync>> cp_groups;  // committed groups, oldest first, then the open one
  std::vector<ByteRange> unpublished;           // ordinary shared writes that the async proxy has not been told of
  std::vector<WgmmaOp> wgmmas;
  std::vector<Accumulator> accumulators;
  std::vector<size_t> wgmma_groups;  // of the wgmmas in flight, how many each commit had
  size_t executed_wgmmas, ending_wgmmas;
  bool wgmma_fenced;
  int registers;               // 0: as launched
  bool earlier_kernels_ended;  // has waited for them, or is behind a thread that has
};

// scheduler.cc
extern Thread* current;  // null on the host
struct Launches {
  int all, overlapping;
};
extern Launches launches;       // since a call began
extern std::string last_error;  // of the launch that failed
cudaError_t run_grid(const std::function<void()>& each_thread, dim3 grid, dim3 block, uint32_t dynamic_bytes,
                     bool overlaps_previous);
Thread& thread(int index);
int num_threads();
uint32_t random_below(uint32_t limit);  // seeded
void block(const void* on, Wait wait);  // the current thread stops until wake(on)
void wake(const void* on, int first_thread, int end_thread);

// What every CTA starts with and is asked at its end.
void reset_shared_memory(uint32_t dynamic_bytes);
void check_shared_memory();
void reset_barriers();
std::string describe_barriers();
void reset_copies();
bool land_one_copy();  // false when none is in flight
void check_copies();
void finish_thread_copies(Thread& thread);
void reset_wgmma();
void check_wgmma();
void finish_thread_wgmma(Thread& thread);
void release_collective(Thread& thread);

// shared_memory.cc: both views of shared memory
struct SharedViews {
  uint8_t* ordinary;  // what threads see
  uint8_t* async;     // what wgmma and bulk copies see
};
SharedViews shared_views(uint32_t smem, uint32_t bytes, const char* what);  // checked to be inside the CTA's memory
bool is_shared(const void* p);
void note_ordinary_write(Thread& thread, uint32_t smem, uint32_t bytes);
void complete_mbarrier_bytes(uint32_t smem, uint32_t bytes, Moment issued);
void arrive_late(uint32_t smem, Moment issued);  // on an mbarrier

struct Settings {
  uint32_t seed = 0;
  int num_sms = 3;
};
extern Settings settings;

}  // namespace emulation
