// Bulk tensor copies and cp.async, as late or as early as the hardware may be: a bulk copy lands when nothing else can
// go on, or at a random moment; a cp.async lands at once, when its thread waits for it, or when it arrives on a
// barrier.
#include <algorithm>
#include <array>

#include "machine.h"
#include "overlap.h"

namespace emulation {
namespace {

constexpr int kMostRank = 5;
struct TensorMap {  // what a CUtensorMap holds here; dimensions past its rank have one element
  uint64_t magic;
  const uint8_t* base;
  uint64_t sizes[kMostRank];        // elements of a row, rows, ...
  uint64_t strides[kMostRank - 1];  // bytes between rows, ...
  uint32_t box[kMostRank];
  uint32_t rank, element_bytes, swizzle_128;

  uint32_t row_bytes() const { return box[0] * element_bytes; }
  uint32_t box_rows() const { return box[1] * box[2] * box[3] * box[4]; }
  uint32_t box_bytes() const { return row_bytes() * box_rows(); }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t kMagic = 0x70616d726f736e65;

struct TensorLoad {
  uint32_t smem, barrier;
  TensorMap map;  // NOTE: a copy; the kernel's parameters are this thread's and may be gone when the copy lands
  std::array<int, kMostRank> at;
  Moment issued;
};
std::vector<TensorLoad> loads;

struct LateArrival {  // of a thread whose cp.async have landed
  std::vector<CpAsync> copies;
  uint32_t barrier;
  Moment issued;
};
std::vector<LateArrival> arrivals;

TensorMap read_map(const CUtensorMap* map) {
  TensorMap m;
  std::memcpy(&m, map, sizeof m);
  if (m.magic != kMagic) fail("a tensor map that was never encoded");
  if (reinterpret_cast<uintptr_t>(map) % 64)
    fail("a tensor map at %p is not 64-byte aligned", static_cast<const void*>(map));
  return m;
}

// Elements [first, end) of a box's rows are inside the tensor.
struct Columns {
  int64_t first, end;
};
Columns columns_inside(const TensorLoad& load) {
  const TensorMap& m = load.map;
  const int64_t first = std::clamp<int64_t>(-int64_t(load.at[0]), 0, m.box[0]);
  return {first, std::clamp<int64_t>(int64_t(m.sizes[0]) - load.at[0], first, m.box[0])};
}
// Where element 0 of row `r` of a box would be; null when the row is outside the tensor. Rows of all planes count on.
const uint8_t* row_inside(const TensorLoad& load, uint32_t r) {
  const TensorMap& m = load.map;
  const uint8_t* row = m.base + int64_t(load.at[0]) * m.element_bytes;
  for (int i = 1; i < kMostRank; r /= m.box[i++]) {
    const int64_t index = int64_t(load.at[i]) + r % m.box[i];
    if (index < 0 || index >= int64_t(m.sizes[i])) return nullptr;
    row += index * int64_t(m.strides[i - 1]);
  }
  return row;
}

void land(const TensorLoad& load) {
  const TensorMap& m = load.map;
  const SharedViews views = shared_views(load.smem, m.box_bytes(), "bulk copy");
  const Columns inside = columns_inside(load);
  const uint32_t skipped = uint32_t(inside.first) * m.element_bytes;
  std::vector<uint8_t> row(m.row_bytes());
  for (uint32_t r = 0; r < m.box_rows(); ++r) {
    std::fill(row.begin(), row.end(), 0);
    if (const uint8_t* from = row_inside(load, r); from && inside.end > inside.first)
      std::memcpy(row.data() + skipped, from + skipped, (inside.end - inside.first) * m.element_bytes);
    for (uint32_t i = 0; i < m.row_bytes(); i += 16) {
      const uint32_t linear = load.smem + r * m.row_bytes() + i;
      const uint32_t at = (m.swizzle_128 ? linear ^ (linear >> 3 & 0x70) : linear) - load.smem;
      std::memcpy(views.ordinary + at, row.data() + i, 16);
      std::memcpy(views.async + at, row.data() + i, 16);
    }
  }
  complete_mbarrier_bytes(load.barrier, m.box_bytes(), load.issued);
}

void land(CpAsync& copy) {
  if (copy.landed) return;
  std::memcpy(shared_views(copy.smem, copy.bytes, "cp.async").ordinary, copy.global, copy.bytes);
  copy.landed = true;
}

void retire(std::vector<CpAsync>& group) {
  for (CpAsync& copy : group) {
    land(copy);
    end_late_write(copy.smem, copy.bytes);
    note_ordinary_write(*current, copy.smem, copy.bytes);
  }
}

std::vector<std::vector<CpAsync>>& groups() {
  if (current->cp_groups.empty()) current->cp_groups.emplace_back();
  return current->cp_groups;
}

}  // namespace

void reset_copies() {
  loads.clear();
  arrivals.clear();
}

bool land_one_copy() {
  if (loads.empty() && arrivals.empty()) return false;
  const size_t i = random_below(uint32_t(loads.size() + arrivals.size()));
  if (i < loads.size()) {
    const TensorLoad load = loads[i];
    loads[i] = loads.back();
    loads.pop_back();
    land(load);
  } else {
    LateArrival arrival = std::move(arrivals[i - loads.size()]);
    if (i - loads.size() + 1 < arrivals.size()) arrivals[i - loads.size()] = std::move(arrivals.back());
    arrivals.pop_back();
    for (CpAsync& copy : arrival.copies) land(copy);
    arrive_late(arrival.barrier, arrival.issued);
  }
  return true;
}

void check_copies() {
  if (!loads.empty()) fail("the CTA has exited with %d bulk copies in flight", int(loads.size()));
  if (!arrivals.empty()) fail("the CTA has exited with %d arrivals after cp.async to come", int(arrivals.size()));
}

void finish_thread_copies(Thread& thread) {
  for (auto& group : thread.cp_groups)
    for (CpAsync& copy : group) land(copy);
}

void check_tensor_map(const CUtensorMap* map) { read_map(map); }

void queue_tensor_load(uint32_t smem, const CUtensorMap* map, std::array<int, kMostRank> at, int rank,
                       uint32_t barrier) {
  const TensorMap m = read_map(map);
  if (int(m.rank) != rank) fail("a bulk copy of rank %d through a tensor map of rank %u", rank, m.rank);
  if (smem % (m.swizzle_128 ? 1024 : 128)) fail("a bulk copy to shared address %#x, which is misaligned", smem);
  // Seen on an H100: an illegal instruction.
  if (int64_t(at[0]) * m.element_bytes % 16) fail("a bulk copy from element %d of a row, which is misaligned", at[0]);
  shared_views(smem, m.box_bytes(), "bulk copy");
  check_write(smem, m.box_bytes());
  const TensorLoad load{smem, barrier, m, at, this_moment()};
  const Columns inside = columns_inside(load);
  for (uint32_t r = 0; r < m.box_rows(); ++r)
    if (const uint8_t* row = row_inside(load, r); row && inside.end > inside.first)
      check_global_read(row + inside.first * m.element_bytes, uint32_t(inside.end - inside.first) * m.element_bytes);
  loads.push_back(load);
}

// As a box of one row.
void queue_bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  if (smem % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fail("a bulk copy of %u bytes from %p to %#x is misaligned", bytes, global, smem);
  shared_views(smem, bytes, "bulk copy");
  check_write(smem, bytes);
  check_global_read(global, bytes);
  const TensorMap row{kMagic, static_cast<const uint8_t*>(global), {bytes, 1, 1, 1, 1}, {}, {bytes, 1, 1, 1, 1}, 2, 1,
                      0};
  loads.push_back({smem, barrier, row, {}, this_moment()});
}

void queue_cp_async(uint32_t smem, const void* global, uint32_t bytes) {
  if (smem % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async from %p to %#x is misaligned", global, smem);
  shared_views(smem, bytes, "cp.async");
  begin_late_write(smem, bytes);
  check_global_read(global, bytes);
  CpAsync copy{smem, global, bytes, false};
  if (random_below(2)) land(copy);
  groups().back().push_back(copy);
}

// NOTE: from here on they are writes that the barrier orders, not ones that their thread has to wait for.
void queue_cp_async_arrival(uint32_t barrier) {
  LateArrival arrival{{}, barrier, {}};
  for (const auto& group : groups()) arrival.copies.insert(arrival.copies.end(), group.begin(), group.end());
  groups().clear();
  for (const CpAsync& copy : arrival.copies) {
    end_late_write(copy.smem, copy.bytes);
    note_ordinary_write(*current, copy.smem, copy.bytes);
  }
  arrival.issued = this_moment();
  arrivals.push_back(std::move(arrival));
}

void commit_cp_async() { groups().emplace_back(); }

void wait_cp_async(int pending) {
  auto& all = groups();  // the last one is open
  const int landed = std::max(0, int(all.size()) - 1 - pending);
  for (int i = 0; i < landed; ++i) retire(all[i]);
  all.erase(all.begin(), all.begin() + landed);
}

}  // namespace emulation

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  uint32_t element_bytes = 0;
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      element_bytes = 1;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      element_bytes = 2;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      element_bytes = 4;
      break;
    default:
      element_bytes = 8;
      break;
  }
  if (rank < 2 || rank > emulation::kMostRank) return CUDA_ERROR_INVALID_VALUE;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  emulation::TensorMap m{emulation::kMagic, static_cast<const uint8_t*>(address),
                         {1, 1, 1, 1, 1},   {},
                         {1, 1, 1, 1, 1},   rank,
                         element_bytes,     swizzled};
  std::copy(sizes, sizes + rank, m.sizes);
  std::copy(strides, strides + rank - 1, m.strides);
  std::copy(box, box + rank, m.box);
  const bool emulated = interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                        (swizzled ? m.row_bytes() == 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_NONE) &&
                        std::all_of(element_strides, element_strides + rank, [](uint32_t step) { return step == 1; });
  // The driver's rules for such maps. It takes strides in any order, so that a plane may lie between two rows.
  bool legal = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
               address && m.row_bytes() % 16 == 0;
  for (const uint64_t size : m.sizes) legal &= size >= 1 && size <= 1ull << 32;
  for (const uint32_t length : m.box) legal &= length >= 1 && length <= 256;
  for (cuuint32_t i = 0; i + 1 < rank; ++i)
    legal &= strides[i] % 16 == 0 && strides[i] < 1ull << 40 && strides[i] >= sizes[0] * element_bytes;
  if (!emulated || !legal) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}
