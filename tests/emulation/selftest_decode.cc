// A small multiply by mma.sync, D[128][8] = W[128][512] X[8][512]^T in e4m3: 8 math warps, 4 warps that load X and one
// that has boxes of W copied, two 128-byte chunks each. Right, and with one mistake each. Then what a box of rank three
// leaves in shared memory, and words that arrive on a barrier by themselves.
#include <cmath>
#include <vector>

#include "selftest.h"

namespace selftest {
namespace {

using namespace jax_moe::cuda;

enum class Mistake {
  kNone,
  kNoFullWait,     // for the boxes of W
  kNoBarrier,      // between the warps that load X and those that read it
  kNoCpAsyncWait,  // before that barrier
  kFewAtBarrier,   // a count that leaves the last math warp out
  kEarlyRelease,   // of the stage, before ldmatrix
  kMisaligned,     // a row of ldmatrix
  kOutsideRow,     // of ldmatrix: past the end of shared memory
  kUnswizzled,     // rows of ldmatrix
  kLaneMissing,    // at ldmatrix
  kLaneElsewhere,  // in mma.sync while the others are in ldmatrix
  kRankTwo,        // a copy of two coordinates
  kInsideBytes,    // expects only those inside the tensor
  kMisalignedBox,  // begins in the middle of 16 bytes
  kMisplacedBox,   // lands at no multiple of 1024 bytes
};

constexpr int kM = 128, kValidM = 100, kN = 8, kK = 512, kChunks = 2, kSteps = kK / 128 / kChunks;
constexpr int kMathWarps = 8, kLoadWarps = 4, kThreads = 32 * (kMathWarps + kLoadWarps + 1);
constexpr int kXReady = 15, kXThreads = 32 * (kMathWarps + kLoadWarps);

struct Shared {
  uint8_t w[kChunks * kM * 128];
  uint8_t x[kK / 128 * kN * 128];  // swizzled as w
  uint64_t full, empty;
};
struct Parameters {
  CUtensorMap w_map;
  const uint8_t* x;
  float* d;
};

uint32_t Swizzled(uint32_t base, int row, int piece) { return base + row * 128 + ((piece ^ (row & 7)) << 4); }

template <Mistake kMistake>
void CopyW(const Parameters& p, Shared& shared) {
  const uint32_t full = smem_address(&shared.full), w = smem_address(shared.w);
  const int bytes = kMistake == Mistake::kInsideBytes ? kChunks * kValidM * 128 : sizeof shared.w;
  for (int step = 0; step < kSteps; ++step) {
    mbarrier_wait(smem_address(&shared.empty), step % 2 ^ 1);
    __syncwarp();
    if (threadIdx.x % 32) continue;
    mbarrier_arrive_expect(full, bytes);
    if (kMistake == Mistake::kRankTwo)
      tma_load_2d(w, &p.w_map, 0, 0, full);
    else
      tma_load_3d(w + (kMistake == Mistake::kMisplacedBox ? 128 : 0), &p.w_map,
                  kMistake == Mistake::kMisalignedBox ? 8 : 0, 0, step * kChunks, full, evict_first_policy());
  }
}

template <Mistake kMistake>
void LoadX(const Parameters& p, Shared& shared) {
  const int thread = threadIdx.x - 32 * kMathWarps;
  for (int i = thread; i < kN * kK / 16; i += 32 * kLoadWarps) {
    const int row = i / (kK / 16), piece = i % (kK / 16);
    cp_async_16(Swizzled(smem_address(shared.x) + piece / 8 * kN * 128, row, piece % 8), p.x + row * kK + piece * 16);
  }
  cp_async_commit();
  if (kMistake != Mistake::kNoCpAsyncWait) cp_async_wait<0>();
  if (kMistake != Mistake::kNoBarrier) named_barrier_sync(kXReady, kXThreads);
}

// Lane i gives row i % 8 of matrix i / 8: of W, rows 0-7 and 8-15 of 16 bytes of K, then the next 16 bytes; of X, four
// times the next 16 bytes. A 16-bit element is two codes, so that lane t of four gets K = 4 t .. 4 t + 3 of 16: the f16
// operands hold K in another order, the same for W and X.
template <Mistake kMistake>
void Multiply(const Parameters& p, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float d[4] = {};
  if (kMistake != Mistake::kNoBarrier)
    named_barrier_sync(kXReady, kMistake == Mistake::kFewAtBarrier && warp == 7 ? kXThreads - 32 : kXThreads);
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&shared.empty));
  };
  for (int step = 0; step < kSteps; ++step) {
    if (kMistake != Mistake::kNoFullWait) mbarrier_wait(smem_address(&shared.full), step % 2);
    if (kMistake == Mistake::kEarlyRelease) release();
    for (int i = 0; i < kChunks * 2; ++i) {  // 64 bytes of K
      const int chunk = i / 2, piece = i % 2 * 4;
      uint32_t x[4], w[4];
      load_matrix_x4(
          x, Swizzled(smem_address(shared.x) + (step * kChunks + chunk) * kN * 128, lane % 8, piece + lane / 8));
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane % 16, at = piece + half * 2 + lane / 16;
        const uint32_t tile = smem_address(shared.w) + chunk * kM * 128;
        uint32_t address = kMistake == Mistake::kUnswizzled ? tile + row * 128 + at * 16 : Swizzled(tile, row, at);
        if (kMistake == Mistake::kMisaligned && lane == 9) address += 4;
        if (kMistake == Mistake::kOutsideRow && lane == 9) address = tile + sizeof shared;
        if (kMistake == Mistake::kLaneMissing && lane == 9) return;
        uint32_t a[4][2], b[2][2];
        if (kMistake != Mistake::kLaneElsewhere || lane != 9) load_matrix_x4(w, address);
        for (int j = 0; j < 4; ++j) e4m3x4_to_f16x4(w[j], a[j][0], a[j][1]);
        for (int j = 0; j < 2; ++j) e4m3x4_to_f16x4(x[half * 2 + j], b[j][0], b[j][1]);
        mma_m16n8k16_f16(d, a[0][0], a[1][0], a[0][1], a[1][1], b[0][0], b[0][1]);
        mma_m16n8k16_f16(d, a[2][0], a[3][0], a[2][1], a[3][1], b[1][0], b[1][1]);
      }
    }
    if (kMistake != Mistake::kEarlyRelease) release();
  }
  for (int i = 0; i < 4; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    if (row < kValidM) p.d[row * kN + column] = d[i];
  }
}

