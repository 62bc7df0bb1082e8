// Quantises tokens once each, and copies their scales to permuted order.
#include "parallel.h"
#include "quantize.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

template <class Isa>
JAX_MOE_INLINE void QuantizeTokenOn(const uint16_t* x, int64_t num_blocks, uint8_t* codes, float* scales) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    float values[kScaleBlock];
    for (int i = 0; i < kScaleBlock; ++i) values[i] = FloatFromBfloat16(x[b * kScaleBlock + i]);
    scales[b] = QuantizeBlock(values, codes + b * kScaleBlock);
  }
}
JAX_MOE_DISPATCH(void, QuantizeToken, (const uint16_t* x, int64_t num_blocks, uint8_t* codes, float* scales),
                 (x, num_blocks, codes, scales))

}  // namespace

void Permute(const Call& call) {
  const Problem& p = call.problem;
  const Workspace& w = call.workspace;
  const int64_t hidden = p.hidden_size, h_blocks = hidden / kScaleBlock;
  const auto* scales = static_cast<const float*>(call.buffers.hidden_states_scale.data);
  int64_t block_stride = p.hidden_states_scale_block_stride, token_stride = p.hidden_states_scale_token_stride;
  if (p.hidden_states_are_bf16()) {
    const auto* x = static_cast<const uint16_t*>(call.buffers.hidden_states.data);
    Parallel(p.num_tokens, 4 * hidden, [&](WorkQueue& tokens) {
      for (int64_t t; tokens.Next(&t);)
        QuantizeToken(x + t * hidden, h_blocks, w.x + t * hidden, w.x_scale + t * h_blocks);
    });
    scales = w.x_scale;
    block_stride = 1;
    token_stride = h_blocks;
  }
  const int64_t num_rows = w.expert_offsets[p.local_num_experts];
  Parallel(h_blocks, num_rows, [&](WorkQueue& blocks) {
    for (int64_t b; blocks.Next(&b);)
      for (int64_t row = 0; row < num_rows; ++row)
        w.permuted_x_scale[b * w.scale_stride + row] =
            scales[b * block_stride + w.permuted_idx_to_token[row] * token_stride];
  });
}

}  // namespace jax_moe::cpu
