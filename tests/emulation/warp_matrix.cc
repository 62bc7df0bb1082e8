// Matrices that a warp holds in its registers: ldmatrix and stmatrix, which access shared memory as ordinary loads and
// stores do, and mma.sync. All 32 lanes have to come. And what a lane does with the formats in its registers.
#include <cuda_bf16.h>

#include "machine.h"
#include "number_formats.h"

namespace emulation {

// This lane writes the row whose address it gave: columns 2 i and 2 i + 1 are with lane 4 (row) + i.
void store_matrix(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const LanePayload* all = meet(Meeting::kStoreMatrix, ~0u, {{smem, a, b, c, d, 0}});
  uint32_t row[4];
  for (int i = 0; i < 4; ++i) row[i] = all[lane() % 8 * 4 + i].words[1 + lane() / 8];
  if (smem % 16) fail("a row of stmatrix at %#x is misaligned", smem);
  write_shared(smem, row, sizeof row);
}

// This lane writes the column whose address it gave: its rows are with lanes 4 (row) + column / 2.
void store_transposed(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const LanePayload* all = meet(Meeting::kStoreMatrix, ~0u, {{smem, a, b, c, d, 0}});
  const int which = lane() % 8;
  uint16_t column[8];
  for (int i = 0; i < 8; ++i) column[i] = uint16_t(all[i * 4 + which / 2].words[1 + lane() / 8] >> which % 2 * 16);
  if (smem % 16) fail("a column of stmatrix at %#x is misaligned", smem);
  write_shared(smem, column, sizeof column);
}

// This lane reads what it gets: the piece lane % 4 of row lane / 4 of each matrix.
void load_matrix(uint32_t (&r)[4], uint32_t smem) {
  if (smem % 16) fail("a row of ldmatrix at %#x is misaligned", smem);
  const LanePayload* all = meet(Meeting::kLoadMatrix, ~0u, {{smem}});
  for (int j = 0; j < 4; ++j) {
    const uint32_t row = all[j * 8 + lane() / 4].words[0];
    std::memcpy(&r[j], read_shared(row + lane() % 4 * 4, 4), 4);
  }
}

// Sums of float32, of exact products.
void multiply_f16(float (&d)[4], const LanePayload& operands) {
  const LanePayload* all = meet(Meeting::kMultiply, ~0u, operands);
  const auto element = [&](int row, int k, int word) {  // of a matrix whose rows are with four lanes each
    return from_f16(uint16_t(all[row % 8 * 4 + k % 8 / 2].words[word] >> k % 2 * 16));
  };
  for (int i = 0; i < 4; ++i) {
    const int m = lane() / 4 + i / 2 * 8, n = lane() % 4 * 2 + i % 2;
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) sum += element(m, k, m / 8 + k / 8 * 2) * element(n, k, 4 + k / 8);
    d[i] += sum;
  }
}

void decode_e4m3x4(uint32_t codes, uint32_t& lo, uint32_t& hi) {
  uint32_t f16[4];
  for (int i = 0; i < 4; ++i) f16[i] = e4m3_to_f16(uint8_t(codes >> 8 * i));
  lo = f16[0] | f16[1] << 16;
  hi = f16[2] | f16[3] << 16;
}

uint32_t permute_bytes(uint32_t bytes, uint32_t which) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t name = which >> 4 * i & 15;
    if (name > 11) fail("permute_bytes: byte %d has no sign", int(name % 8));
    const uint32_t byte = uint64_t(bytes) >> name % 8 * 8 & 255;
    result |= (name < 8 ? byte : byte & 0x80 ? 255u : 0u) << 8 * i;
  }
  return result;
}

uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  const auto half = [&](int i) {  // the float32 product of two bf16 is exact but where it is subnormal
    const double product = double(from_bf16(uint16_t(a >> 16 * i))) * double(from_bf16(uint16_t(b >> 16 * i)));
    return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(float(product)))) << 16 * i;
  };
  return half(0) | half(1);
}

}  // namespace emulation
