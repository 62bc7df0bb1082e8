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
static_assert(kMxGemm1SharedBytes <= kMaxSharedBytes && kMxGemm2SharedBytes <= kMaxSharedBytes, "likewise");

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
  r.drawn_tiles = c.workspace.drawn_tiles;
  r.most_tail_rows = c.p.mx() ? 0 : kMostTailRows;
  r.m_blocks = c.workspace.m_blocks;
  r.expert_weights =
      r.slots.packed && !c.p.do_finalize ? static_cast<uint16_t*>(c.buffers.expert_weights.data) : nullptr;
  const LaunchShape shape{unsigned(r.num_chunks), kRouteThreads,
                          unsigned(route_shared_bytes(r.slots.local_num_experts)), true};
  LaunchShape first = shape;
  if (c.p.hidden_states_are_bf16()) {
    r.tokens = c.quantize_tokens(int(c.p.hidden_size / kScaleBlock));
    first.grid += unsigned(c.config.quantize_ctas);
  } else if (c.p.mx() && !c.token_scales_are_words()) {
    r.scales = {static_cast<const uint8_t*>(c.buffers.hidden_states_scale.data),
                c.p.hidden_states_scale_block_stride,
                c.p.hidden_states_scale_token_stride,
                c.workspace.permuted_x_scale,
                c.p.num_tokens * (c.p.hidden_size / kScaleBlock),
                int(c.p.num_tokens)};
    first.grid += unsigned(c.config.quantize_ctas);
  }
  if (r.num_chunks == 1) return Launch("route_scatter", route_scatter, first, c.stream, r);
  if (Status s = Launch("route_count", route_count, first, c.stream, r); !s.ok()) return s;
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
  return block_major ? EncodeBytes(map, weights.data, experts * k_blocks * rows, kBlockK, kHalfRows)
                     : EncodeBytes(map, weights.data, experts * rows, k, kHalfRows);
}

// The scales of such weights with MxFp8; by_turns: their up and gate rows take turns, which a grid's do not.
MxWeightScales DescribeScales(const Call& c, const Buffer& scale, bool by_turns) {
  const bool shuffled = c.p.use_shuffled_weight != 0;
  const MxScaleOrder rows = shuffled ? MxScaleOrder::kInterleaved : MxScaleOrder::kRows;
  const MxScaleOrder grid = by_turns ? MxScaleOrder::kGridByTurns : MxScaleOrder::kGrid;
  return {static_cast<const uint32_t*>(scale.data), c.p.weights_scale_rows == 1 ? rows : grid};
}

// Tokens' scales: the caller's, or those that the route's CTAs have made.
TokenScales DescribeTokenScales(const Call& c) {
  const Workspace& w = c.workspace;
  if (c.p.hidden_states_are_bf16()) return {w.x_scale, 1, c.p.hidden_size / kScaleBlock};
  const float* scale = Floats(c.buffers.hidden_states_scale);
  const int64_t block_stride = c.p.hidden_states_scale_block_stride;
  const int64_t token_stride = c.p.hidden_states_scale_token_stride;
  if (!c.p.mx()) return {scale, block_stride, token_stride};
  if (c.token_scales_are_words()) return {scale, 1, token_stride / kMxScales};
  return {w.permuted_x_scale, c.p.num_tokens, 1};
}

Status Gemm1(const Call& c) {
  const Workspace& w = c.workspace;
  const int64_t hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  CUtensorMap b_map;
  GemmShape shape{};
  // With MxFp8 shuffled up and gate rows take turns in 256 neighbours.
  const bool shuffled = c.p.use_shuffled_weight != 0, by_turns = c.p.mx() && shuffled && c.p.gated();
  const bool apart = c.p.gated() && !by_turns;
  shape.column_step = apart ? 128 : 256;
  shape.half_step = apart ? int(inter) : 128;
  Status s = DescribeWeights(c, c.buffers.gemm1_weights, c.buffers.gemm1_weights_scale, c.p.gemm1_rows(), hidden,
                             &b_map, &shape);
  if (!s.ok()) return s;
  const auto* x = c.p.hidden_states_are_bf16() ? w.x : static_cast<const uint8_t*>(c.buffers.hidden_states.data);
  const GatherA gather{x, w.permuted_idx_to_token};
  const TokenScales token_scales = DescribeTokenScales(c);
  const TileSchedule schedule{w.m_blocks, w.num_m_blocks, w.drawn_tiles, c.config.gemm1_columns};
  const void* delta = c.p.has_gemm1_lora_delta ? c.buffers.gemm1_lora_delta.data : nullptr;
  const LoraDelta lora{static_cast<const uint16_t*>(delta), w.permuted_idx_to_expanded_idx, c.p.gemm1_rows()};
  const unsigned grid = unsigned(c.config.gemm1_grid);
  if (c.p.mx()) {
    const MxScales scales{token_scales, DescribeScales(c, c.buffers.gemm1_weights_scale, by_turns)};
    const MxActivationEpilogue epilogue{w.h, w.h_scale, inter, w.scale_stride, c.activation(), lora, shuffled};
    return Launch("gemm1_mx_sm90", gemm1_mx_sm90, {grid, kGemmThreads, kMxGemm1SharedBytes, true}, c.stream, b_map,
                  gather, scales, shape, schedule, epilogue);
  }
  const ActivationEpilogue epilogue{w.h, w.h_scale, inter, w.scale_stride, c.activation(), lora, shuffled};
  return Launch("gemm1_sm90", gemm1_sm90, {grid, kGemmThreads, kGemm1SharedBytes, true}, c.stream, b_map, gather,
                token_scales, shape, schedule, epilogue);
}

