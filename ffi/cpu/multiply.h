// The inner loops of the GEMMs: e4m3 to float32, and rows times weight rows over 128 of K.
#pragma once
#include "../workspace.h"
#include "weights.h"

namespace jax_moe::cpu {

inline constexpr int kTileColumns = 16;  // weight rows whose values lie side by side once decoded
inline constexpr int kStepColumns = 32;  // weight rows of one call
static_assert(kScaleBlock % kStepColumns == 0, "a step has one weight scale with DeepSeekFp8");

// Rows of the left operand, 128 of K: the values of their codes, and their scales.
struct RowBlock {
  alignas(64) float values[kBlockM][kScaleBlock];
  float scale[kBlockM];                                     // DeepSeekFp8
  float low[kMxScales][kBlockM], high[kMxScales][kBlockM];  // MxFp8: factors of the scales (mx_scale.h)
};
using SumTile = float[kBlockM][kTileColumns];  // sums of rows and weight rows

// x.values[r] = the 128 codes at rows[r] + k.
void DecodeRows(const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x);

// sums[c][r][i] += the scaled product of x[r] and weight row `row` + 16 c + i over 128 of K, for kStepColumns weight
// rows. What shares its scales is summed before it is scaled. Every sum has the same order of operations whatever
// num_rows and the layout of the weights are.
void MultiplyStep(const WeightMatrix& weights, int64_t row, int64_t k_block, const RowBlock& x, int num_rows,
                  SumTile* sums);

}  // namespace jax_moe::cpu
