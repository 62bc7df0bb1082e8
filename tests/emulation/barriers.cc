// Where threads meet: named barriers (0 is __syncthreads), mbarriers, and the collectives of a warp.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>

#include "machine.h"

namespace emulation {

struct Collective {
  Meeting kind;
  uint32_t mask, arrived;
  int warp, readers;
  LanePayload payload[32];
  Clock clock;
};

namespace {

constexpr uint64_t kMagic = 0x7265697272616d00;  // in the 8 bytes of an mbarrier, to see them overwritten
constexpr const char* kMeetings[] = {
    // in the order of Meeting
    "__syncwarp",       "__shfl_sync",      "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "a vote",
    "__match_any_sync", "a warp reduction", "stmatrix",       "ldmatrix",         "mma.sync",        "wgmma",
    "setmaxnreg",
};

struct NamedBarrier {
  int expected, arrived, uses;
  Clock clocks[2];  // of even and odd uses
};
struct Mbarrier {
  uint32_t arrivals, pending, bytes, phase;
  Clock told, completed;      // by all arrivals; by those of completed phases
  std::vector<Moment> waits;  // that have seen the last completed phase
};

NamedBarrier named[16];
std::map<uint32_t, Mbarrier> mbarriers;  // by shared address; references stay valid
std::deque<Collective> pool;             // references stay valid
std::vector<Collective*> unused;
std::vector<std::vector<Collective*>> gathering;  // by warp

Mbarrier& find_mbarrier(uint32_t smem, const char* what) {
  const auto found = mbarriers.find(smem);
  if (found == mbarriers.end()) fail("%s: there is no initialised mbarrier at %#x", what, smem);
  if (*reinterpret_cast<const uint64_t*>(shared_views(smem, 8, what).ordinary) != kMagic)
    fail("%s: the mbarrier at %#x has been overwritten", what, smem);
  return found->second;
}

// NOTE: a thread that waits for a phase sees parity only: it must have gone on before the next phase completes.
void complete_if_due(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  for (const Moment& wait : b.waits)
    if (b.told.size() <= wait.thread || b.told[wait.thread] < wait.time)
      fail("race: phase %u of an mbarrier completes, and nothing orders that after thread %u has seen phase %d",
           b.phase, wait.thread, int(b.phase) - 1);
  b.waits.clear();
  ++b.phase;
  b.completed = b.told;
  b.pending = b.arrivals;
  wake(&b, 0, num_threads());
}

void arrive_named(int id, int count, NamedBarrier& b) {
  if (id < 0 || id > 15) fail("barrier %d: there are 16", id);
  if (count % 32 || count <= 0 || count > num_threads())
    fail("barrier %d: %d threads of a CTA of %d", id, count, num_threads());
  if (b.arrived && b.expected != count)
    fail("barrier %d: this thread expects %d threads, those that came before expect %d", id, count, b.expected);
  b.expected = count;
  if (count < num_threads()) release_to(b.clocks[b.uses % 2]);
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.uses;
    if (count == num_threads()) order_all_threads();
    wake(&b, 0, num_threads());
  }
}

}  // namespace

void reset_barriers() {
  for (NamedBarrier& b : named) b = {};
  mbarriers.clear();
  pool.clear();
  unused.clear();
  gathering.assign(32, {});
}

std::string describe_barriers() {
  std::string text;
  char line[160];
  for (int i = 0; i < 16; ++i) {
    if (!named[i].arrived) continue;
    std::snprintf(line, sizeof line, "  barrier %d: %d of %d threads have come (use %d)\n", i, named[i].arrived,
                  named[i].expected, named[i].uses);
    text += line;
  }
  for (const auto& [smem, b] : mbarriers) {
    std::snprintf(line, sizeof line, "  mbarrier %#x: phase %u, %u of %u arrivals missing, %u bytes missing\n", smem,
                  b.phase, b.pending, b.arrivals, b.bytes);
    text += line;
  }
  return text;
}

// ---- named barriers -------------------------------------------------------------------------------------------------
void barrier_sync(int id, int count) {
  NamedBarrier& b = named[id & 15];
  const int use = b.uses;
  arrive_named(id, count, b);
  while (b.uses == use) block(&b, {"barrier %llu of %llu threads", unsigned(id), unsigned(count)});
  if (count < num_threads()) acquire_from(b.clocks[use % 2]);
}

void barrier_arrive(int id, int count) { arrive_named(id, count, named[id & 15]); }

// ---- mbarriers ------------------------------------------------------------------------------------------------------
void init_mbarrier(uint32_t smem, uint32_t arrivals) {
  if (smem % 8) fail("an mbarrier at %#x is not 8-byte aligned", smem);
  if (arrivals < 1 || arrivals >= 1 << 20) fail("an mbarrier of %u arrivals", arrivals);
  if (mbarriers.count(smem)) fail("the mbarrier at %#x is initialised twice", smem);
  *reinterpret_cast<uint64_t*>(shared_views(smem, 8, "mbarrier_init").ordinary) = kMagic;
  mbarriers[smem] = {arrivals, arrivals, 0, 0, {}, {}, {}};
}

