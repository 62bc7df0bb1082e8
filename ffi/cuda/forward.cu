// A call on the GPU: checks, then the launches of each stage in order on the caller's stream. Allocates nothing, never
// synchronises, keeps no state, so it can be captured and called from several threads, streams and devices.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

#include "../workspace.h"
#include "call.h"
#include "decode.h"
#include "device.h"
#include "kernels/finalize.cuh"
#include "kernels/grouped_gemm_sm90.cuh"
#include "kernels/route.cuh"
#include "launch.h"
#include "select.h"
#include "tensor_map.h"

namespace jax_moe::cuda {
namespace {

static_assert(kGemm1SharedBytes <= kMaxSharedBytes && kGemm2SharedBytes <= kMaxSharedBytes, "shared memory of an SM");

unsigned Ctas(int64_t items, int64_t per_cta) { return unsigned((items + per_cta - 1) / per_cta); }

Status Route(const Call& c) {
  RouteParameters r{};
  r.slots = c.slot_experts();
  r.num_expanded = int(c.p.expanded_rows());
  r.top_k = int(c.p.top_k);
  r.num_chunks = c.config.route_chunks;
  r.chunk_size = c.config.route_chunk_size;
  r.chunk_histogram = c.workspace.chunk_histogram;
  r.expanded_idx_to_permuted_idx = c.workspace.expanded_idx_to_permuted_idx;
  r.permuted_idx_to_token = c.workspace.permuted_idx_to_token;
  r.permuted_idx_to_expanded_idx = c.workspace.permuted_idx_to_expanded_idx;
  r.expert_offsets = c.workspace.expert_offsets;
  r.num_m_blocks = c.workspace.num_m_blocks;
  r.m_blocks = c.workspace.m_blocks;
  r.expert_weights =
      r.slots.packed && !c.p.do_finalize ? static_cast<uint16_t*>(c.buffers.expert_weights.data) : nullptr;
  LaunchShape shape{unsigned(r.num_chunks), kRouteThreads, unsigned(route_shared_bytes(r.slots.local_num_experts))};
  LaunchShape first = shape;
  if (c.p.hidden_states_are_bf16()) {
    r.tokens = c.quantize_tokens(int(c.p.hidden_size / kScaleBlock));
    first.grid += unsigned(c.config.quantize_ctas);
  }
  if (r.num_chunks == 1) return Launch("route_scatter", route_scatter, first, c.stream, r);
  if (Status s = Launch("route_count", route_count, first, c.stream, r); !s.ok()) return s;
  shape.overlap_previous = true;
  return Launch("route_scatter", route_scatter, shape, c.stream, r);
}

// The weights [L, rows, k] of one GEMM, in the caller's layout.
Status DescribeWeights(const Call& c, const Buffer& weights, const Buffer& scale, int64_t rows, int64_t k,
                       CUtensorMap* map, GemmShape* shape) {
  const int64_t k_blocks = k / kBlockK, experts = c.p.local_num_experts;
  const bool block_major = c.p.block_major_k();
  shape->b_scale = Floats(scale);
  shape->rows_per_expert = int(rows);
  shape->k_blocks = int(k_blocks);
  shape->expert_stride = int(block_major ? rows * k_blocks : rows);
  shape->k_stride = int(block_major ? rows : 0);
  shape->k_columns = block_major ? 0 : kBlockK;
  return block_major ? EncodeBytes(map, weights.data, experts * k_blocks * rows, kBlockK, kHalfN)
                     : EncodeBytes(map, weights.data, experts * rows, k, kHalfN);
}

Status Gemm1(const Call& c) {
  const Workspace& w = c.workspace;
  const int64_t hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  CUtensorMap b_map;
  GemmShape shape{};
  shape.column_step = c.p.gated() ? 128 : 256;
  shape.half_step = c.p.gated() ? int(inter) : 128;
  Status s = DescribeWeights(c, c.buffers.gemm1_weights, c.buffers.gemm1_weights_scale, c.p.gemm1_rows(), hidden,
                             &b_map, &shape);
  if (!s.ok()) return s;
  GatherA gather{static_cast<const uint8_t*>(c.buffers.hidden_states.data), w.permuted_idx_to_token,
                 Floats(c.buffers.hidden_states_scale), c.p.hidden_states_scale_block_stride,
                 c.p.hidden_states_scale_token_stride};
  if (c.p.hidden_states_are_bf16()) gather = {w.x, w.permuted_idx_to_token, w.x_scale, 1, hidden / kScaleBlock};
  const TileSchedule schedule{w.m_blocks, w.num_m_blocks, c.config.gemm1_columns};
  const void* delta = c.p.has_gemm1_lora_delta ? c.buffers.gemm1_lora_delta.data : nullptr;
  const LoraDelta lora{static_cast<const uint16_t*>(delta), w.permuted_idx_to_expanded_idx, c.p.gemm1_rows()};
  const ActivationEpilogue epilogue{
      w.h, w.h_scale, inter, w.scale_stride, c.activation(), lora, c.p.use_shuffled_weight != 0};
  return Launch("gemm1_sm90", gemm1_sm90, {unsigned(c.config.gemm1_grid), kGemmThreads, kGemm1SharedBytes, true},
                c.stream, b_map, gather, shape, schedule, epilogue);
}

Status Gemm2(const Call& c) {
  const Workspace& w = c.workspace;
  const int64_t rows = c.p.expanded_rows(), hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  CUtensorMap a_map, a_scale_map, b_map;
  GemmShape shape{};
  shape.column_step = 256;
  shape.half_step = 128;
  Status s = EncodeBytes(&a_map, w.h, rows, inter, kBoxRows);
  if (s.ok()) s = EncodeScales(&a_scale_map, w.h_scale, inter / kScaleBlock, rows, w.scale_stride, kScaleBox);
  if (s.ok())
    s = DescribeWeights(c, c.buffers.gemm2_weights, c.buffers.gemm2_weights_scale, hidden, inter, &b_map, &shape);
  if (!s.ok()) return s;
  const TileSchedule schedule{w.m_blocks, w.num_m_blocks, c.config.gemm2_columns};
  const Bf16Epilogue epilogue{w.y2, hidden, c.p.use_shuffled_weight != 0};
  return Launch("gemm2_sm90", gemm2_sm90, {unsigned(c.config.gemm2_grid), kGemmThreads, kGemm2SharedBytes, true},
                c.stream, a_map, a_scale_map, b_map, shape, schedule, epilogue);
}

Status Finalize(const Call& c) {
  if (!c.p.do_finalize) return {};
  FinalizeParameters f{};
  f.y2 = c.workspace.y2;
  f.expanded_idx_to_permuted_idx = c.workspace.expanded_idx_to_permuted_idx;
  f.weights = c.slot_weights();
  f.output = static_cast<uint16_t*>(c.buffers.output.data);
  f.top_k = int(c.p.top_k);
  f.hidden = int(c.p.hidden_size);
  f.num_rows = int(c.p.expanded_rows());
  const unsigned grid = unsigned(c.p.num_tokens) * Ctas(c.p.hidden_size, kFinalizeColumnsPerCta);
  return Launch("finalize", finalize, {grid, kFinalizeThreads, 0, true}, c.stream, f);
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
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone) {
    cudaGetLastError();  // the legacy stream while another one captures: not to be waited for either
    return {};
  }
  return CudaStatus(cudaStreamSynchronize(stream), stage);
}

}  // namespace

