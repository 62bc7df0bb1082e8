// The bytes of global memory that the kernels of a chain have read and written, a bit each.
#include "overlap.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "guarded_memory.h"
#include "machine.h"

namespace emulation {
namespace {

constexpr uintptr_t kPage = 4096;

class ByteSet {
 public:
  void clear() {
    pages_.clear();
    std::fill(std::begin(recent_), std::end(recent_), Recent{});
  }
  void add(const void* address, uint32_t bytes) {
    each_word(address, bytes, [this](uintptr_t page, int word, uint64_t bits) {
      Recent& recent = recent_[page % std::size(recent_)];
      if (recent.page != page || !recent.bytes) {
        auto& found = pages_[page];
        if (!found) found = std::make_unique<Page>();
        recent = {page, found.get()};
      }
      recent.bytes->words[word] |= bits;
      return false;
    });
  }
  void add(const ByteSet& other) {
    for (const auto& [page, from] : other.pages_) {
      auto& to = pages_[page];
      if (!to) to = std::make_unique<Page>();
      for (size_t i = 0; i < std::size(to->words); ++i) to->words[i] |= from->words[i];
    }
  }
  bool has_any(const void* address, uint32_t bytes) const {
    return each_word(address, bytes, [this](uintptr_t page, int word, uint64_t bits) {
      const auto found = pages_.find(page);
      return found != pages_.end() && found->second->words[word] & bits;
    });
  }

 private:
  struct Page {
    uint64_t words[kPage / 64] = {};
  };
  struct Recent {
    uintptr_t page;
    Page* bytes;
  };

  // Until `visit`(page, word of the page, bits of the word) says true.
  template <class Visit>
  static bool each_word(const void* address, uint32_t bytes, Visit visit) {
    uintptr_t at = reinterpret_cast<uintptr_t>(address);
    for (const uintptr_t end = at + bytes; at < end;) {
      const uintptr_t count = std::min<uintptr_t>(64 - at % 64, end - at);
      const uint64_t bits = (count == 64 ? ~0ull : (1ull << count) - 1) << at % 64;
      if (visit(at / kPage, int(at % kPage / 64), bits)) return true;
      at += count;
    }
    return false;
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Recent recent_[64] = {};  // of pages_, to find them sooner
};

struct Footprint {
  ByteSet read, written;
};
Footprint earlier, own;       // of the chain's kernels so far; of the one that runs
bool anything_ran = true;     // before the chain: its first kernel overlaps what is not known
bool overlaps = false;        // the kernel that runs
bool waited_for = false;      // by any of its threads
bool let_next_start = false;  // by a thread that had not waited itself
std::vector<Moment> waiters;  // of this CTA: what they have waited for is over for whoever comes after them

// What the earlier kernels did is done and visible, as far as the current thread can know.
bool earlier_kernels_ended() {
  if (!overlaps || current->earlier_kernels_ended) return true;
  current->earlier_kernels_ended = std::any_of(waiters.begin(), waiters.end(), in_past);
  return current->earlier_kernels_ended;
}

[[noreturn]] void report(const void* address, const char* access, const char* earlier_access) {
  fail("global memory at %p is %s before wait_for_previous_kernel(), and an earlier kernel%s %s it%s", address, access,
       anything_ran ? " may have" : " has", earlier_access, describe_address(address).c_str());
}

}  // namespace

void forget_earlier_kernels() {
  earlier.read.clear();
  earlier.written.clear();
  anything_ran = true;
}

void begin_kernel(bool overlaps_previous) {
  own.read.clear();
  own.written.clear();
  overlaps = overlaps_previous;
  waited_for = let_next_start = false;
  if (overlaps) return;
  forget_earlier_kernels();
  anything_ran = false;
}

void begin_cta() { waiters.clear(); }

// The next kernel may start while this one runs. What came before this one is over by then, if every thread that let
// the next one start had waited for it.
void end_kernel() {
  if (overlaps && !waited_for)
    fail("a kernel that overlaps the ones before it ends, and no thread of it has called wait_for_previous_kernel()");
  if (overlaps && !let_next_start) {
    forget_earlier_kernels();
    anything_ran = false;
  }
  earlier.read.add(own.read);
  earlier.written.add(own.written);
}

void start_next_kernel() { let_next_start |= !earlier_kernels_ended(); }

void wait_for_earlier_kernels() {
  waited_for = true;
  current->earlier_kernels_ended = true;
  waiters.push_back(this_moment());
  yield();
}

void check_global_read(const void* address, uint32_t bytes) {
  if (on_fiber_stack(address)) return;
  if (!earlier_kernels_ended() && (earlier.written.has_any(address, bytes) || (anything_ran && is_guarded(address))))
    report(address, "read", "written");
  own.read.add(address, bytes);
}

void check_global_write(const void* address, uint32_t bytes) {
  if (on_fiber_stack(address)) return;
  if (!earlier_kernels_ended() && (earlier.written.has_any(address, bytes) || earlier.read.has_any(address, bytes) ||
                                   (anything_ran && is_guarded(address))))
    report(address, "written", "accessed");
  own.written.add(address, bytes);
}

void check_read_only_load(const void* address, uint32_t bytes) {
  if (own.written.has_any(address, bytes))
    fail("a read-only load (__ldg) of global memory at %p, which this kernel writes%s", address,
         describe_address(address).c_str());
  if (overlaps && earlier.written.has_any(address, bytes))
    fail("a read-only load (__ldg) of global memory at %p, which a kernel writes that this one overlaps%s", address,
         describe_address(address).c_str());
}

}  // namespace emulation
