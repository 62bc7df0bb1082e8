// Each two bytes of shared memory remember who wrote them last, and who of each warp read them last, with the time of
// that thread. The compiler calls the __tsan_ functions before ordinary accesses (-fsanitize=thread, without its
// runtime), ptx.cuh's stand-ins call the checks themselves.
#include "races.h"

#include <algorithm>

#include "machine.h"
#include "overlap.h"

namespace emulation {
namespace {

constexpr uint32_t kGranule = 2, kSpace = 256 * 1024, kMaxWarps = 32;

constexpr uint32_t kNotOver = ~0u;

struct Stamp {
  uint32_t time;  // 0: never
  uint32_t thread;
};

Stamp writers[kSpace / kGranule];
Stamp readers[kMaxWarps][kSpace / kGranule];
std::vector<Clock> clocks;  // of each thread
uint32_t start = 0;         // stamps up to this time are in the past of all threads
int num_warps = 0;
uint32_t late_begin = kSpace, late_end = 0;  // granules outside have had no late write in this CTA

bool unordered(const Stamp& stamp) { return !in_past({stamp.thread, stamp.time}); }

[[noreturn]] void report(const char* what, const char* before, uint32_t offset, const Stamp& stamp) {
  if (stamp.time == kNotOver)
    fail("race: a %s of shared byte %#x while a cp.async of thread %u, which has not waited for it, writes", what,
         offset, stamp.thread);
  fail("race: a %s of shared byte %#x that no barrier orders after the %s by thread %u", what, offset, before,
       stamp.thread);
}

template <void check_shared(uint32_t, uint32_t), void check_global(const void*, uint32_t)>
void check(const void* address, uint32_t bytes) {
  if (!current) return;
  if (is_shared(address))
    check_shared(shared_address(address), bytes);
  else
    check_global(address, bytes);
}

}  // namespace

void reset_races(int threads) {
  for (const Clock& clock : clocks)
    for (const uint32_t time : clock) start = std::max(start, time);
  clocks.assign(threads, Clock(threads, start));
  for (int i = 0; i < threads; ++i) clocks[i][i] = start + 1;
  num_warps = (threads + 31) / 32;
  for (uint32_t i = late_begin; i < late_end; ++i)
    if (writers[i].time == kNotOver) writers[i] = {};  // nobody has waited for it
  late_begin = kSpace;
  late_end = 0;
}

void release_to(Clock& clock) {
  Clock& mine = clocks[current->index];
  if (clock.size() != mine.size()) clock.assign(mine.size(), 0);
  for (size_t i = 0; i < mine.size(); ++i) clock[i] = std::max(clock[i], mine[i]);
  ++mine[current->index];
}

// NOTE: as at the start of a CTA, every stamp up to now is in everyone's past: no clock has to be joined.
void order_all_threads() {
  for (size_t i = 0; i < clocks.size(); ++i) start = std::max(start, clocks[i][i]);
  for (size_t i = 0; i < clocks.size(); ++i) clocks[i][i] = start + 1;
}

void acquire_from(const Clock& clock) {
  Clock& mine = clocks[current->index];
  for (size_t i = 0; i < std::min(clock.size(), mine.size()); ++i) mine[i] = std::max(mine[i], clock[i]);
}

// NOTE: the thread goes on to a new time, so that what it told others before does not cover the moment.
Moment this_moment() { return {uint32_t(current->index), clocks[current->index][current->index]++}; }

void release_moment(Clock& clock, Moment moment) {
  if (clock.size() != clocks.size()) clock.assign(clocks.size(), 0);
  clock[moment.thread] = std::max(clock[moment.thread], moment.time);
}

bool in_past(Moment moment) { return moment.time <= start || moment.time <= clocks[current->index][moment.thread]; }

void check_read(uint32_t offset, uint32_t bytes) {
  const Stamp now{clocks[current->index][current->index], uint32_t(current->index)};
  const uint32_t first = offset / kGranule, end = (offset + bytes + kGranule - 1) / kGranule;
  for (uint32_t i = first; i < end; ++i)
    if (unordered(writers[i])) report("read", "write", i * kGranule, writers[i]);
  std::fill(&readers[now.thread / 32][first], &readers[now.thread / 32][end], now);
}

void check_write(uint32_t offset, uint32_t bytes) {
  const Stamp now{clocks[current->index][current->index], uint32_t(current->index)};
  const uint32_t first = offset / kGranule, end = (offset + bytes + kGranule - 1) / kGranule;
  for (uint32_t i = first; i < end; ++i)
    if (unordered(writers[i])) report("write", "write", i * kGranule, writers[i]);
  for (int w = 0; w < num_warps; ++w)
    for (uint32_t i = first; i < end; ++i)
      if (unordered(readers[w][i])) report("write", "read", i * kGranule, readers[w][i]);
  std::fill(&writers[first], &writers[end], now);
}

void begin_late_write(uint32_t offset, uint32_t bytes) {
  check_write(offset, bytes);
  const uint32_t first = offset / kGranule, end = (offset + bytes + kGranule - 1) / kGranule;
  for (uint32_t i = first; i < end; ++i) writers[i].time = kNotOver;
  late_begin = std::min(late_begin, first);
  late_end = std::max(late_end, end);
}

void end_late_write(uint32_t offset, uint32_t bytes) {
  const uint32_t first = offset / kGranule, end = (offset + bytes + kGranule - 1) / kGranule;
  for (uint32_t i = first; i < end; ++i) writers[i].time = clocks[current->index][current->index];
}

void check_plain_read(const void* address, uint32_t bytes) { check<check_read, check_global_read>(address, bytes); }
void check_plain_write(const void* address, uint32_t bytes) { check<check_write, check_global_write>(address, bytes); }
void check_atomic(const void* address, uint32_t bytes) { check<check_read, check_global_write>(address, bytes); }

}  // namespace emulation

#define ACCESS(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { emulation::check_plain_read(p, bytes); }           \
  void __tsan_write##bytes(void* p) { emulation::check_plain_write(p, bytes); }         \
  void __tsan_unaligned_read##bytes(void* p) { emulation::check_plain_read(p, bytes); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::check_plain_write(p, bytes); }
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { emulation::check_plain_read(p, uint32_t(bytes)); }
void __tsan_write_range(void* p, size_t bytes) { emulation::check_plain_write(p, uint32_t(bytes)); }
}
#undef ACCESS
