// The two grouped GEMMs. A work item is a block of rows of one expert times 128 (gemm2) or 2 x 128 (gemm1: up and gate)
// weight rows. It walks K 128 at a time; each step decodes some weight rows to float32 and uses them for all rows of
// the item while they are in cache. Each result is one sum over K in its own fixed order, so it depends neither on the
// number of threads nor on the other rows of the call.
#include <algorithm>
#include <memory>

#include "activation.h"
#include "multiply.h"
#include "parallel.h"
#include "quantize.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

// What a worker thread allocates, once a GEMM: 193 KiB.
struct Panel {
  alignas(64) RowBlock x;
  alignas(64) SumTile sums[2 * kScaleBlock / kTileColumns];
  float x_scale[kBlockM];         // of x
  const uint8_t* codes[kBlockM];  // the whole rows

  // Columns [first, first + kScaleBlock) of a row.
  void Read(int row, int first, float* values) const {
    for (int i = 0; i < kScaleBlock; i += kTileColumns)
      std::memcpy(values + i, sums[(first + i) / kTileColumns][row], sizeof sums[0][0]);
  }
};

// The weights of one expert, [N, K].
struct Weights {
  const uint8_t* codes;
  const float* scales;  // [N/128, K/128]
  int64_t k;
};

// panel.sums = the rows of panel.codes times 128 weight rows from each of `columns` on. x_scale: [K/128, scale_stride].
template <int C>
void MultiplyItem(const Weights& w, const int64_t (&columns)[C], const float* x_scale, int64_t scale_stride,
                  int num_rows, Panel& panel) {
  const int64_t k_blocks = w.k / kScaleBlock;
  for (int i = 0; i < C * kScaleBlock / kTileColumns; ++i)
    std::memset(panel.sums[i], 0, num_rows * sizeof panel.sums[0][0]);
  for (int64_t kb = 0; kb < k_blocks; ++kb) {
    DecodeRows(panel.codes, num_rows, kb * kScaleBlock, panel.x);
    std::copy_n(x_scale + kb * scale_stride, num_rows, panel.x_scale);
    for (int c = 0; c < C; ++c) {
      const float weight_scale = w.scales[columns[c] / kScaleBlock * k_blocks + kb];
      for (int n = 0; n < kScaleBlock; n += kStepColumns)
        MultiplyStep(w.codes + (columns[c] + n) * w.k + kb * kScaleBlock, w.k, weight_scale, panel.x, panel.x_scale,
                     num_rows, panel.sums + (c * kScaleBlock + n) / kTileColumns);
    }
  }
}

template <class Isa>
JAX_MOE_INLINE float ActivateAndQuantizeOn(const float* gate, const float* up, uint8_t* codes) {
  float a[kScaleBlock];
  for (int i = 0; i < kScaleBlock; ++i) a[i] = Swiglu(gate[i], up[i]);
  return QuantizeBlock(a, codes);
}
JAX_MOE_DISPATCH(float, ActivateAndQuantize, (const float* gate, const float* up, uint8_t* codes), (gate, up, codes))

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

}  // namespace

void Gemm1(const Call& call) {
  const Workspace& w = call.workspace;
  const int64_t hidden = call.problem.hidden_size, inter = call.problem.intermediate_size;
  const int64_t h_blocks = hidden / kScaleBlock, i_blocks = inter / kScaleBlock;
  const uint8_t* x = QuantizedHiddenStates(call);
  const auto* codes = static_cast<const uint8_t*>(call.buffers.gemm1_weights.data);
  const auto* scales = static_cast<const float*>(call.buffers.gemm1_weights_scale.data);
  ForEachItem(call, i_blocks, 2 * kScaleBlock * hidden, [&](const MBlock& block, int64_t i_block, Panel& panel) {
    const Weights weights{codes + 2 * inter * hidden * block.expert, scales + 2 * i_blocks * h_blocks * block.expert,
                          hidden};
    for (int r = 0; r < block.rows; ++r) panel.codes[r] = x + w.permuted_idx_to_token[block.row0 + r] * hidden;
    const int64_t up = i_block * kScaleBlock, gate = inter + up;
    MultiplyItem<2>(weights, {up, gate}, w.permuted_x_scale + block.row0, w.scale_stride, block.rows, panel);
    for (int r = 0; r < block.rows; ++r) {
      float up_values[kScaleBlock], gate_values[kScaleBlock];
      panel.Read(r, 0, up_values);
      panel.Read(r, kScaleBlock, gate_values);
      const int64_t row = block.row0 + r;
      w.h_scale[i_block * w.scale_stride + row] = ActivateAndQuantize(gate_values, up_values, w.h + row * inter + up);
    }
  });
}

void Gemm2(const Call& call) {
  const Workspace& w = call.workspace;
  const int64_t hidden = call.problem.hidden_size, inter = call.problem.intermediate_size;
  const int64_t h_blocks = hidden / kScaleBlock, i_blocks = inter / kScaleBlock;
  const auto* codes = static_cast<const uint8_t*>(call.buffers.gemm2_weights.data);
  const auto* scales = static_cast<const float*>(call.buffers.gemm2_weights_scale.data);
  ForEachItem(call, h_blocks, kScaleBlock * inter, [&](const MBlock& block, int64_t h_block, Panel& panel) {
    const Weights weights{codes + hidden * inter * block.expert, scales + h_blocks * i_blocks * block.expert, inter};
    for (int r = 0; r < block.rows; ++r) panel.codes[r] = w.h + (block.row0 + r) * inter;
    MultiplyItem<1>(weights, {h_block * kScaleBlock}, w.h_scale + block.row0, w.scale_stride, block.rows, panel);
    for (int r = 0; r < block.rows; ++r) {
      float values[kScaleBlock];
      panel.Read(r, 0, values);
      RoundToBfloat16(values, w.y2 + (block.row0 + r) * hidden + h_block * kScaleBlock);
    }
  });
}

}  // namespace jax_moe::cpu