Status Gemm2(const Call& c, Slab slab) {
  const Workspace& w = c.workspace;
  const int64_t rows = c.p.expanded_rows(), hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  CUtensorMap a_map, large_a_map, b_map;
  GemmShape shape{};
  shape.column_step = kSlabStep;
  shape.half_step = 128;
  shape.first_row = int(slab.first);
  Status s = EncodeBytes(&a_map, w.h, rows, inter, kBoxRows);
  if (s.ok()) s = EncodeBytes(&large_a_map, w.h, rows, inter, kLargeBoxRows);
  if (s.ok())
    s = DescribeWeights(c, c.buffers.gemm2_weights, c.buffers.gemm2_weights_scale, hidden, inter, &b_map, &shape);
  if (!s.ok()) return s;
  const TokenScales token_scales{w.h_scale, w.scale_stride, 1};
  const int columns = int(Ctas(slab.columns, kSlabStep));
  const TileSchedule schedule{w.m_blocks, w.num_m_blocks, w.drawn_tiles + 1, columns};
  const bool shuffled = c.p.use_shuffled_weight != 0;
  const unsigned grid = unsigned(c.config.gemm2_grid);
  if (c.p.mx()) {
    const MxScales scales{token_scales, DescribeScales(c, c.buffers.gemm2_weights_scale, false)};
    const MxBf16Epilogue epilogue{w.y2, w.y2_columns, slab.columns, shuffled};
    return Launch("gemm2_mx_sm90", gemm2_mx_sm90, {grid, kGemmThreads, kMxGemm2SharedBytes, true}, c.stream, a_map,
                  large_a_map, b_map, scales, shape, schedule, epilogue);
  }
  const Bf16Epilogue epilogue{w.y2, w.y2_columns, slab.columns, shuffled};
  return Launch("gemm2_sm90", gemm2_sm90, {grid, kGemmThreads, kGemm2SharedBytes, true}, c.stream, a_map, large_a_map,
                b_map, token_scales, shape, schedule, epilogue);
}

Status Finalize(const Call& c, Slab slab) {
  FinalizeParameters f{};
  f.y2 = c.workspace.y2;
  f.expanded_idx_to_permuted_idx = c.workspace.expanded_idx_to_permuted_idx;
  f.weights = c.slot_weights();
  f.output = static_cast<uint16_t*>(c.buffers.output.data) + slab.first;
  f.top_k = int(c.p.top_k);
  f.columns = int(slab.columns);
  f.y2_stride = int(c.workspace.y2_columns);
  f.output_stride = int(c.p.hidden_size);
  f.num_rows = int(c.p.expanded_rows());
  const unsigned grid = unsigned(c.p.num_tokens) * Ctas(slab.columns, kFinalizeColumnsPerCta);
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
  int num_sms = 0;
  if (Status s = CheckDevice(device, &num_sms); !s.ok()) return s;
  if (problem.num_tokens == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  ExplainOnce(problem, num_sms);

  const Workspace workspace = CarveWorkspace(problem, buffers);
  const Config config = Select(problem, num_sms);
  const Call call{problem, buffers, workspace, config,
                  LaunchStream(static_cast<cudaStream_t>(stream), problem.enable_pdl != 0)};
  const int launched = stages & LaunchedStages(problem, config);
  const auto run = [&](Stage stage, const char* name, const auto& launch) -> Status {
    if (!(launched & stage)) return {};
    if (Status s = launch(); !s.ok()) return s;
    return CheckStage(name, call.stream.handle);
  };
  const bool decode = config.decode.used;
  if (Status s = run(kRoute, "route", [&] { return Route(call); }); !s.ok()) return s;
  if (Status s = run(kGemm1, "gemm1", [&] { return decode ? DecodeGemm1(call) : Gemm1(call); }); !s.ok()) return s;
  for (int64_t first = 0; first < problem.hidden_size; first += workspace.y2_columns) {
    const Slab slab = workspace.slab(problem, first);
    if (Status s = run(kGemm2, "gemm2", [&] { return decode ? DecodeGemm2(call) : Gemm2(call, slab); }); !s.ok())
      return s;
    if (Status s = run(kFinalize, "finalize", [&] { return Finalize(call, slab); }); !s.ok()) return s;
  }
  return {};
}

}  // namespace jax_moe::cuda