template <Mistake kMistake>
void Kernel(Parameters p) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&shared.full), 1);
    mbarrier_init(smem_address(&shared.empty), kMathWarps);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp < kMathWarps)
    Multiply<kMistake>(p, shared);
  else if (warp < kMathWarps + kLoadWarps)
    LoadX<kMistake>(p, shared);
  else
    CopyW<kMistake>(p, shared);
}

// A map of [planes][rows][128] bytes whose planes are the 128-byte columns of a [rows][128 planes] matrix.
bool EncodeChunks(CUtensorMap* map, const uint8_t* data, uint64_t rows, uint64_t planes, uint32_t box_rows,
                  uint32_t box_planes) {
  const cuuint64_t sizes[] = {128, rows, planes}, strides[] = {128 * planes, 128};
  const cuuint32_t box[] = {128, box_rows, box_planes}, steps[] = {1, 1, 1};
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<uint8_t*>(data), sizes, strides, box,
                                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Small whole numbers, so that every sum is exact.
int Value(int row, int k, int salt) { return (row * 7 + k * 3 + row * k % 5 + salt) % 9 - 4; }

template <Mistake kMistake>
std::string Test() {
  alignas(16) static uint8_t w[kValidM * kK], x[kN * kK];
  for (int k = 0; k < kK; ++k) {
    for (int m = 0; m < kValidM; ++m)
      w[m * kK + k] = __nv_cvt_float_to_fp8(float(Value(m, k, 0)), __NV_SATFINITE, __NV_E4M3);
    for (int n = 0; n < kN; ++n)
      x[n * kK + k] = __nv_cvt_float_to_fp8(float(Value(n, k, 4)), __NV_SATFINITE, __NV_E4M3);
  }
  std::vector<float> d(kValidM * kN, NAN);
  Parameters p{};
  p.x = x;
  p.d = d.data();
  if (!EncodeChunks(&p.w_map, w, kValidM, kK / 128, kM, kChunks)) return "tensor map refused";
  const std::string error = Launch(kThreads, sizeof(Shared), &Kernel<kMistake>, p);
  if (!error.empty()) return error;
  for (int m = 0; m < kValidM; ++m)
    for (int n = 0; n < kN; ++n) {
      int sum = 0;
      for (int k = 0; k < kK; ++k) sum += Value(m, k, 0) * Value(n, k, 4);
      if (d[m * kN + n] != float(sum))
        return "wrong product at (" + std::to_string(m) + ", " + std::to_string(n) +
               "): " + std::to_string(d[m * kN + n]);
    }
  return "";
}

// A box of 3 x 16 rows over a corner of 2 planes of 20 rows: every byte, those outside the tensor as zeros.
struct Corner {
  CUtensorMap map;
  int x, y, z;
  uint8_t* seen;  // the box, unswizzled
};
constexpr int kCornerRows = 16, kCornerPlanes = 3;

// Has load(shared address, barrier) bring a box of so many bytes, and shows it unswizzled.
template <class Load>
void ShowBox(int bytes, uint8_t* seen, const Load& load) {
  uint8_t* box = dynamic_shared_memory();
  const uint32_t barrier = smem_address(box + bytes);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(barrier, bytes);
    load(smem_address(box), barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes / 16; i += 32) {
    const uint4 v = load_shared_v4(Swizzled(smem_address(box), i / 8, i % 8));
    std::memcpy(seen + i * 16, &v, 16);
  }
}

void CopyCorner(Corner c) {
  ShowBox(kCornerPlanes * kCornerRows * 128, c.seen, [&](uint32_t to, uint32_t barrier) {
    tma_load_3d(to, &c.map, c.x, c.y, c.z, barrier, evict_first_policy());
  });
}

std::string BoxesOfRankThree() {
  constexpr int kRows = 20, kPlanes = 2;
  alignas(16) static uint8_t data[kRows * kPlanes * 128];
  for (size_t i = 0; i < sizeof data; ++i) data[i] = uint8_t(1 + i % 251);
  const int corners[][3] = {{0, 0, 0}, {16, -3, -1}, {-48, 7, 1}, {112, 19, -2}, {0, 20, 0}, {128, 0, 0}, {0, 0, 2}};
  for (const auto& [x, y, z] : corners) {
    std::vector<uint8_t> seen(kCornerPlanes * kCornerRows * 128);
    Corner c{{}, x, y, z, seen.data()};
    if (!EncodeChunks(&c.map, data, kRows, kPlanes, kCornerRows, kCornerPlanes)) return "tensor map refused";
    const std::string error = Launch(32, unsigned(seen.size()) + 8, &CopyCorner, c);
    if (!error.empty()) return error;
    for (int i = 0; i < int(seen.size()); ++i) {
      const int column = x + i % 128, row = y + i / 128 % kCornerRows, plane = z + i / 128 / kCornerRows;
      const bool inside = column >= 0 && column < 128 && row >= 0 && row < kRows && plane >= 0 && plane < kPlanes;
      const int expected = inside ? data[(row * kPlanes + plane) * 128 + column] : 0;
      if (seen[i] != expected)
        return "byte " + std::to_string(i) + " of the box at (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
               std::to_string(z) + ") is " + std::to_string(seen[i]);
    }
  }
  CUtensorMap map;
  if (EncodeChunks(&map, data, kRows, kPlanes, kCornerRows, 257)) return "a box of 257 planes was taken";
  if (EncodeChunks(&map, data, kRows, 0, kCornerRows, 1)) return "a map without planes was taken";
  return "";
}

// A box that brings the even rows of every 16 before the odd ones: of rank four, of one chunk; of rank five, eight rows
// of two chunks after the other, of which the second is the last one, or past it.
struct Zipped {
  CUtensorMap map;
  uint8_t* seen;
  int chunk;
};
constexpr int kZippedRows = 32;

template <int kRank>
void CopyZipped(Zipped z) {
  ShowBox(kZippedRows * (kRank - 3) * 128, z.seen, [&](uint32_t to, uint32_t barrier) {
    if (kRank == 4)
      tma_load_4d(to, &z.map, z.chunk * 128, 0, 0, 1, barrier);
    else
      tma_load_5d(to, &z.map, 0, 0, z.chunk, 0, 1, barrier);
  });
}

template <int kRank>
std::string ZippedBox() {
  constexpr int kRows = 48, kChunks = 3, kColumns = kChunks * 128, kBoxChunks = kRank - 3;
  alignas(16) static uint8_t data[kRows * kColumns];
  for (size_t i = 0; i < sizeof data; ++i) data[i] = uint8_t(i / 128 * 7 + i % 128);
  using Numbers = std::vector<cuuint64_t>;
  const Numbers sizes = kRank == 4 ? Numbers{kColumns, 8, 2, kRows / 16} : Numbers{128, 8, kChunks, 2, kRows / 16};
  const Numbers strides =
      kRank == 4 ? Numbers{2 * kColumns, kColumns, 16 * kColumns} : Numbers{2 * kColumns, 128, kColumns, 16 * kColumns};
  const std::vector<cuuint32_t> box = kRank == 4 ? std::vector<cuuint32_t>{128, 8, 2, kZippedRows / 16}
                                                 : std::vector<cuuint32_t>{128, 8, kBoxChunks, 2, kZippedRows / 16};
  const std::vector<cuuint32_t> steps(kRank, 1);
  std::vector<uint8_t> seen(kZippedRows * kBoxChunks * 128);
  for (int chunk = 1; chunk < kChunks; ++chunk) {
    Zipped z{{}, seen.data(), chunk};
    if (cuTensorMapEncodeTiled(&z.map, CU_TENSOR_MAP_DATA_TYPE_UINT8, kRank, data, sizes.data(), strides.data(),
                               box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
      return "tensor map refused";
    const std::string error = Launch(32, unsigned(seen.size()) + 8, &CopyZipped<kRank>, z);
    if (!error.empty()) return error;
    for (int i = 0; i < int(seen.size()); ++i) {
      const int landed = i / 128, r = landed / (8 * kBoxChunks) * 8 + landed % 8;
      const int at = chunk + landed / 8 % kBoxChunks, row = 16 + r / 16 * 16 + r % 8 * 2 + r / 8 % 2;
      if (seen[i] != (at < kChunks ? data[row * kColumns + at * 128 + i % 128] : 0))
        return "row " + std::to_string(landed) + " of the box at chunk " + std::to_string(chunk) + " is wrong";
    }
  }
  return "";
}

// A warp asks for words by cp.async and arrives with them, another one adds them up: two stages, some steps.
enum class Arrival { kRight, kNoWait, kLaneMissing, kTooEarly };
struct Words {
  const int32_t* words;
  int32_t* sums;
};
constexpr int kWordSteps = 8;
struct WordStages {
  int32_t words[2][32];
  uint64_t full[2], empty[2];
};

template <Arrival kArrival>
void AddWords(Words p) {
  auto& shared = *reinterpret_cast<WordStages*>(dynamic_shared_memory());
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i)
      mbarrier_init(smem_address(i < 2 ? &shared.full[i] : &shared.empty[i - 2]), i < 2 ? 33 : 32);
    mbarrier_fence_init();
  }
  __syncthreads();
  int32_t sum = 0;
  for (int step = 0; step < kWordSteps; ++step) {
    const int stage = step % 2, lap = step / 2 % 2;
    const uint32_t full = smem_address(&shared.full[stage]), empty = smem_address(&shared.empty[stage]);
    if (threadIdx.x < 32) {
      if (kArrival != Arrival::kNoWait) mbarrier_wait(full, lap);
      sum += shared.words[stage][31 - lane];
      mbarrier_arrive(empty);
    } else {
      mbarrier_wait(empty, lap ^ 1);
      if (lane == 0) mbarrier_arrive(full);  // what is known of the readers is told by this one
      if (kArrival == Arrival::kTooEarly) cp_async_arrive(full);
      cp_async_4(smem_address(&shared.words[stage][lane]), p.words + step * 32 + lane);
      if (kArrival != Arrival::kTooEarly && (kArrival != Arrival::kLaneMissing || lane != 9)) cp_async_arrive(full);
    }
  }
  if (threadIdx.x < 32) p.sums[lane] = sum;
}

template <Arrival kArrival>
std::string ArrivalTest() {
  static int32_t words[kWordSteps * 32];
  int32_t sums[32] = {};
  for (int i = 0; i < kWordSteps * 32; ++i) words[i] = i * i;
  const std::string error = Launch(64, sizeof(WordStages), &AddWords<kArrival>, Words{words, sums});
  if (!error.empty()) return error;
  for (int lane = 0; lane < 32; ++lane) {
    int32_t expected = 0;
    for (int step = 0; step < kWordSteps; ++step) expected += words[step * 32 + 31 - lane];
    if (sums[lane] != expected) return "wrong sum in lane " + std::to_string(lane);
  }
  return "";
}

}  // namespace

