// wgmma and setmaxnreg. A wgmma reads its operands in shared memory when its warp commits it or when it
// waits for it (drawn for every CTA), each warp its own 16 rows; the accumulators hold NaN until the wait, and A in
// registers must not change until then. The four warps of a warpgroup must issue the same sequence.
#include <algorithm>
#include <functional>

#include "machine.h"
#include "number_formats.h"

namespace emulation {
namespace {

constexpr int kMostK = 32, kMaxN = 128, kWarpRows = 16;
constexpr int kRowBytes = 32;               // of an operand, of either type
constexpr uint32_t kInFlight = 0x7FBADBAD;  // NaN
constexpr uint32_t kRegistersOfSm = 65536;

struct Issued {
  uint64_t a, b;
  int n;
  bool accumulate;
  bool operator!=(const Issued& o) const { return a != o.a || b != o.b || n != o.n || accumulate != o.accumulate; }
};
Issued issued(const WgmmaOp& op) { return {op.a, op.b, op.n, op.accumulate}; }
struct Warpgroup {
  std::vector<Issued> issued;  // by whichever warp was first
  size_t executed[4];          // of them, by each warp
};
Warpgroup warpgroups[8];
bool early = false;  // operands are read at the commit

// How many of the thread's wgmmas have ended when all but the last `pending` groups have.
size_t ended(const Thread& t, size_t pending) {
  const std::vector<size_t>& ends = t.wgmma_groups;
  return ends.size() > pending ? ends[ends.size() - 1 - pending] : 0;
}

// 16 bytes of row `row`, K bytes [16 piece, 16 piece + 16), of the tile that a descriptor names.
const uint8_t* operand(uint64_t descriptor, int row, int piece, const char* name) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
  const uint32_t group_stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1)
    fail("wgmma %s: descriptor %#llx is not of a 128-byte swizzle", name, (unsigned long long)descriptor);
  if (start & 0x380)
    fail("wgmma %s: the tile at %#x does not begin at a multiple of 1024 (plus an offset in K)", name, start);
  const uint32_t linear = start + row / 8 * group_stride + row % 8 * 128 + piece * 16;
  const uint32_t at = linear ^ (linear >> 3 & 0x70);
  const SharedViews views = shared_views(at, 16, "wgmma operand");
  check_read(at, 16);
  if (std::memcmp(views.ordinary, views.async, 16) != 0)
    fail(
        "wgmma %s: row %d, shared address %#x: a thread wrote these bytes and no fence_proxy_async() of that thread "
        "followed",
        name, row, at);
  return views.async;
}

// The 16 bytes of an operand in shared memory as values.
void decode(const uint8_t* bytes, bool bf16, float* to, int stride) {
  for (int k = 0; k < (bf16 ? 8 : 16); ++k)
    to[k * stride] = bf16 ? from_bf16(uint16_t(bytes[2 * k] | bytes[2 * k + 1] << 8)) : from_e4m3(bytes[k]);
}

// d[16][n] (+)= A rows [16 warp_row ...] B^T, number `which` of the warp whose first thread is `first`.
void multiply(float (*d)[kMaxN], int first, size_t which, int warp_in_group) {
  static float b_values[kMostK][kMaxN];
  float a_values[kWarpRows][kMostK];
  const WgmmaOp& op = thread(first).wgmmas[which];
  const bool bf16 = op.a_registers != nullptr;
  const int num_k = bf16 ? 16 : 32, of_piece = num_k / 2;
  for (int n = 0; n < op.n; ++n)
    for (int piece = 0; piece < kRowBytes / 16; ++piece)
      decode(operand(op.b, n, piece, "B"), bf16, &b_values[piece * of_piece][n], kMaxN);
  for (int m = 0; m < kWarpRows; ++m) {
    for (int piece = 0; !bf16 && piece < kRowBytes / 16; ++piece)
      decode(operand(op.a, warp_in_group * kWarpRows + m, piece, "A"), false, &a_values[m][piece * of_piece], 1);
    for (int k = 0; bf16 && k < num_k; ++k) {
      const WgmmaOp& of_lane = thread(first + m % 8 * 4 + k % 8 / 2).wgmmas[which];
      a_values[m][k] = from_bf16(uint16_t(of_lane.a_values[m / 8 + k / 8 * 2] >> k % 2 * 16));
    }
  }
  for (int m = 0; m < kWarpRows; ++m) {
    float sums[kMaxN] = {};
    for (int k = 0; k < num_k; ++k) {
      const float v = a_values[m][k];
      for (int n = 0; n < op.n; ++n) sums[n] += v * b_values[k][n];
    }
    for (int n = 0; n < op.n; ++n) d[m][n] = op.accumulate ? d[m][n] + sums[n] : sums[n];
  }
}

