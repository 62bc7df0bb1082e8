// Finalising apart on the GPU: checks, then one launch.
#include "../finalize.h"
#include "device.h"
#include "kernels/finalize.cuh"
#include "launch.h"

namespace jax_moe::cuda {

Status FinalizeRows(const FinalizeProblem& p, const FinalizeBuffers& b, int device, void* stream) {
  if (Status s = CheckFinalize(p, b); !s.ok()) return s;
  int num_sms = 0;
  if (Status s = CheckDevice(device, &num_sms); !s.ok()) return s;
  if (p.num_tokens == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();

  FinalizeParameters f{};
  f.y2 = static_cast<uint16_t*>(b.gemm2_output.data);
  f.num_rows = int(p.num_rows);
  f.expanded_idx_to_permuted_idx = static_cast<const int32_t*>(b.expanded_idx_to_permuted_idx.data);
  const bool bf16 = p.weights_dtype == int64_t(DataType::kBFloat16);
  f.weights = {b.expert_weights.data, bf16 ? WeightsType::kBFloat16 : WeightsType::kFloat32};
  f.output = static_cast<uint16_t*>(b.output.data);
  f.top_k = int(p.top_k);
  f.columns = f.y2_stride = f.output_stride = int(p.hidden_size);
  f.columns_per_cta = finalize_columns_per_cta(p.num_tokens);
  const unsigned grid = unsigned(finalize_ctas(p.num_tokens, p.hidden_size));
  return Launch("finalize", finalize, {grid, kFinalizeThreads}, static_cast<cudaStream_t>(stream), f);
}

}  // namespace jax_moe::cuda
