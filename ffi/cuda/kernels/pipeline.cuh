// The ring of shared-memory stages between a producer and math warps. Each stage has two mbarriers: `full`, completed
// when its data have landed (awaited by math warps), and `empty`, completed when every math warp has read it (awaited
// by the producer). Both sides walk the ring with their own cursor.
#pragma once
#include "ptx.cuh"

namespace jax_moe::cuda {

// One register: the number of the stage, counted on. NOTE: where kStages is no power of two, 2^32 stages are too many.
template <int kStages>
class PipelineCursor {
 public:
  DEVICE int stage() const { return int(number_ % kStages); }
  DEVICE uint32_t parity() const { return number_ / kStages % 2; }  // of the phase that this lap of the ring completes
  DEVICE void advance() { ++number_; }
  DEVICE uint32_t number() const { return number_; }
  DEVICE PipelineCursor next() const {
    PipelineCursor other = *this;
    other.advance();
    return other;
  }

 private:
  uint32_t number_ = 0;
};

template <int kStages>
struct PipelineBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // By one thread; followed by a CTA barrier.
  DEVICE void initialize(uint32_t full_arrivals, uint32_t empty_arrivals) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem_address(&full[i]), full_arrivals);
      mbarrier_init(smem_address(&empty[i]), empty_arrivals);
    }
    mbarrier_fence_init();
  }
  DEVICE uint32_t full_address(int stage) const { return smem_address(&full[stage]); }
  // A cursor has a stage() and a parity(), wherever its number of stages comes from.
  template <class Cursor>
  DEVICE void wait_full(const Cursor& at) const {
    mbarrier_wait(smem_address(&full[at.stage()]), at.parity());
  }
  // Whether that would return at once.
  template <class Cursor>
  DEVICE bool is_full(const Cursor& at) const {
    return mbarrier_test(smem_address(&full[at.stage()]), at.parity());
  }
  // The first lap passes at once: a fresh barrier counts as having completed parity 1.
  template <class Cursor>
  DEVICE void wait_empty(const Cursor& at) const {
    mbarrier_wait(smem_address(&empty[at.stage()]), at.parity() ^ 1);
  }
  template <class Cursor>
  DEVICE void release(const Cursor& at) const {
    mbarrier_arrive(smem_address(&empty[at.stage()]));
  }
};

}  // namespace jax_moe::cuda