// Operands may be read until the wait: says so of what was computed before.
void touch(const WgmmaOp& op, int warp_in_group) {
  for (int piece = 0; piece < kRowBytes / 16; ++piece) {
    for (int n = 0; n < op.n; ++n) operand(op.b, n, piece, "B");
    for (int m = 0; !op.a_registers && m < kWarpRows; ++m) operand(op.a, warp_in_group * kWarpRows + m, piece, "A");
  }
}

// Column and row (in the warp's 16) of accumulator i of a lane.
int fragment_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int fragment_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

void check_lanes_agree(int first) {
  const Thread& lane0 = thread(first);
  for (int lane = 1; lane < 32; ++lane) {
    const Thread& t = thread(first + lane);
    bool same = t.wgmmas.size() == lane0.wgmmas.size() && t.accumulators.size() == lane0.accumulators.size();
    for (size_t i = 0; same && i < t.wgmmas.size(); ++i) same = !(issued(t.wgmmas[i]) != issued(lane0.wgmmas[i]));
    if (!same) fail("lanes 0 and %d of a warp have issued different wgmmas", lane);
  }
}

// All lanes of the current warp are here: computes what has to end, into their `value`s.
void execute(const LanePayload*) {
  const int first = current->index / 32 * 32, warp_in_group = current->index / 32 % 4;
  check_lanes_agree(first);
  const Thread& lane0 = thread(first);
  static float d[kWarpRows][kMaxN];
  const size_t first_new = lane0.executed_wgmmas, last = std::max(lane0.ending_wgmmas, first_new);
  for (size_t i = 0; i < first_new; ++i) touch(lane0.wgmmas[i], warp_in_group);
  for (size_t which = 0; which < lane0.accumulators.size(); ++which) {
    const int count = lane0.accumulators[which].n / 2;
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < count; ++i)
        d[fragment_row(lane, i)][fragment_column(lane, i)] = thread(first + lane).accumulators[which].value[i];
    for (size_t i = first_new; i < last; ++i) {
      const WgmmaOp& op = lane0.wgmmas[i];
      if (op.d == lane0.accumulators[which].d) multiply(d, first, i, warp_in_group);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < count; ++i)
        thread(first + lane).accumulators[which].value[i] = d[fragment_row(lane, i)][fragment_column(lane, i)];
  }
  Warpgroup& group = warpgroups[current->index / 128];
  size_t& executed = group.executed[warp_in_group];
  for (size_t i = first_new; i < last; ++i) {
    const WgmmaOp& op = lane0.wgmmas[i];
    if (executed == group.issued.size()) group.issued.push_back(issued(op));
    if (group.issued[executed++] != issued(op))
      fail("wgmma %d of this warp has other operands than in another warp of its warpgroup", int(executed - 1));
  }
  for (int lane = 0; lane < 32; ++lane) thread(first + lane).executed_wgmmas = last;
}

}  // namespace

void reset_wgmma() {
  for (Warpgroup& group : warpgroups) group = {};
  early = random_below(2);
}

