// Lays out the workspace of a call: the only place that knows its order and sizes.
#include "workspace.h"

namespace jax_moe {
namespace {

constexpr int64_t kAlignment = 256;

class Carve {
 public:
  Carve(void* base, int64_t num_tokens)
      : next_((reinterpret_cast<uintptr_t>(base) + kAlignment - 1) / kAlignment * kAlignment),
        num_tokens_(num_tokens) {}

  // An array of constant + per_token * T elements.
  template <class T>
  T* Take(AffineBytes elements) {
    const int64_t item = sizeof(T);
    size_.constant += elements.constant * item + kAlignment - 1;
    size_.per_token += elements.per_token * item;
    T* result = reinterpret_cast<T*>(next_);
    next_ += (elements.at(num_tokens_) * item + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }

  AffineBytes size() const { return {size_.constant + kAlignment - 1, size_.per_token}; }

 private:
  uintptr_t next_;
  int64_t num_tokens_;
  AffineBytes size_;
};

}  // namespace

bool MayDecode(const Problem& p) {
  return p.do_finalize && !p.has_gemm1_lora_delta && !p.batch_invariant && p.local_num_experts <= kMaxDecodeExperts;
}

int64_t Y2Columns(const Problem& p) {
  if (!p.do_finalize || p.num_tokens <= kMostTokensOfWholeY2) return p.hidden_size;
  return std::min((p.hidden_size / 2 + kSlabStep - 1) / kSlabStep * kSlabStep, p.hidden_size);
}

Workspace CarveWorkspace(const Problem& p, const Buffers& buffers) {
  const int64_t h_blocks = p.hidden_size / kScaleBlock, i_blocks = p.intermediate_size / kScaleBlock;
  const int64_t experts = p.local_num_experts;
  Carve carve(buffers.workspace.data, p.num_tokens);
  Workspace w{};
  w.scale_stride = p.scale_stride();
  if (p.mx()) w.x_values = carve.Take<uint16_t>({0, p.hidden_size});
  if (p.hidden_states_are_bf16()) {
    w.x = p.mx() ? reinterpret_cast<uint8_t*>(w.x_values) : carve.Take<uint8_t>({0, p.hidden_size});
    w.x_scale = carve.Take<float>({0, (h_blocks + 3) / 4 * 4});
  }
  w.permuted_idx_to_token = carve.Take<int32_t>({0, p.top_k});
  if (p.has_gemm1_lora_delta) w.permuted_idx_to_expanded_idx = carve.Take<int32_t>({0, p.top_k});
  w.expert_offsets = w.gemm1_left = carve.Take<int32_t>({experts + 1, 0});
  w.chunk_histogram = carve.Take<int32_t>({kMaxRouteChunks * experts, 0});
  w.num_m_blocks = carve.Take<int32_t>({1, 0});
  // Enough for blocks of either size. NOTE: the last of these is never a block. The counter lies there because exported
  // modules state the size of the workspace: what grows it makes the library refuse them.
  const AffineBytes m_blocks{experts + 1, (p.top_k + kFewRows - 1) / kFewRows};
  w.m_blocks = carve.Take<MBlock>(m_blocks);
  w.drawn_tiles = reinterpret_cast<int32_t*>(w.m_blocks + m_blocks.at(p.num_tokens) - 1);
  w.permuted_x_scale = carve.Take<float>({3 * h_blocks, p.top_k * h_blocks});
  if (p.mx()) w.h_values = carve.Take<uint16_t>({0, p.top_k * p.intermediate_size});
  if (p.has_gemm1_lora_delta) {
    w.h = static_cast<uint8_t*>(buffers.gemm1_activation_output.data);
    w.h_scale = static_cast<float*>(buffers.gemm1_activation_scale.data);
  } else {
    w.h = p.mx() ? reinterpret_cast<uint8_t*>(w.h_values) : carve.Take<uint8_t>({0, p.top_k * p.intermediate_size});
    w.h_scale = carve.Take<float>({3 * i_blocks, p.top_k * i_blocks});
  }
  w.expanded_idx_to_permuted_idx = p.do_finalize && !p.has_gemm1_lora_delta
                                       ? carve.Take<int32_t>({0, p.top_k})
                                       : static_cast<int32_t*>(buffers.expanded_idx_to_permuted_idx.data);
  w.y2_columns = Y2Columns(p);
  w.y2 = p.do_finalize ? carve.Take<uint16_t>({0, p.top_k * w.y2_columns})
                       : static_cast<uint16_t*>(buffers.gemm2_output.data);
  if (MayDecode(p)) {
    w.decode_h = carve.Take<float>({kMaxDecodeSlots * p.intermediate_size, 0});
    w.decode_codes = carve.Take<uint8_t>({kMaxDecodeSlots * p.intermediate_size, 0});
    w.decode_scales = carve.Take<float>({kMaxDecodeSlots * (p.mx() ? 4 * i_blocks : (i_blocks + 3) / 4 * 4), 0});
  }
  w.size = carve.size();
  return w;
}

AffineBytes WorkspaceSize(const Problem& problem) { return CarveWorkspace(problem, Buffers{}).size; }

}  // namespace jax_moe
