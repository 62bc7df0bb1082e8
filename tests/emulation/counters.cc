// Counters in global memory by which the threads of a CTA, or of CTAs that ran before it, tell each other what is
// written.
#include "machine.h"
#include "overlap.h"

namespace emulation {
namespace {
const char any_counter = 0;  // what is waited on
}

void decrement_counter(int32_t* counter) {
  check_global_read(counter, sizeof *counter);
  check_global_write(counter, sizeof *counter);
  --*counter;
  wake(&any_counter, 0, num_threads());
}

int read_counter(const int32_t* counter) {
  check_global_read(counter, sizeof *counter);
  return *counter;
}

// Nothing runs between a thread's look at a counter and this.
void wait_for_a_counter() { block(&any_counter, {"any counter in memory (%llu, %llu)", 0, 0}); }

}  // namespace emulation
