// A call on the GPU: checks, then the launches of each stage in order on the caller's stream. Allocates nothing, never
// synchronises, keeps no state, so it can be captured and called from several threads, streams and devices.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

#include "../workspace.h"
#include "device.h"
#include "kernels/finalize.cuh"
#include "kernels/grouped_gemm_sm90.cuh"
#include "kernels/permute.cuh"
#include "kernels/route.cuh"
#include "launch.h"
#include "select.h"
#include "tensor_map.h"

namespace jax_moe::cuda {
namespace {

struct Call {
  const Problem& p;
  const Buffers& buffers;
  const Workspace& workspace;
  const Config& config;
  cudaStream_t stream;
};

unsigned Ctas(int64_t items, int64_t per_cta) { return unsigned((items + per_cta - 1) / per_cta); }

Status Route(const Call& c) {
  RouteParameters r{};
  r.topk_ids = static_cast<const int32_t*>(c.buffers.topk_ids.data);
  r.local_expert_offset = static_cast<const int32_t*>(c.buffers.local_expert_offset.data);
  r.offset = c.p.local_expert_offset;
  r.num_expanded = int(c.p.expanded_rows());
  r.top_k = int(c.p.top_k);
  r.num_experts = int(c.p.num_experts);
  r.local_num_experts = int(c.p.local_num_experts);
  r.num_chunks = c.config.route_chunks;
  r.chunk_size = c.config.route_chunk_size;
  r.chunk_histogram = c.workspace.chunk_histogram;
  r.expanded_idx_to_permuted_idx = c.workspace.expanded_idx_to_permuted_idx;
  r.permuted_idx_to_token = c.workspace.permuted_idx_to_token;
  r.expert_offsets = c.workspace.expert_offsets;
  r.num_m_blocks = c.workspace.num_m_blocks;
  r.m_blocks = c.workspace.m_blocks;
  r.expert_weights = static_cast<uint16_t*>(c.buffers.expert_weights.data);
  const LaunchShape shape{unsigned(r.num_chunks), kRouteThreads, unsigned(r.local_num_experts) * 4};
  if (r.num_chunks > 1)
    if (Status s = Launch("route_count", route_count, shape, c.stream, r); !s.ok()) return s;
  return Launch("route_scatter", route_scatter, shape, c.stream, r);
}

Status Permute(const Call& c) {
  const int64_t h_blocks = c.p.hidden_size / kScaleBlock;
  PermuteScalesParameters s{};
  if (c.p.hidden_states_are_bf16()) {
    const int64_t num_blocks = c.p.num_tokens * h_blocks;
    Status status = Launch("quantize_activations", quantize_activations,
                           {Ctas(num_blocks, kQuantizeBlocksPerCta), kQuantizeThreads}, c.stream,
                           static_cast<const uint16_t*>(c.buffers.hidden_states.data), c.workspace.x,
                           c.workspace.x_scale, num_blocks);
    if (!status.ok()) return status;
    s.scales = c.workspace.x_scale;
    s.block_stride = 1;
    s.token_stride = h_blocks;
  } else {
    s.scales = static_cast<const float*>(c.buffers.hidden_states_scale.data);
    s.block_stride = c.p.hidden_states_scale_block_stride;
    s.token_stride = c.p.hidden_states_scale_token_stride;
  }
  s.permuted_idx_to_token = c.workspace.permuted_idx_to_token;
  s.num_rows = c.workspace.expert_offsets + c.p.local_num_experts;
  s.num_blocks = int(h_blocks);
  s.permuted_scales = c.workspace.permuted_x_scale;
  s.scale_stride = c.workspace.scale_stride;
  const unsigned grid = Ctas(c.p.expanded_rows(), kPermuteThreads) * Ctas(h_blocks, kPermuteBlocksPerCta);
  return Launch("permute_scales", permute_scales, {grid, kPermuteThreads}, c.stream, s);
}

Status Gemm1(const Call& c) {
  const int64_t rows = c.p.expanded_rows(), hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  CUtensorMap a_scale_map, b_map;
  Status s = EncodeScales(&a_scale_map, c.workspace.permuted_x_scale, hidden / kScaleBlock, rows,
                          c.workspace.scale_stride, kBlockM);
  if (s.ok()) s = EncodeBytes(&b_map, c.buffers.gemm1_weights.data, c.p.local_num_experts * 2 * inter, hidden, kHalfN);
  if (!s.ok()) return s;
  const void* x = c.p.hidden_states_are_bf16() ? c.workspace.x : c.buffers.hidden_states.data;
  const GatherA gather{static_cast<const uint8_t*>(x), c.workspace.permuted_idx_to_token};
  const GemmShape shape{static_cast<const float*>(c.buffers.gemm1_weights_scale.data), int(2 * inter), 128, int(inter),
                        int(hidden / kBlockK)};
  const TileSchedule schedule{c.workspace.m_blocks, c.workspace.num_m_blocks, c.config.gemm1_columns};
  const ActivationEpilogue epilogue{c.workspace.h, c.workspace.h_scale, inter, c.workspace.scale_stride};
  return Launch("gemm1_sm90", gemm1_sm90, {unsigned(c.config.gemm1_grid), kGemmThreads, kGemm1SharedBytes}, c.stream,
                a_scale_map, b_map, gather, shape, schedule, epilogue);
}

Status Gemm2(const Call& c) {
  const int64_t rows = c.p.expanded_rows(), hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  CUtensorMap a_map, a_scale_map, b_map;
  Status s = EncodeBytes(&a_map, c.workspace.h, rows, inter, kBlockM);
  if (s.ok())
    s = EncodeScales(&a_scale_map, c.workspace.h_scale, inter / kScaleBlock, rows, c.workspace.scale_stride, kBlockM);
  if (s.ok()) s = EncodeBytes(&b_map, c.buffers.gemm2_weights.data, c.p.local_num_experts * hidden, inter, kHalfN);
  if (!s.ok()) return s;
  const GemmShape shape{static_cast<const float*>(c.buffers.gemm2_weights_scale.data), int(hidden), 256, 128,
                        int(inter / kBlockK)};
  const TileSchedule schedule{c.workspace.m_blocks, c.workspace.num_m_blocks, c.config.gemm2_columns};
  const Bf16Epilogue epilogue{c.workspace.y2, hidden};
  return Launch("gemm2_sm90", gemm2_sm90, {unsigned(c.config.gemm2_grid), kGemmThreads, kGemm2SharedBytes}, c.stream,
                a_map, a_scale_map, b_map, shape, schedule, epilogue);
}

Status Finalize(const Call& c) {
  if (!c.p.do_finalize) return {};
  const FinalizeParameters f{c.workspace.y2,
                             c.workspace.expanded_idx_to_permuted_idx,
                             static_cast<const int32_t*>(c.buffers.topk_ids.data),
                             static_cast<uint16_t*>(c.buffers.output.data),
                             int(c.p.top_k),
                             int(c.p.hidden_size)};
  const unsigned grid = unsigned(c.p.num_tokens) * Ctas(c.p.hidden_size, kFinalizeColumnsPerCta);
  return Launch("finalize", finalize, {grid, kFinalizeThreads}, c.stream, f);
}

// The flag is on when the variable is set to anything but "" and "0"; read once.
bool Flag(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

// JAX_MOE_EXPLAIN=1: the choice for each new problem, on stderr.
void ExplainOnce(const Problem& p, int num_sms) {
  static const bool wanted = Flag("JAX_MOE_EXPLAIN");
  if (!wanted) return;
  static std::mutex mutex;
  static std::set<std::string> told;
  const std::string text = Explain(p, num_sms);
  const std::lock_guard<std::mutex> lock(mutex);
  if (told.insert(text).second) std::fprintf(stderr, "jax_moe, T=%lld:\n%s", (long long)p.num_tokens, text.c_str());
}

// JAX_MOE_CHECK=1: waits after each stage and names the one that failed. Outside stream capture only.
Status CheckStage(const char* stage, cudaStream_t stream) {
  static const bool wanted = Flag("JAX_MOE_CHECK");
  if (!wanted) return {};
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  if (capture != cudaStreamCaptureStatusNone) return {};
  return CudaStatus(cudaStreamSynchronize(stream), stage);
}

}  // namespace

Status Forward(const Problem& problem, const Buffers& buffers, int device, void* stream, int stages) {
  if (Status s = CheckBuffers(problem, buffers); !s.ok()) return s;
  int num_sms = 0;
  if (Status s = CheckDevice(device, &num_sms); !s.ok()) return s;
  if (problem.num_tokens == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  ExplainOnce(problem, num_sms);

  const Workspace workspace = CarveWorkspace(problem, buffers);
  const Config config = Select(problem, num_sms);
  const Call call{problem, buffers, workspace, config, static_cast<cudaStream_t>(stream)};
  const struct {
    Stage stage;
    const char* name;
    Status (*run)(const Call&);
  } order[] = {{kRoute, "route", Route},
               {kPermute, "permute", Permute},
               {kGemm1, "gemm1", Gemm1},
               {kGemm2, "gemm2", Gemm2},
               {kFinalize, "finalize", Finalize}};
  for (const auto& step : order) {
    if (!(stages & step.stage)) continue;
    if (Status s = step.run(call); !s.ok()) return s;
    if (Status s = CheckStage(step.name, call.stream); !s.ok()) return s;
  }
  return {};
}

}  // namespace jax_moe::cuda
