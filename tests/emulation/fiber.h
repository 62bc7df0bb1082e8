// A stack of its own for every emulated thread, and the switch between two of them.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__) || defined(EMULATION_UCONTEXT)
#define EMULATION_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulation {

inline constexpr size_t kStackBytes = 64 * 1024;  // the lowest page of a stack traps

struct Fiber {
#ifdef EMULATION_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

// Prepares `fiber` to run entry(); entry never returns. Stack number `index` is reused by later fibers of that number.
void prepare_fiber(Fiber& fiber, int index, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
bool on_fiber_stack(const void* address);
// The number of the stack whose trap page holds this address, or -1.
int overflown_stack(const void* address);

}  // namespace emulation
