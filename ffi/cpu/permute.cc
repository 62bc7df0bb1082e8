// Quantises tokens once each, and copies their scales to permuted order.
#include "parallel.h"
#include "quantize.h"
#include "stages.h"

namespace jax_moe::cpu {
namespace {

template <class Isa>
JAX_MOE_INLINE void QuantizeTokenOn(bool mx, const uint16_t* x, int64_t num_blocks, uint8_t* codes, float* scales) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    float values[kScaleBlock];
    for (int i = 0; i < kScaleBlock; ++i) values[i] = FloatFromBfloat16(x[b * kScaleBlock + i]);
    QuantizeBlock(mx, values, codes + b * kScaleBlock, scales + b);
  }
}
JAX_MOE_DISPATCH(void, QuantizeToken, (bool mx, const uint16_t* x, int64_t num_blocks, uint8_t* codes, float* scales),
                 (mx, x, num_blocks, codes, scales))

// Scales of tokens: that of block b and token t is at scales[b * block_stride + t * token_stride].
template <class Scale>
struct TokenScales {
  const Scale* scales;
  int64_t block_stride, token_stride;
};

// Writes them in permuted order, [H/128, scale_stride, scales of kScaleBlock columns].
template <class Scale>
void PermuteScales(const Call& call, const TokenScales<Scale>& given) {
  constexpr int kPerBlock = sizeof(float) / sizeof(Scale);  // a float32, or four E8M0 codes
  const Workspace& w = call.workspace;
  const int64_t num_rows = w.expert_offsets[call.problem.local_num_experts];
  auto* permuted = reinterpret_cast<Scale*>(w.permuted_x_scale);
  Parallel(call.problem.hidden_size / kScaleBlock, num_rows * kPerBlock, [&](WorkQueue& blocks) {
    for (int64_t b; blocks.Next(&b);)
      for (int64_t row = 0; row < num_rows; ++row) {
        const Scale* from = given.scales + w.permuted_idx_to_token[row] * given.token_stride;
        for (int s = 0; s < kPerBlock; ++s)
          permuted[(b * w.scale_stride + row) * kPerBlock + s] = from[(b * kPerBlock + s) * given.block_stride];
      }
  });
}

}  // namespace

void Permute(const Call& call) {
  const Problem& p = call.problem;
  const Workspace& w = call.workspace;
  const int64_t hidden = p.hidden_size, h_blocks = hidden / kScaleBlock;
  const void* scales = call.buffers.hidden_states_scale.data;
  int64_t block_stride = p.hidden_states_scale_block_stride, token_stride = p.hidden_states_scale_token_stride;
  if (p.hidden_states_are_bf16()) {
    const auto* x = static_cast<const uint16_t*>(call.buffers.hidden_states.data);
    Parallel(p.num_tokens, 4 * hidden, [&](WorkQueue& tokens) {
      for (int64_t t; tokens.Next(&t);)
        QuantizeToken(p.mx(), x + t * hidden, h_blocks, w.x + t * hidden, w.x_scale + t * h_blocks);
    });
    scales = w.x_scale;
    block_stride = 1;
    token_stride = hidden / p.scale_block();
  }
  if (p.mx())
    PermuteScales<uint8_t>(call, {static_cast<const uint8_t*>(scales), block_stride, token_stride});
  else
    PermuteScales<float>(call, {static_cast<const float*>(scales), block_stride, token_stride});
}

}  // namespace jax_moe::cpu
