// Decodes weights to tiles of 16 weight rows side by side, 8 KiB each, so that a vector holds one value of K for many
// weight rows and no sum is ever spread over lanes. A tile stays in the first-level cache while all rows use it.
#include "multiply.h"

#include "float8.h"

namespace jax_moe::cpu {
namespace {

constexpr int kTilesPerStep = kStepColumns / kTileColumns;
struct Tile {
  alignas(64) float values[kScaleBlock][kTileColumns];  // [k][weight row]
};

template <class Isa>
JAX_MOE_INLINE void DecodeRowsOn(const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x) {
  for (int r = 0; r < num_rows; ++r) {
    const uint8_t* codes = rows[r] + k;
    float* values = x[r];
    for (int i = 0; i < kScaleBlock; ++i) values[i] = FloatFromFloat8(codes[i]);
  }
}

// kTileColumns weight rows of 128 codes, transposed. NOTE: also asks for the next 128 of K, which the walk over K comes
// to after the other weight rows of the item; past the end of the weights that is harmless.
JAX_MOE_INLINE void DecodeTile(const uint8_t* weights, int64_t stride, Tile& tile) {
  constexpr int kWords = kScaleBlock / 4;  // four codes travel in a word
  alignas(64) int32_t words[kWords][kTileColumns];
  for (int n = 0; n < kTileColumns; ++n) {
    const uint8_t* codes = weights + n * stride;
    __builtin_prefetch(codes + kScaleBlock);
    __builtin_prefetch(codes + kScaleBlock + 64);
    for (int i = 0; i < kWords; ++i) std::memcpy(&words[i][n], codes + 4 * i, 4);
  }
  for (int i = 0; i < kWords; ++i)
    for (int j = 0; j < 4; ++j)
      for (int n = 0; n < kTileColumns; ++n) tile.values[4 * i + j][n] = FloatFromFloat8(words[i][n] >> (8 * j));
}

// R rows times C tiles.
template <class Isa, int R, int C>
JAX_MOE_INLINE void MultiplyRows(const float (*x)[kScaleBlock], const float* x_scale, float weight_scale,
                                 const Tile* tiles, SumTile* sums, int row) {
  using Floats = typename Isa::Floats;
  constexpr int kLanes = sizeof(Floats) / sizeof(float), N = kTileColumns / kLanes;
  Floats partial[R][C][N] = {};
  for (int k = 0; k < kScaleBlock; ++k) {
    Floats w[C][N];
    for (int c = 0; c < C; ++c)
      for (int n = 0; n < N; ++n) std::memcpy(&w[c][n], tiles[c].values[k] + n * kLanes, sizeof(Floats));
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        for (int n = 0; n < N; ++n) partial[r][c][n] += x[row + r][k] * w[c][n];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      for (int n = 0; n < N; ++n) {
        float* address = sums[c][row + r] + n * kLanes;
        Floats sum;
        std::memcpy(&sum, address, sizeof sum);
        sum += partial[r][c][n] * (x_scale[row + r] * weight_scale);
        std::memcpy(address, &sum, sizeof sum);
      }
}

// The last `num_rows` <= R rows, all tiles at once where there are so few that their sums leave registers free.
template <class Isa, int R>
JAX_MOE_INLINE void MultiplyLastRows(const float (*x)[kScaleBlock], const float* x_scale, float weight_scale,
                                     const Tile* tiles, SumTile* sums, int row, int num_rows) {
  if constexpr (R > 0) {
    if (num_rows < R) return MultiplyLastRows<Isa, R - 1>(x, x_scale, weight_scale, tiles, sums, row, num_rows);
    constexpr int C = R * kTilesPerStep <= Isa::kRowsAtOnce ? kTilesPerStep : 1;
    for (int c = 0; c < kTilesPerStep; c += C)
      MultiplyRows<Isa, R, C>(x, x_scale, weight_scale, tiles + c, sums + c, row);
  }
}

template <class Isa>
JAX_MOE_INLINE void MultiplyStepOn(const uint8_t* weights, int64_t stride, float weight_scale, const RowBlock& x,
                                   const float* x_scale, int num_rows, SumTile* sums) {
  constexpr int R = Isa::kRowsAtOnce;
  Tile tiles[kTilesPerStep];
  for (int c = 0; c < kTilesPerStep; ++c) DecodeTile(weights + c * kTileColumns * stride, stride, tiles[c]);
  const int last = num_rows % R;
  for (int c = 0; c < kTilesPerStep; ++c)
    for (int row = 0; row < num_rows - last; row += R)
      MultiplyRows<Isa, R, 1>(x, x_scale, weight_scale, tiles + c, sums + c, row);
  MultiplyLastRows<Isa, R - 1>(x, x_scale, weight_scale, tiles, sums, num_rows - last, last);
}

}  // namespace

JAX_MOE_DISPATCH(void, DecodeRows, (const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x),
                 (rows, num_rows, k, x))
JAX_MOE_DISPATCH(void, MultiplyStep,
                 (const uint8_t* weights, int64_t stride, float weight_scale, const RowBlock& x, const float* x_scale,
                  int num_rows, SumTile* sums),
                 (weights, stride, weight_scale, x, x_scale, num_rows, sums))

}  // namespace jax_moe::cpu