void arrive_mbarrier(uint32_t smem, uint32_t bytes) {
  Mbarrier& b = find_mbarrier(smem, "mbarrier_arrive");
  if (b.pending == 0)
    fail("mbarrier %#x: an arrival more than the %u of a phase (phase %u waits for %u bytes)", smem, b.arrivals,
         b.phase, b.bytes);
  b.bytes += bytes;
  release_to(b.told);
  if (b.bytes >= 1 << 20) fail("mbarrier %#x: %u bytes expected, 2^20 - 1 is the limit", smem, b.bytes);
  --b.pending;
  complete_if_due(b);
}

void complete_mbarrier_bytes(uint32_t smem, uint32_t bytes, Moment issued) {
  Mbarrier& b = find_mbarrier(smem, "bulk copy");
  if (b.bytes < bytes)
    fail("mbarrier %#x: a bulk copy brings %u bytes, phase %u expects %u more", smem, bytes, b.phase, b.bytes);
  b.bytes -= bytes;
  release_moment(b.told, issued);
  complete_if_due(b);
}

void arrive_late(uint32_t smem, Moment issued) {
  Mbarrier& b = find_mbarrier(smem, "cp_async_arrive");
  if (b.pending == 0)
    fail("mbarrier %#x: an arrival more than the %u of a phase, after cp.async (phase %u waits for %u bytes)", smem,
         b.arrivals, b.phase, b.bytes);
  release_moment(b.told, issued);
  --b.pending;
  complete_if_due(b);
}

void wait_mbarrier(uint32_t smem, uint32_t parity) {
  if (parity > 1) fail("mbarrier %#x: parity %u", smem, parity);
  Mbarrier& b = find_mbarrier(smem, "mbarrier_wait");
  // A phase of that parity is the last completed one exactly when the running one has the other parity.
  while ((b.phase & 1) == parity) block(&b, {"mbarrier %#llx for parity %llu", smem, parity});
  acquire_from(b.completed);
  b.waits.push_back(this_moment());
}

bool test_mbarrier(uint32_t smem, uint32_t parity) {
  if ((find_mbarrier(smem, "mbarrier_test").phase & 1) == parity) return false;
  wait_mbarrier(smem, parity);
  return true;
}

// ---- warps ----------------------------------------------------------------------------------------------------------
int lane() { return current->index % 32; }
int cta_threads() { return num_threads(); }

void release_collective(Thread& t) {
  if (t.held && --t.held->readers == 0) unused.push_back(t.held);
  t.held = nullptr;
}

const LanePayload* meet(Meeting kind, uint32_t mask, const LanePayload& mine, void (*last)(const LanePayload*)) {
  release_collective(*current);
  const int warp = current->index / 32, me = lane();
  const char* name = kMeetings[int(kind)];
  if (!(mask >> me & 1)) fail("%s: the mask %08x does not name this lane (%d)", name, mask, me);
  Collective* c = nullptr;
  for (Collective* other : gathering[warp]) {
    if (!(other->mask & mask)) continue;
    if (other->mask != mask || other->kind != kind)
      fail("%s with mask %08x: lanes %08x wait in %s with mask %08x", name, mask, other->arrived,
           kMeetings[int(other->kind)], other->mask);
    c = other;
  }
  if (!c) {
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && (warp * 32 + i >= num_threads() || thread(warp * 32 + i).done))
        fail("%s: lane %d is in the mask %08x and has exited", name, i, mask);
    if (unused.empty()) unused.push_back(&pool.emplace_back());
    c = unused.back();
    unused.pop_back();
    c->kind = kind;
    c->mask = mask;
    c->arrived = 0;
    c->warp = warp;
    c->clock.clear();
    c->readers = __builtin_popcount(mask);
    gathering[warp].push_back(c);
  }
  c->payload[me] = mine;
  c->arrived |= 1u << me;
  if (kind == Meeting::kSyncWarp) release_to(c->clock);
  current->held = c;
  if (c->arrived == mask) {
    auto& list = gathering[warp];
    for (size_t i = 0; i < list.size(); ++i)
      if (list[i] == c) list.erase(list.begin() + i);
    if (last) last(c->payload);
    wake(c, warp * 32, std::min(warp * 32 + 32, num_threads()));
  } else {
    block(c, {"lanes %#llx of warp %llu", mask, unsigned(warp), name});
  }
  if (kind == Meeting::kSyncWarp) acquire_from(c->clock);
  return c->payload;
}

}  // namespace emulation
