// Work shared by threads: items are numbered, every thread takes the next one until none is left. Threads live for one
// Parallel() only, so nothing is shared between calls. JAX_MOE_NUM_THREADS sets how many there are (default: all
// cores).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace jax_moe::cpu {

class WorkQueue {
 public:
  explicit WorkQueue(int64_t count) : count_(count) {}
  // Whether there was an item left; it is the caller's now.
  bool Next(int64_t* item) {
    *item = next_.fetch_add(1, std::memory_order_relaxed);
    return *item < count_;
  }
  void Close() { next_.store(count_, std::memory_order_relaxed); }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

inline int64_t NumThreads() {
  const char* text = std::getenv("JAX_MOE_NUM_THREADS");
  const int64_t wanted = text ? std::strtol(text, nullptr, 10) : 0;
  return wanted > 0 ? std::min<int64_t>(wanted, 1024) : std::max(1u, std::thread::hardware_concurrency());
}

// Runs worker(queue) on as many threads as `count` items of `work_per_item` multiply-adds are worth, the calling thread
// among them. The first exception of a worker is thrown here, after all have ended.
template <class Worker>
void Parallel(int64_t count, int64_t work_per_item, const Worker& worker) {
  if (count == 0) return;
  constexpr int64_t kWorkPerThread = 1 << 20;  // below this, starting a thread costs more than it saves
  const int64_t worth = std::min(count, 1 + count * work_per_item / kWorkPerThread);
  const int64_t num_threads = worth > 1 ? std::min(worth, NumThreads()) : 1;
  WorkQueue queue(count);
  std::mutex mutex;
  std::exception_ptr failure;
  const auto run = [&]() noexcept {
    try {
      worker(queue);
    } catch (...) {
      queue.Close();
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(num_threads - 1);
  try {
    while (int64_t(threads.size()) < num_threads - 1) threads.emplace_back(run);
  } catch (const std::exception&) {
    // The system has no more threads: the ones there are do the work.
  }
  run();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace jax_moe::cpu
