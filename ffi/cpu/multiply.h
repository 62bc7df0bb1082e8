// The inner loops of the GEMMs: e4m3 to float32, and rows times weight rows over one scale block of K.
#pragma once
#include "../workspace.h"
#include "weights.h"

namespace jax_moe::cpu {

inline constexpr int kStepColumns = 32;  // weight rows of one call
static_assert(kScaleBlock % kStepColumns == 0, "a step has one weight scale");

using RowBlock = float[kBlockM][kScaleBlock];  // rows, 128 of K
using SumTile = float[kBlockM][kTileColumns];  // sums of rows and weight rows

// x[r] = the 128 codes at rows[r] + k.
void DecodeRows(const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x);

// sums[c][r][i] += (x[r] . w[16 c + i]) * (x_scale[r] * weight scale) for 128 columns of kStepColumns weight rows from
// `row` on. Every sum has the same order of operations whatever num_rows and the layout of the weights are.
void MultiplyStep(const WeightMatrix& weights, int64_t row, int64_t k_block, const RowBlock& x, const float* x_scale,
                  int num_rows, SumTile* sums);

}  // namespace jax_moe::cpu
