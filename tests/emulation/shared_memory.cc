// Shared memory of the running CTA, twice: as threads see it and as the async proxy (wgmma, bulk copies) sees it. A
// thread's stores and cp.async reach the second view when that thread executes fence_proxy_async.
#include <sys/mman.h>

#include <algorithm>

#include "machine.h"

extern uint8_t __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern uint8_t __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulation {
namespace {

constexpr uint32_t kWindow = 1024;              // shared address of dynamic memory
constexpr uint32_t kStaticWindow = 240 * 1024;  // of __shared__ variables
constexpr uint32_t kCapacity = 232448;
constexpr uint8_t kPoison = 0xFF;  // NaN in e4m3, bf16 and float32
constexpr uint8_t kBeyond = 0xA5;

alignas(1024) uint8_t ordinary[kCapacity + 1024];
alignas(1024) uint8_t async_view[kCapacity];
uint32_t dynamic_bytes = 0;

uint32_t static_bytes() { return uint32_t(__stop_emulated_shared - __start_emulated_shared); }

}  // namespace

void reset_shared_memory(uint32_t bytes) {
  dynamic_bytes = bytes;
  std::memset(ordinary, kPoison, bytes);
  std::memset(ordinary + bytes, kBeyond, 1024);
  std::memset(async_view, kPoison, bytes);
  std::memset(__start_emulated_shared, kPoison, static_bytes());
}

void check_shared_memory() {
  for (uint32_t i = 0; i < 1024; ++i)
    if (ordinary[dynamic_bytes + i] != kBeyond)
      fail("dynamic shared memory was written %u bytes past its end (%u bytes)", i, dynamic_bytes);
}

uint8_t* dynamic_shared() { return ordinary; }

bool is_shared(const void* p) {
  const auto* at = static_cast<const uint8_t*>(p);
  return (at >= ordinary && at < ordinary + dynamic_bytes) ||
         (at >= __start_emulated_shared && at < __stop_emulated_shared);
}

uint32_t shared_address(const void* p) {
  const auto* at = static_cast<const uint8_t*>(p);
  if (at >= ordinary && at <= ordinary + dynamic_bytes) return kWindow + uint32_t(at - ordinary);
  if (at >= __start_emulated_shared && at < __stop_emulated_shared)
    return kStaticWindow + uint32_t(at - __start_emulated_shared);
  fail("the shared address of %p was asked, which is not in shared memory", p);
}

SharedViews shared_views(uint32_t smem, uint32_t bytes, const char* what) {
  if (smem >= kStaticWindow && smem + bytes <= kStaticWindow + static_bytes()) {
    uint8_t* at = __start_emulated_shared + (smem - kStaticWindow);
    return {at, at};
  }
  if (smem < kWindow || smem + bytes > kWindow + dynamic_bytes)
    fail("%s: shared bytes [%#x, %#x) are outside the CTA's memory [%#x, %#x)", what, smem, smem + bytes, kWindow,
         kWindow + dynamic_bytes);
  return {ordinary + (smem - kWindow), async_view + (smem - kWindow)};
}

const uint8_t* read_shared(uint32_t smem, uint32_t bytes) {
  if (smem % bytes) fail("a %u-byte shared load at %#x is misaligned", bytes, smem);
  const SharedViews views = shared_views(smem, bytes, "shared load");
  check_read(smem, bytes);
  return views.ordinary;
}

void note_ordinary_write(Thread& thread, uint32_t smem, uint32_t bytes) { thread.unpublished.push_back({smem, bytes}); }

void write_shared(uint32_t smem, const void* from, uint32_t bytes) {
  if (smem % bytes) fail("a %u-byte shared store at %#x is misaligned", bytes, smem);
  const SharedViews views = shared_views(smem, bytes, "shared store");
  check_write(smem, bytes);
  std::memcpy(views.ordinary, from, bytes);
  note_ordinary_write(*current, smem, bytes);
}

void publish_to_async_proxy() {
  for (const ByteRange& range : current->unpublished) {
    const SharedViews views = shared_views(range.begin, range.bytes, "fence");
    if (views.async != views.ordinary) std::memcpy(views.async, views.ordinary, range.bytes);
  }
  current->unpublished.clear();
}

}  // namespace emulation
