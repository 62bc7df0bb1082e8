// One mapping a buffer: trap pages, slack, the buffer, slack, trap pages.
#include "guarded_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <vector>

namespace emulation {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kGuard = 16 * kPage;
constexpr uint8_t kSlack = 0x5A;

struct Guarded {
  uint8_t *mapping, *buffer;
  int64_t mapped, bytes;
  std::string name;
};
std::vector<Guarded> buffers;

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

}  // namespace

void* allocate_guarded(int64_t bytes, bool at_start, const char* name) {
  const int64_t inner = round_up(bytes < 1 ? 1 : bytes, kPage), mapped = inner + 2 * kGuard;
  void* memory = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto* base = static_cast<uint8_t*>(memory) + kGuard;
  mprotect(base, inner, PROT_READ | PROT_WRITE);
  uint8_t* buffer = at_start ? base : base + inner - round_up(bytes, 16);
  std::memset(base, kSlack, buffer - base);
  std::memset(buffer + bytes, kSlack, base + inner - buffer - bytes);
  if (bytes < kSparseBytes) std::memset(buffer, 0xFF, bytes);
  buffers.push_back({static_cast<uint8_t*>(memory), buffer, mapped, bytes, name});
  return buffer;
}

bool free_guarded(void* pointer) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Guarded b = buffers[i];
    if (b.buffer != pointer) continue;
    bool intact = true;
    for (const uint8_t* p = b.mapping + kGuard; p < b.buffer; ++p) intact &= *p == kSlack;
    for (const uint8_t* p = b.buffer + b.bytes; p < b.mapping + b.mapped - kGuard; ++p) intact &= *p == kSlack;
    munmap(b.mapping, b.mapped);
    buffers.erase(buffers.begin() + i);
    return intact;
  }
  return false;
}

bool is_guarded(const void* address) { return !describe_address(address).empty(); }

std::string describe_address(const void* address) {
  const auto* p = static_cast<const uint8_t*>(address);
  for (const Guarded& b : buffers)
    if (p >= b.mapping && p < b.mapping + b.mapped) {
      const int64_t at = p - b.buffer;
      return ": byte " + std::to_string(at) + " of '" + b.name + "', which has " + std::to_string(b.bytes) + " bytes";
    }
  return "";
}

}  // namespace emulation
