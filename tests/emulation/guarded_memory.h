// Buffers with pages around them that trap, for the arrays that kernels get.
#pragma once
#include <cstdint>
#include <string>

namespace emulation {

// `bytes` of 0xFF, 16-byte aligned, touching the trap page behind (or, with at_start, the one before). From
// kSparseBytes on they are 0 instead, and take memory where they are written only.
inline constexpr int64_t kSparseBytes = int64_t(1) << 30;
void* allocate_guarded(int64_t bytes, bool at_start, const char* name);
// Says whether the up to 15 bytes between the buffer and the trap page are as they were.
bool free_guarded(void* buffer);
bool is_guarded(const void* address);
// Where an address is, seen from the nearest buffer; empty when it is near none.
std::string describe_address(const void* address);

}  // namespace emulation
