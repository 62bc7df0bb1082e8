// Where threads of a warp or a CTA meet. Every lane of the mask has to come, with the same instruction and the same
// mask; what each brings is up to 24 bytes that all of them can read (barriers.cc).
#pragma once
#include <cstdint>
#include <cstring>

namespace emulation {

struct LanePayload {
  uint32_t words[6];
};
enum class Meeting {
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kVote,
  kMatch,
  kReduce,
  kStoreMatrix,
  kLoadMatrix,
  kMultiply,
  kWgmma,
  kRegisters
};

// Returns the payloads of all 32 lanes once all lanes of `mask` are there. `last` (may be null) runs once, in the lane
// that came last, before any lane goes on.
const LanePayload* meet(Meeting kind, uint32_t mask, const LanePayload& mine,
                        void (*last)(const LanePayload*) = nullptr);
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
int lane();
int cta_threads();

template <class T>
LanePayload pack(T v) {
  static_assert(sizeof(T) <= 8);
  LanePayload p{};
  std::memcpy(p.words, &v, sizeof v);
  return p;
}
template <class T>
T unpack(const LanePayload& p) {
  T v;
  std::memcpy(&v, p.words, sizeof v);
  return v;
}
template <class T>
T shuffle(Meeting kind, uint32_t mask, T v, int source, bool valid) {
  const LanePayload* all = meet(kind, mask, pack(v));
  if (!valid) return v;
  if (!(mask >> source & 1)) fail("a shuffle reads lane %d, which is not in its mask %08x", source, mask);
  return unpack<T>(all[source]);
}
template <class T, class Combine>
T reduce(uint32_t mask, T v, Combine combine) {
  const LanePayload* all = meet(Meeting::kReduce, mask, pack(v));
  bool first = true;
  T result = v;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      result = first ? unpack<T>(all[i]) : combine(result, unpack<T>(all[i]));
      first = false;
    }
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier_sync(0, emulation::cta_threads()); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::meet(emulation::Meeting::kSyncWarp, mask, {}); }
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const int first = emulation::lane() / width * width;
  return emulation::shuffle(emulation::Meeting::kShuffle, mask, v, first + (source & (width - 1)), true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int source = emulation::lane() - int(delta), first = emulation::lane() / width * width;
  return emulation::shuffle(emulation::Meeting::kShuffleUp, mask, v, source, source >= first);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int source = emulation::lane() + int(delta), last = emulation::lane() / width * width + width;
  return emulation::shuffle(emulation::Meeting::kShuffleDown, mask, v, source, source < last);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  const int source = emulation::lane() ^ lanes, last = emulation::lane() / width * width + width;
  return emulation::shuffle(emulation::Meeting::kShuffleXor, mask, v, source, source < last);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulation::LanePayload* all =
      emulation::meet(emulation::Meeting::kVote, mask, emulation::pack(predicate != 0 ? 1 : 0));
  unsigned result = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && all[i].words[0]) result |= 1u << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  const emulation::LanePayload* all = emulation::meet(emulation::Meeting::kMatch, mask, emulation::pack(v));
  unsigned result = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && emulation::unpack<T>(all[i]) == v) result |= 1u << i;
  return result;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return emulation::reduce(mask, v, [](unsigned a, unsigned b) { return a | b; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
  return emulation::reduce(mask, v, [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T v) {
  return emulation::reduce(mask, v, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v) {
  return emulation::reduce(mask, v, [](T a, T b) { return a < b ? a : b; });
}
