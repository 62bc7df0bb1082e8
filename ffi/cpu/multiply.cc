// Decodes weights to tiles of 16 weight rows side by side, 8 KiB each, so that a vector holds one value of K for many
// weight rows and no sum is ever spread over lanes. A tile stays in the first-level cache while all rows use it.
#include "multiply.h"

#include "float8.h"

namespace jax_moe::cpu {
namespace {

constexpr int kTilesPerStep = kStepColumns / kTileColumns;
struct Tile {
  alignas(64) float values[kScaleBlock][kTileColumns];                            // [k][weight row]
  alignas(64) float low[kMxScales][kTileColumns], high[kMxScales][kTileColumns];  // MxFp8: factors of the scales
};

template <class Isa>
JAX_MOE_INLINE void DecodeRowsOn(const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x) {
  for (int r = 0; r < num_rows; ++r) {
    const uint8_t* codes = rows[r] + k;
    float* values = x.values[r];
    for (int i = 0; i < kScaleBlock; ++i) values[i] = FloatFromFloat8(codes[i]);
  }
}

// kTileColumns weight rows of 128 codes, transposed. NOTE: also asks for the next 128 of K, which the walk over K comes
// to after the other weight rows of the item; past the end of the weights that is harmless.
template <bool kMx>
JAX_MOE_INLINE void DecodeTile(const WeightMatrix& weights, int64_t row, int64_t k_block, Tile& tile) {
  constexpr int kWords = kScaleBlock / 4;  // four codes travel in a word
  alignas(64) int32_t words[kWords][kTileColumns];
  for (int n = 0; n < kTileColumns; ++n) {
    const uint8_t* codes = weights.Codes(row + n, k_block);
    __builtin_prefetch(codes + weights.k_stride);
    __builtin_prefetch(codes + weights.k_stride + 64);
    for (int i = 0; i < kWords; ++i) std::memcpy(&words[i][n], codes + 4 * i, 4);
    if constexpr (kMx) {
      const uint8_t* scales = weights.MxScales(row + n, k_block);
      for (int s = 0; s < kMxScales; ++s) {
        tile.low[s][n] = LowFactor(scales[s]);
        tile.high[s][n] = HighFactor(scales[s]);
      }
    }
  }
  for (int i = 0; i < kWords; ++i)
    for (int j = 0; j < 4; ++j)
      for (int n = 0; n < kTileColumns; ++n) tile.values[4 * i + j][n] = FloatFromFloat8(words[i][n] >> (8 * j));
}

template <class Floats>
JAX_MOE_INLINE void Load(const float* from, Floats& values) {
  std::memcpy(&values, from, sizeof values);
}

// R rows times C tiles.
template <class Isa, bool kMx, int R, int C>
JAX_MOE_INLINE void MultiplyRows(const RowBlock& x, float weight_scale, const Tile* tiles, SumTile* sums, int row) {
  using Floats = typename Isa::Floats;
  constexpr int kLanes = sizeof(Floats) / sizeof(float), N = kTileColumns / kLanes;
  constexpr int kScales = kMx ? kMxScales : 1, kBlock = kScaleBlock / kScales;  // of K
  for (int s = 0; s < kScales; ++s) {
    Floats partial[R][C][N] = {};
    for (int k = s * kBlock; k < (s + 1) * kBlock; ++k) {
      Floats w[C][N];
      for (int c = 0; c < C; ++c)
        for (int n = 0; n < N; ++n) Load(tiles[c].values[k] + n * kLanes, w[c][n]);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
          for (int n = 0; n < N; ++n) partial[r][c][n] += x.values[row + r][k] * w[c][n];
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        for (int n = 0; n < N; ++n) {
          float* address = sums[c][row + r] + n * kLanes;
          Floats sum;
          Load(address, sum);
          if constexpr (kMx) {
            Floats low, high;
            Load(tiles[c].low[s] + n * kLanes, low);
            Load(tiles[c].high[s] + n * kLanes, high);
            sum += partial[r][c][n] * (x.low[s][row + r] * high) * (x.high[s][row + r] * low);
          } else {
            sum += partial[r][c][n] * (x.scale[row + r] * weight_scale);
          }
          std::memcpy(address, &sum, sizeof sum);
        }
  }
}

// The last `num_rows` <= R rows, all tiles at once where there are so few that their sums leave registers free.
template <class Isa, bool kMx, int R>
JAX_MOE_INLINE void MultiplyLastRows(const RowBlock& x, float weight_scale, const Tile* tiles, SumTile* sums, int row,
                                     int num_rows) {
  if constexpr (R > 0) {
    if (num_rows < R) return MultiplyLastRows<Isa, kMx, R - 1>(x, weight_scale, tiles, sums, row, num_rows);
    constexpr int C = R * kTilesPerStep <= Isa::kRowsAtOnce ? kTilesPerStep : 1;
    for (int c = 0; c < kTilesPerStep; c += C) MultiplyRows<Isa, kMx, R, C>(x, weight_scale, tiles + c, sums + c, row);
  }
}

template <class Isa, bool kMx>
JAX_MOE_INLINE void MultiplyTiles(const WeightMatrix& weights, int64_t first, int64_t k_block, const RowBlock& x,
                                  int num_rows, SumTile* sums) {
  constexpr int R = Isa::kRowsAtOnce;
  const float weight_scale = kMx ? 0.f : weights.Scale(first, k_block);
  Tile tiles[kTilesPerStep];
  for (int c = 0; c < kTilesPerStep; ++c) DecodeTile<kMx>(weights, first + c * kTileColumns, k_block, tiles[c]);
  const int last = num_rows % R;
  for (int c = 0; c < kTilesPerStep; ++c)
    for (int row = 0; row < num_rows - last; row += R)
      MultiplyRows<Isa, kMx, R, 1>(x, weight_scale, tiles + c, sums + c, row);
  MultiplyLastRows<Isa, kMx, R - 1>(x, weight_scale, tiles, sums, num_rows - last, last);
}

template <class Isa>
JAX_MOE_INLINE void MultiplyStepOn(const WeightMatrix& weights, int64_t first, int64_t k_block, const RowBlock& x,
                                   int num_rows, SumTile* sums) {
  if (weights.mx)
    MultiplyTiles<Isa, true>(weights, first, k_block, x, num_rows, sums);
  else
    MultiplyTiles<Isa, false>(weights, first, k_block, x, num_rows, sums);
}

}  // namespace

JAX_MOE_DISPATCH(void, DecodeRows, (const uint8_t* const* rows, int num_rows, int64_t k, RowBlock& x),
                 (rows, num_rows, k, x))
JAX_MOE_DISPATCH(void, MultiplyStep,
                 (const WeightMatrix& weights, int64_t row, int64_t k_block, const RowBlock& x, int num_rows,
                  SumTile* sums),
                 (weights, row, k_block, x, num_rows, sums))

}  // namespace jax_moe::cpu
