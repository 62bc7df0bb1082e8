// Runs the CTAs of a launch one after another, the threads of a CTA in turns, switching where a thread waits. The order
// is drawn from the seed. When no thread can go on, a bulk copy in flight lands; when there is none, it is a deadlock.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <numeric>

#include "guarded_memory.h"
#include "machine.h"
#include "overlap.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

Thread* current = nullptr;
Settings settings;
std::string last_error;

namespace {

std::vector<Thread> threads;
std::vector<int> ready;
Fiber scheduler;
const std::function<void()>* kernel_thread = nullptr;
uint64_t random_state = 1;
bool running = false;
sigjmp_buf abandon_launch;
// Drawn for every CTA: whose turn it is, and how soon bulk copies land.
enum class Order { kUniform, kWarpPriority } order;
enum class Landing { kLate, kSometimes, kAtOnce } landing;

std::string where() {
  if (!running) return "";
  std::string text = " [CTA " + std::to_string(blockIdx.x);
  if (current)
    text += ", thread " + std::to_string(current->index) + " (warp " + std::to_string(current->index / 32) + ")";
  return text + ", seed " + std::to_string(settings.seed) + "]";
}

[[noreturn]] void abandon(std::string text) {
  last_error = std::move(text);
  if (!running) {
    std::fprintf(stderr, "emulation: %s\n", last_error.c_str());
    std::abort();
  }
  siglongjmp(abandon_launch, 1);
}

void on_signal(int signal, siginfo_t* info, void*) {
  char text[160];
  const int stack = overflown_stack(info->si_addr);
  if (signal == SIGILL || signal == SIGTRAP)
    std::snprintf(text, sizeof text,
                  "undefined behaviour: a misaligned access, an index outside its array or an integer overflow");
  else if (stack >= 0)
    std::snprintf(text, sizeof text, "the stack of thread %d is full", stack);
  else
    std::snprintf(text, sizeof text, "access to %p, which is no memory of the kernel", info->si_addr);
  abandon(text + describe_address(info->si_addr) + where());
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

// While it lives, a fault in a kernel ends the launch with a message instead of the process.
class CatchFaults {
 public:
  CatchFaults() {
    static std::vector<char> memory(64 * 1024);
    stack_t stack{};
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~CatchFaults() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  struct sigaction old_[std::size(kSignals)];
  stack_t old_stack_;
};

void leave() { switch_fiber(current->fiber, scheduler); }

void thread_entry() {
  (*kernel_thread)();
  finish_thread_wgmma(*current);
  finish_thread_copies(*current);
  release_collective(*current);
  current->done = true;
  leave();
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::vector<int>> waiting;
  int exited = 0;
  for (const Thread& t : threads) {
    if (t.done) {
      ++exited;
      continue;
    }
    char what[160];
    std::snprintf(what, sizeof what, t.waits_for.what, t.waits_for.a, t.waits_for.b);
    waiting[std::string(what) + " " + t.waits_for.where].push_back(t.index);
  }
  std::string text = "deadlock: no thread can go on, no copy is in flight" + where() + "\n";
  for (const auto& [what, who] : waiting) {
    text += "  " + what + ": threads";
    for (size_t i = 0; i < who.size();) {
      size_t end = i + 1;
      while (end < who.size() && who[end] == who[end - 1] + 1) ++end;
      text += " " + std::to_string(who[i]) + (end > i + 1 ? "-" + std::to_string(who[end - 1]) : "");
      i = end;
    }
    text += "\n";
  }
  text += "  exited: " + std::to_string(exited) + " threads\n" + describe_barriers();
  abandon(text);
}

int take_ready() {
  size_t at = random_below(uint32_t(ready.size()));
  if (order == Order::kWarpPriority)
    for (size_t i = 0; i < ready.size(); ++i)
      if (threads[ready[i]].priority > threads[ready[at]].priority) at = i;
  const int index = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return index;
}

void run_cta(uint32_t dynamic_bytes) {
  const int count = int(blockDim.x);
  reset_shared_memory(dynamic_bytes);
  reset_barriers();
  reset_copies();
  reset_wgmma();
  reset_races(count);
  begin_cta();
  threads.clear();
  threads.resize(count);
  ready.resize(count);
  std::iota(ready.begin(), ready.end(), 0);
  order = Order(random_below(2));
  landing = Landing(random_below(3));
  int priority[32];
  for (int& p : priority) p = int(random_below(1 << 16));
  for (int i = 0; i < count; ++i) {
    threads[i].index = i;
    threads[i].ready = true;
    threads[i].priority = priority[i / 32];
    prepare_fiber(threads[i].fiber, i, thread_entry);
  }
  for (int exited = 0; exited < count;) {
    if (ready.empty()) {
      if (!land_one_copy()) report_deadlock();
      continue;
    }
    if (landing == Landing::kSometimes && random_below(64) == 0) land_one_copy();
    while (landing == Landing::kAtOnce && land_one_copy()) {
    }
    current = &threads[take_ready()];
    threadIdx = {unsigned(current->index), 0, 0};
    switch_fiber(scheduler, current->fiber);
    exited += current->done;
    current = nullptr;
  }
  check_copies();
  check_wgmma();
  check_shared_memory();
}

}  // namespace

Thread& thread(int index) { return threads[index]; }
int num_threads() { return int(threads.size()); }

uint32_t random_below(uint32_t limit) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t((random_state >> 32) * uint64_t(limit) >> 32);
}

void block(const void* on, Wait wait) {
  current->ready = false;
  current->waits_on = on;
  current->waits_for = wait;
  leave();
}

void wake(const void* on, int first_thread, int end_thread) {
  for (int i = first_thread; i < end_thread; ++i) {
    Thread& t = threads[i];
    if (t.ready || t.done || t.waits_on != on) continue;
    t.ready = true;
    t.waits_on = nullptr;
    ready.push_back(i);
  }
}

void yield() {
  if (!current) return;
  ready.push_back(current->index);
  leave();
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  abandon(text + where());
}

cudaError_t run_grid(const std::function<void()>& each_thread, dim3 grid, dim3 block, uint32_t dynamic_bytes,
                     bool overlaps_previous) {
  random_state = 0x9E3779B97F4A7C15ull * (settings.seed + 1);
  for (int i = 0; i < 8; ++i) random_below(2);
  CatchFaults faults;
  kernel_thread = &each_thread;
  gridDim = grid;
  blockDim = block;
  static std::vector<unsigned> ctas;
  ctas.resize(grid.x);
  std::iota(ctas.begin(), ctas.end(), 0u);
  for (uint32_t i = grid.x; i > 1; --i) std::swap(ctas[i - 1], ctas[random_below(i)]);
  begin_kernel(overlaps_previous);
  running = true;
  if (sigsetjmp(abandon_launch, 1)) {
    running = false;
    current = nullptr;
    return cudaErrorLaunchFailure;
  }
  for (const unsigned cta : ctas) {
    blockIdx = {cta, 0, 0};
    run_cta(dynamic_bytes);
  }
  end_kernel();
  running = false;
  return cudaSuccess;
}

}  // namespace emulation
