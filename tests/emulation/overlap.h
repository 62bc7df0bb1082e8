// Kernels that were launched to overlap the ones before them. They run one after another here, so what matters is what
// they could have done too early: accesses of global memory before wait_for_previous_kernel() that meet those of an
// earlier kernel. A chain is a launch that does not overlap and those after it that do.
#pragma once
#include <cstdint>

namespace emulation {

// A call begins: before its first launch may have run any kernel, on any buffer of guarded_memory.h.
void forget_earlier_kernels();
void begin_kernel(bool overlaps);
void begin_cta();
void end_kernel();
void start_next_kernel();  // the current thread lets it
// Accesses of global memory by the current thread.
void check_global_read(const void* address, uint32_t bytes);
void check_global_write(const void* address, uint32_t bytes);

}  // namespace emulation