Status Forward(const Problem& problem, const Buffers& buffers, int device, void* stream, int stages) {
  if (Status s = CheckBuffers(problem, buffers); !s.ok()) return s;
  // NOTE: before the device is asked; again below, with its number of SMs.
  if (problem.mx() && !Select(problem, 132).decode.used) return Status::Unsupported(kNoMxFp8);
  int num_sms = 0;
  if (Status s = CheckDevice(device, &num_sms); !s.ok()) return s;
  if (problem.num_tokens == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  ExplainOnce(problem, num_sms);

  const Workspace workspace = CarveWorkspace(problem, buffers);
  const Config config = Select(problem, num_sms);
  if (problem.mx() && !config.decode.used) return Status::Unsupported(kNoMxFp8);
  const Call call{problem, buffers, workspace, config, static_cast<cudaStream_t>(stream)};
  const struct {
    Stage stage;
    const char* name;
    Status (*grouped)(const Call&);  // null: nothing to do
    Status (*decode)(const Call&);
  } order[] = {{kRoute, "route", Route, nullptr},
               {kPermute, "permute", nullptr, nullptr},
               {kGemm1, "gemm1", Gemm1, DecodeGemm1},
               {kGemm2, "gemm2", Gemm2, DecodeGemm2},
               {kFinalize, "finalize", Finalize, nullptr}};
  for (const auto& step : order) {
    const auto run = config.decode.used ? step.decode : step.grouped;
    if (run == nullptr || !(stages & step.stage)) continue;
    if (Status s = run(call); !s.ok()) return s;
    if (Status s = CheckStage(step.name, call.stream); !s.ok()) return s;
  }
  return {};
}

}  // namespace jax_moe::cuda