void check_wgmma() {
  // A thread starts with as many as __launch_bounds__(threads, 1) leaves it.
  const int threads = num_threads(), at_launch = std::min(int(kRegistersOfSm) / threads / 8 * 8, 255);
  int registers = 0;
  for (int i = 0; i < threads; ++i) registers += thread(i).registers ? thread(i).registers : at_launch;
  if (registers > at_launch * threads)
    fail("setmaxnreg gives the CTA %d registers, it was launched with %d", registers, at_launch * threads);
  for (int i = 0; i < threads; ++i)
    if (thread(i).registers != thread(i / 128 * 128).registers)
      fail("setmaxnreg: thread %d has asked for %d registers, thread %d of its warpgroup for %d", i,
           thread(i).registers, i / 128 * 128, thread(i / 128 * 128).registers);
  for (const Warpgroup& group : warpgroups)
    for (const size_t executed : group.executed)
      if (executed != group.issued.size())
        fail("the warps of a warpgroup have issued %d and %d wgmmas", int(executed), int(group.issued.size()));
}

void finish_thread_wgmma(Thread& thread) {
  if (!thread.accumulators.empty()) fail("a thread exits with a wgmma in flight");
}

void fence_wgmma() { current->wgmma_fenced = true; }

void issue_wgmma(float* d, int n, uint64_t a, const uint32_t* a_registers, uint64_t b, int accumulate) {
  if (n % 8 || n > kMaxN) fail("wgmma with N = %d is not emulated", n);
  if (!current->wgmma_fenced) fail("wgmma without a wgmma_fence() since its accumulators could last be accessed");
  Thread& t = *current;
  bool in_flight = false;
  for (const Accumulator& other : t.accumulators) {
    in_flight |= other.d == d;
    if (other.d == d && other.n != n) fail("wgmmas of N = %d and %d in flight on the same accumulators", other.n, n);
  }
  if (!in_flight) {
    Accumulator& fresh = t.accumulators.emplace_back();
    fresh.d = d;
    fresh.n = n;
    std::copy_n(d, n / 2, fresh.value);
    for (int i = 0; i < n / 2; ++i) d[i] = __uint_as_float(kInFlight);
  }
  WgmmaOp& op = t.wgmmas.emplace_back(WgmmaOp{d, a, b, a_registers, {}, n, accumulate != 0});
  if (a_registers) std::copy_n(a_registers, 4, op.a_values);
}

void commit_wgmma() {
  Thread& t = *current;
  t.wgmma_groups.push_back(t.wgmmas.size());
  t.ending_wgmmas = t.wgmmas.size();
  if (early) meet(Meeting::kWgmma, ~0u, {}, execute);
}

void wait_wgmma(int pending) {
  Thread& t = *current;
  if (t.wgmmas.size() != ended(t, 0)) fail("wgmma_wait() with a wgmma that was not committed");
  for (const WgmmaOp& op : t.wgmmas)
    if (op.a_registers && !std::equal(op.a_values, op.a_values + 4, op.a_registers))
      fail("a register of A was written while its wgmma was in flight");
  const size_t done = t.ending_wgmmas = ended(t, pending);
  meet(Meeting::kWgmma, ~0u, {}, execute);
  const auto in_flight = [&](const Accumulator& accumulator) {
    return std::any_of(t.wgmmas.begin() + long(done), t.wgmmas.end(),
                       [&](const WgmmaOp& op) { return op.d == accumulator.d; });
  };
  for (const Accumulator& accumulator : t.accumulators)
    for (int i = 0; i < accumulator.n / 2; ++i) {
      if (__float_as_uint(accumulator.d[i]) != kInFlight)
        fail("accumulator %d was written while its wgmma was in flight", i);
      if (!in_flight(accumulator)) accumulator.d[i] = accumulator.value[i];
    }
  t.accumulators.erase(std::remove_if(t.accumulators.begin(), t.accumulators.end(), std::not_fn(in_flight)),
                       t.accumulators.end());
  t.wgmmas.erase(t.wgmmas.begin(), t.wgmmas.begin() + long(done));
  t.executed_wgmmas -= done;
  std::vector<size_t>& ends = t.wgmma_groups;
  ends.erase(ends.begin(), ends.end() - std::min<long>(pending, long(ends.size())));
  for (size_t& end : ends) end -= done;
  t.wgmma_fenced = false;
}

void set_registers(int registers) {
  meet(Meeting::kRegisters, ~0u, {});
  current->registers = registers;
}

}  // namespace emulation