const std::map<std::string, std::string (*)()>& DecodeTests() {
  static const std::map<std::string, std::string (*)()> tests{
      {"boxes_of_rank_three", BoxesOfRankThree},
      {"zipped_box_of_rank_four", ZippedBox<4>},
      {"zipped_box_of_rank_five", ZippedBox<5>},
      {"decode", Test<Mistake::kNone>},
      {"decode_no_full_wait", Test<Mistake::kNoFullWait>},
      {"decode_no_barrier", Test<Mistake::kNoBarrier>},
      {"decode_no_cp_async_wait", Test<Mistake::kNoCpAsyncWait>},
      {"decode_few_at_barrier", Test<Mistake::kFewAtBarrier>},
      {"decode_early_release", Test<Mistake::kEarlyRelease>},
      {"misaligned_matrix_row", Test<Mistake::kMisaligned>},
      {"matrix_row_outside", Test<Mistake::kOutsideRow>},
      {"unswizzled_matrix", Test<Mistake::kUnswizzled>},
      {"lane_missing_at_matrix", Test<Mistake::kLaneMissing>},
      {"lane_elsewhere_at_matrix", Test<Mistake::kLaneElsewhere>},
      {"box_of_rank_two", Test<Mistake::kRankTwo>},
      {"box_counted_inside_only", Test<Mistake::kInsideBytes>},
      {"misaligned_box", Test<Mistake::kMisalignedBox>},
      {"misplaced_box", Test<Mistake::kMisplacedBox>},
      {"cp_async_arrival", ArrivalTest<Arrival::kRight>},
      {"cp_async_arrival_not_awaited", ArrivalTest<Arrival::kNoWait>},
      {"cp_async_arrival_of_lane_missing", ArrivalTest<Arrival::kLaneMissing>},
      {"cp_async_arrival_too_early", ArrivalTest<Arrival::kTooEarly>},
  };
  return tests;
}

}  // namespace selftest
