// x86-64 (System V) switches by hand; elsewhere ucontext does, slower.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

namespace emulation {
namespace {

constexpr int kMaxFibers = 1024;
constexpr size_t kPage = 4096;
uint8_t* stacks = nullptr;

uint8_t* stack(int index) {
  if (!stacks) {
    void* memory = mmap(nullptr, kMaxFibers * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("stacks of emulated threads");
      std::abort();
    }
    stacks = static_cast<uint8_t*>(memory);
    for (int i = 0; i < kMaxFibers; ++i) mprotect(stacks + i * kStackBytes, kPage, PROT_NONE);
  }
  return stacks + index * kStackBytes;
}

}  // namespace

bool on_fiber_stack(const void* address) {
  const auto* p = static_cast<const uint8_t*>(address);
  return stacks && p >= stacks && p < stacks + kMaxFibers * kStackBytes;
}

int overflown_stack(const void* address) {
  if (!on_fiber_stack(address)) return -1;
  const size_t offset = size_t(static_cast<const uint8_t*>(address) - stacks);
  return offset % kStackBytes < kPage ? int(offset / kStackBytes) : -1;
}

#ifdef EMULATION_USES_UCONTEXT

void prepare_fiber(Fiber& fiber, int index, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack(index) + kPage;
  fiber.context.uc_stack.ss_size = kStackBytes - kPage;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

void prepare_fiber(Fiber& fiber, int index, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack(index) + kStackBytes);
  *--top = nullptr;  // entry's own return address; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emulation
