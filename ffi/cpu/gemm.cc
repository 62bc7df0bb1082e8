// The two grouped GEMMs. A work item is a block of rows of one expert times 128 weight rows, or 2 x 128 (gemm1 of a
// gated activation: up and gate). It walks K 128 at a time; each step decodes some weight rows to float32 and uses them
// for all rows of the item while they are in cache. Each result is one sum over K in its own fixed order, so it depends
// neither on the number of threads nor on the other rows of the call.
#include <algorithm>
#include <cstring>
#include <memory>

#include "activation.h"
#include "float8.h"
#include "multiply.h"
#include "parallel.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

// What a worker thread allocates, once a GEMM: 198 KiB.
struct Panel {
  RowBlock x;
  alignas(64) SumTile sums[2 * kScaleBlock / kTileColumns];
  const uint8_t* codes[kBlockM];  // the whole rows

  // Columns [first, first + kScaleBlock) of a row.
  void Read(int row, int first, float* values) const {
    for (int i = 0; i < kScaleBlock; i += kTileColumns)
      std::memcpy(values + i, sums[(first + i) / kTileColumns][row], sizeof sums[0][0]);
  }
};

// The scales of rows that lie side by side: float32 from `scales` on, or with MxFp8 four codes in the place of each.
void ReadScales(const float* scales, bool mx, int num_rows, RowBlock& x) {
  if (!mx) {
    std::copy_n(scales, num_rows, x.scale);
    return;
  }
  const auto* codes = reinterpret_cast<const uint8_t*>(scales);
  for (int r = 0; r < num_rows; ++r)
    for (int s = 0; s < kMxScales; ++s) {
      x.low[s][r] = LowFactor(codes[kMxScales * r + s]);
      x.high[s][r] = HighFactor(codes[kMxScales * r + s]);
    }
}

// panel.sums = the rows of panel.codes times 128 weight rows from each of `columns` on. x_scale: [K/128, scale_stride].
template <int C>
void MultiplyItem(const WeightMatrix& weights, const int64_t (&columns)[C], const float* x_scale, int64_t scale_stride,
                  int num_rows, Panel& panel) {
  for (int i = 0; i < C * kScaleBlock / kTileColumns; ++i)
    std::memset(panel.sums[i], 0, num_rows * sizeof panel.sums[0][0]);
  for (int64_t kb = 0; kb < weights.k_blocks; ++kb) {
    DecodeRows(panel.codes, num_rows, kb * kScaleBlock, panel.x);
    ReadScales(x_scale + kb * scale_stride, weights.mx, num_rows, panel.x);
    for (int c = 0; c < C; ++c)
      for (int n = 0; n < kScaleBlock; n += kStepColumns)
        MultiplyStep(weights, columns[c] + n, kb, panel.x, num_rows, panel.sums + (c * kScaleBlock + n) / kTileColumns);
  }
}

template <class Isa>
JAX_MOE_INLINE void RoundToBfloat16On(const float* values, uint16_t* rounded) {
  for (int i = 0; i < kScaleBlock; ++i) rounded[i] = Bfloat16FromFloat(values[i]);
}
JAX_MOE_DISPATCH(void, RoundToBfloat16, (const float* values, uint16_t* rounded), (values, rounded))

// Calls item(m_block, column_block, panel) for every row block and column block, in parallel. `work`: multiply-adds of
// an item of one row.
template <class Item>
void ForEachItem(const Call& call, int64_t num_column_blocks, int64_t work, const Item& item) {
  const int64_t num_m_blocks = *call.workspace.num_m_blocks;
  Parallel(num_m_blocks * num_column_blocks, work, [&](WorkQueue& queue) {
    const auto panel = std::make_unique<Panel>();
    for (int64_t i; queue.Next(&i);)
      item(call.workspace.m_blocks[i / num_column_blocks], i % num_column_blocks, *panel);
  });
}

// C = 2: up and gate columns, C = 1: not gated.
template <int C>
void Gemm1(const Call& call) {
  const Problem& p = call.problem;
  const Workspace& w = call.workspace;
  const int64_t hidden = p.hidden_size, inter = p.intermediate_size, weight_rows = C * inter;
  const uint8_t* x = QuantizedHiddenStates(call);
  const auto* lora_delta = static_cast<const uint16_t*>(call.buffers.gemm1_lora_delta.data);
  const auto item = [&](const MBlock& block, int64_t i_block, Panel& panel) {
    const WeightMatrix weights(p, call.buffers.gemm1_weights, call.buffers.gemm1_weights_scale, block.expert,
                               weight_rows, hidden, C == 2);
    const Activation activation(call, block.expert);
    int64_t columns[C];
    for (int c = 0; c < C; ++c) columns[c] = c * inter + i_block * kScaleBlock;
    for (int r = 0; r < block.rows; ++r) panel.codes[r] = x + w.permuted_idx_to_token[block.row0 + r] * hidden;
    MultiplyItem<C>(weights, columns, w.permuted_x_scale + block.row0, w.scale_stride, block.rows, panel);
    for (int r = 0; r < block.rows; ++r) {
      const int64_t row = block.row0 + r;
      float values[C][kScaleBlock];
      for (int c = 0; c < C; ++c) {
        panel.Read(r, c * kScaleBlock, values[c]);
        if (p.has_gemm1_lora_delta)
          AddDelta(lora_delta + w.permuted_idx_to_expanded_idx[row] * weight_rows + columns[c], values[c]);
      }
      ActivateAndQuantize(activation, values[0], values[C - 1], w.h + row * inter + i_block * kScaleBlock,
                          w.h_scale + i_block * w.scale_stride + row);
    }
  };
  ForEachItem(call, inter / kScaleBlock, C * kScaleBlock * hidden, item);
}

}  // namespace

void Gemm1(const Call& call) { call.problem.gated() ? Gemm1<2>(call) : Gemm1<1>(call); }

void Gemm2(const Call& call, Slab slab) {
  const Workspace& w = call.workspace;
  const int64_t hidden = call.problem.hidden_size, inter = call.problem.intermediate_size;
  const auto item = [&](const MBlock& block, int64_t slab_block, Panel& panel) {
    const int64_t column = slab_block * kScaleBlock;
    const WeightMatrix weights(call.problem, call.buffers.gemm2_weights, call.buffers.gemm2_weights_scale, block.expert,
                               hidden, inter, false);
    for (int r = 0; r < block.rows; ++r) panel.codes[r] = w.h + (block.row0 + r) * inter;
    MultiplyItem<1>(weights, {slab.first + column}, w.h_scale + block.row0, w.scale_stride, block.rows, panel);
    for (int r = 0; r < block.rows; ++r) {
      float values[kScaleBlock];
      panel.Read(r, 0, values);
      RoundToBfloat16(values, w.y2 + (block.row0 + r) * w.y2_columns + column);
    }
  };
  ForEachItem(call, slab.columns / kScaleBlock, kScaleBlock * inter, item);
}

}  // namespace jax_moe::cpu
