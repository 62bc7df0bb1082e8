// Finds accesses of shared memory by two threads, one of them a write, that no barrier orders (vector clocks). Ordered
// are threads by barriers, by mbarrier arrivals and waits, and by __syncwarp(); not by shuffles, which promise nothing.
#pragma once
#include <cstdint>
#include <vector>

namespace emulation {

using Clock = std::vector<uint32_t>;  // by thread; the part of its past that is known to have happened

void reset_races(int threads);
// The current thread tells `clock` its past and goes on to a new time; or learns what `clock` has been told.
void release_to(Clock& clock);
void acquire_from(const Clock& clock);
void order_all_threads();  // all of them wait in one barrier
// A moment of a thread, for what happens in its name later (a bulk copy that lands).
struct Moment {
  uint32_t thread, time;
};
Moment this_moment();
void release_moment(Clock& clock, Moment moment);
bool in_past(Moment moment);  // of the current thread
// Accesses of the current thread; `offset` counts from the first byte of shared memory.
void check_read(uint32_t offset, uint32_t bytes);
void check_write(uint32_t offset, uint32_t bytes);
// A write by the current thread that is not over before it says so: a race with every access until then.
void begin_late_write(uint32_t offset, uint32_t bytes);
void end_late_write(uint32_t offset, uint32_t bytes);
// Ordinary accesses, wherever they go; those outside shared memory are for overlap.h.
void check_plain_read(const void* address, uint32_t bytes);
void check_plain_write(const void* address, uint32_t bytes);

}  // namespace emulation
