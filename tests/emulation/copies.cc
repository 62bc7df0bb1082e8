// Bulk tensor copies and cp.async, as late or as early as the hardware may be: a bulk copy lands when nothing else can
// go on, or at a random moment; a cp.async lands at once or when its thread waits for it.
#include <algorithm>

#include "machine.h"

namespace emulation {
namespace {

struct TensorMap {  // what a CUtensorMap holds here
  uint64_t magic;
  const uint8_t* base;
  uint64_t width, height, stride;  // elements, rows, bytes
  uint32_t box_width, box_height, element_bytes, swizzle_128;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t kMagic = 0x70616d726f736e65;

struct TensorLoad {
  uint32_t smem, barrier;
  TensorMap map;  // NOTE: a copy; the kernel's parameters are this thread's and may be gone when the copy lands
  int x, y;
  Moment issued;
};
std::vector<TensorLoad> loads;

TensorMap read_map(const CUtensorMap* map) {
  TensorMap m;
  std::memcpy(&m, map, sizeof m);
  if (m.magic != kMagic) fail("a tensor map that was never encoded");
  if (reinterpret_cast<uintptr_t>(map) % 64)
    fail("a tensor map at %p is not 64-byte aligned", static_cast<const void*>(map));
  return m;
}

void land(const TensorLoad& load) {
  const TensorMap& m = load.map;
  const uint32_t row_bytes = m.box_width * m.element_bytes, bytes = row_bytes * m.box_height;
  const SharedViews views = shared_views(load.smem, bytes, "bulk copy");
  const int64_t first = std::clamp<int64_t>(-int64_t(load.x), 0, m.box_width);
  const int64_t last = std::clamp<int64_t>(int64_t(m.width) - load.x, first, m.box_width);
  std::vector<uint8_t> row(row_bytes);
  for (uint32_t r = 0; r < m.box_height; ++r) {
    std::fill(row.begin(), row.end(), 0);
    const int64_t y = int64_t(load.y) + r;
    if (y >= 0 && y < int64_t(m.height) && last > first)
      std::memcpy(row.data() + first * m.element_bytes,
                  m.base + y * int64_t(m.stride) + (load.x + first) * m.element_bytes,
                  (last - first) * m.element_bytes);
    for (uint32_t i = 0; i < row_bytes; i += 16) {
      const uint32_t linear = load.smem + r * row_bytes + i;
      const uint32_t at = (m.swizzle_128 ? linear ^ (linear >> 3 & 0x70) : linear) - load.smem;
      std::memcpy(views.ordinary + at, row.data() + i, 16);
      std::memcpy(views.async + at, row.data() + i, 16);
    }
  }
  complete_mbarrier_bytes(load.barrier, bytes, load.issued);
}

void land(CpAsync& copy) {
  if (copy.landed) return;
  std::memcpy(shared_views(copy.smem, 16, "cp.async").ordinary, copy.global, 16);
  copy.landed = true;
}

void retire(std::vector<CpAsync>& group) {
  for (CpAsync& copy : group) {
    land(copy);
    note_ordinary_write(*current, copy.smem, 16);
  }
}

std::vector<std::vector<CpAsync>>& groups() {
  if (current->cp_groups.empty()) current->cp_groups.emplace_back();
  return current->cp_groups;
}

}  // namespace

void reset_copies() { loads.clear(); }

bool land_one_copy() {
  if (loads.empty()) return false;
  const size_t i = random_below(uint32_t(loads.size()));
  const TensorLoad load = loads[i];
  loads[i] = loads.back();
  loads.pop_back();
  land(load);
  return true;
}

void check_copies() {
  if (!loads.empty()) fail("the CTA has exited with %d bulk copies in flight", int(loads.size()));
}

void finish_thread_copies(Thread& thread) {
  for (auto& group : thread.cp_groups)
    for (CpAsync& copy : group) land(copy);
}

void check_tensor_map(const CUtensorMap* map) { read_map(map); }

void queue_tensor_load(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  const TensorMap m = read_map(map);
  if (smem % (m.swizzle_128 ? 1024 : 128)) fail("a bulk copy to shared address %#x, which is misaligned", smem);
  // Seen on an H100: an illegal instruction.
  if (int64_t(x) * m.element_bytes % 16) fail("a bulk copy from element %d of a row, which is misaligned", x);
  const uint32_t bytes = m.box_width * m.element_bytes * m.box_height;
  shared_views(smem, bytes, "bulk copy");
  check_write(smem, bytes);
  loads.push_back({smem, barrier, m, x, y, this_moment()});
}

void queue_cp_async(uint32_t smem, const void* global) {
  if (smem % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("cp.async from %p to %#x is misaligned", global, smem);
  shared_views(smem, 16, "cp.async");
  check_write(smem, 16);
  CpAsync copy{smem, global, false};
  if (random_below(2)) land(copy);
  groups().back().push_back(copy);
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
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool emulated =
      rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
      (swizzled || swizzle == CU_TENSOR_MAP_SWIZZLE_NONE) && element_strides[0] == 1 && element_strides[1] == 1;
  const uint64_t box_bytes = uint64_t(box[0]) * element_bytes;
  // The driver's rules for such maps.
  const bool legal = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
                     address && sizes[0] >= 1 && sizes[0] <= 1ull << 32 && sizes[1] >= 1 && sizes[1] <= 1ull << 32 &&
                     strides[0] % 16 == 0 && strides[0] < 1ull << 40 && strides[0] >= sizes[0] * element_bytes &&
                     box[0] >= 1 && box[0] <= 256 && box[1] >= 1 && box[1] <= 256 && box_bytes % 16 == 0 &&
                     (!swizzled || box_bytes <= 128);
  if (!emulated || !legal || (swizzled && box_bytes != 128)) return CUDA_ERROR_INVALID_VALUE;
  const emulation::TensorMap m{emulation::kMagic,
                               static_cast<const uint8_t*>(address),
                               sizes[0],
                               sizes[1],
                               strides[0],
                               box[0],
                               box[1],
                               element_bytes,
                               swizzled};
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}
