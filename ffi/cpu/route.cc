// A stable counting sort of expanded indices by local expert, in one thread: it reads each id a few times and nothing
// else.
#include <algorithm>

#include "stages.h"

namespace jax_moe::cpu {
namespace {

// Which expert of this process each slot chose.
class LocalExperts {
 public:
  explicit LocalExperts(const Call& call)
      : topk_ids_(static_cast<const int32_t*>(call.buffers.topk_ids.data)),
        id_shift_(call.problem.topk_weights_dtype == int64_t(DataType::kNone) ? 16 : 0),
        num_experts_(call.problem.num_experts),
        num_local_(call.problem.local_num_experts) {
    const auto* given = static_cast<const int32_t*>(call.buffers.local_expert_offset.data);
    offset_ = given ? *given : call.problem.local_expert_offset;
  }
  // The local expert of an expanded index, or -1. NOTE: unsigned, so that no offset can overflow.
  int64_t operator[](int64_t expanded_idx) const {
    const int64_t id = topk_ids_[expanded_idx] >> id_shift_;
    const uint64_t local = uint64_t(id) - uint64_t(offset_);
    return id >= 0 && id < num_experts_ && local < uint64_t(num_local_) ? int64_t(local) : -1;
  }

 private:
  const int32_t* topk_ids_;
  int id_shift_;  // packed ids are the high halves
  int64_t num_experts_, num_local_, offset_;
};

// Lists the row blocks of all experts from expert_offsets.
void ListMBlocks(const Call& call) {
  const int32_t* offsets = call.workspace.expert_offsets;
  int32_t num_blocks = 0;
  for (int64_t e = 0; e < call.problem.local_num_experts; ++e) {
    const int32_t begin = offsets[e], end = offsets[e + 1], first = num_blocks;
    const int32_t last = first + (end - begin + kBlockM - 1) / kBlockM;
    for (; num_blocks < last; ++num_blocks) {
      MBlock block;
      block.row0 = begin + (num_blocks - first) * kBlockM;
      block.expert = int32_t(e);
      block.group_begin = num_blocks - (num_blocks - first) % kBlocksPerGroup;
      block.rows = int16_t(std::min(end - block.row0, kBlockM));
      block.group_size = int16_t(std::min(last - block.group_begin, kBlocksPerGroup));
      call.workspace.m_blocks[num_blocks] = block;
    }
  }
  *call.workspace.num_m_blocks = num_blocks;
}

}  // namespace

void Route(const Call& call) {
  const Workspace& w = call.workspace;
  const LocalExperts local_experts(call);
  const int64_t num_expanded = call.problem.expanded_rows(), num_local = call.problem.local_num_experts;

  std::fill_n(w.expert_offsets, num_local + 1, 0);
  for (int64_t i = 0; i < num_expanded; ++i)
    if (const int64_t e = local_experts[i]; e >= 0) ++w.expert_offsets[e + 1];
  for (int64_t e = 0; e < num_local; ++e) w.expert_offsets[e + 1] += w.expert_offsets[e];
  ListMBlocks(call);

  int32_t* next_row = w.chunk_histogram;  // [L] the first row of each expert that is still free
  std::copy_n(w.expert_offsets, num_local, next_row);
  for (int64_t i = 0; i < num_expanded; ++i) {
    const int64_t e = local_experts[i];
    const int32_t row = e >= 0 ? next_row[e]++ : -1;
    w.expanded_idx_to_permuted_idx[i] = row;
    if (row < 0) continue;
    w.permuted_idx_to_token[row] = int32_t(i / call.problem.top_k);
    if (call.problem.has_gemm1_lora_delta) w.permuted_idx_to_expanded_idx[row] = int32_t(i);
  }

  // The weights of packed ids are a result without do_finalize; given ones are the caller's already.
  if (call.problem.do_finalize || call.problem.topk_weights_dtype != int64_t(DataType::kNone)) return;
  const auto* packed = static_cast<const int32_t*>(call.buffers.topk_ids.data);
  auto* expert_weights = static_cast<uint16_t*>(call.buffers.expert_weights.data);
  for (int64_t i = 0; i < num_expanded; ++i) expert_weights[i] = uint16_t(packed[i]);
}

}  // namespace jax_moe::cpu
