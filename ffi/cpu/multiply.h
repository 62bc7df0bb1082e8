// The inner loops of the GEMMs: e4m3 to float32, and rows times weight rows over one scale block of K.
#pragma once
#include "../workspace.h"

namespace jax_moe::cpu {

inline constexpr int kTileColumns = 16;  // weight rows whose values lie side by side once decoded
inline constexpr int kStepColumns = 32;  // weight rows of one call
static_assert(kScaleBlock % kStepColumns == 0, "a step has one weight scale");

using RowBlock = float[kBlockM][kScaleBlock];  // rows, 128 of K
using SumTile = float[kBlockM][kTileColumns];  // sums of rows and weight rows

// x[r] = the 128 codes at rows[r] + k.
void DecodeRows(const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x);

// sums[c][r][i] += (x[r] . weights[16 c + i]) * (x_scale[r] * weight_scale) for kStepColumns rows of 128 codes,
// `stride` bytes apart. Every sum has the same order of operations whatever num_rows is.
void MultiplyStep(const uint8_t* weights, int64_t stride, float weight_scale, const RowBlock& x, const float* x_scale,
                  int num_rows, SumTile* sums);

}  // namespace jax_moe::cpu
