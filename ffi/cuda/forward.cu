// A call on the GPU: checks, then the launches of each stage in order on the caller's stream. Allocates nothing, never
// synchronises, keeps no state, so it can be captured and called from several threads, streams and devices.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <numeric>
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

static_assert(kGroupedGemmSharedBytes<DeepSeekFormat> <= kMaxSharedBytes, "shared memory of an SM");
static_assert(kGroupedGemmSharedBytes<DeepSeekFewFormat> <= kMaxSharedBytes, "likewise");
static_assert(kGroupedGemmSharedBytes<MxFormat> <= kMaxSharedBytes, "likewise");
static_assert(kGroupedGemmSharedBytes<MxFewFormat> <= kMaxSharedBytes, "likewise");
static_assert(MxFewFormat::kMaxTokens == kFewRows && MxFormat::kNarrowTokens == kBlockM, "the blocks of Select()");

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
  r.gemm1_left = c.workspace.gemm1_left;
  r.gemm1_columns = c.config.gemm1_columns;
  r.num_m_blocks = c.workspace.num_m_blocks;
  r.drawn_tiles = c.workspace.drawn_tiles;
  r.block_rows = c.config.block_rows;
  r.most_tail_rows = c.config.most_tail_rows;
  r.m_blocks = c.workspace.m_blocks;
  r.expert_weights =
      r.slots.packed && !c.p.do_finalize ? static_cast<uint16_t*>(c.buffers.expert_weights.data) : nullptr;
  LaunchShape scatter{unsigned(r.num_chunks) + 1, kRouteThreads,
                      unsigned(route_shared_bytes(r.slots.local_num_experts)), true};
  if (c.p.hidden_states_are_bf16()) {
    r.tokens = c.quantize_tokens(int(c.p.hidden_size / kScaleBlock));
    scatter.grid += unsigned(c.config.quantize_ctas);
  } else if (c.config.tokens_are_values) {
    const int pieces = int(c.p.hidden_size / 16);
    r.fold = {static_cast<const uint8_t*>(c.buffers.hidden_states.data),
              static_cast<const uint8_t*>(c.buffers.hidden_states_scale.data),
              c.p.hidden_states_scale_block_stride,
              c.p.hidden_states_scale_token_stride,
              c.workspace.x_values,
              c.p.num_tokens * pieces,
              pieces};
    scatter.grid += unsigned(c.config.quantize_ctas);
  } else if (c.p.mx() && !c.token_scales_are_words()) {
    r.scales = {static_cast<const uint8_t*>(c.buffers.hidden_states_scale.data),
                c.p.hidden_states_scale_block_stride,
                c.p.hidden_states_scale_token_stride,
                c.workspace.permuted_x_scale,
                c.p.num_tokens * (c.p.hidden_size / kScaleBlock),
                int(c.p.num_tokens)};
    scatter.grid += unsigned(c.config.quantize_ctas);
  }
  if (c.config.route_counts_apart) {
    LaunchShape count = scatter;
    count.grid = unsigned(r.num_chunks);
    if (Status s = Launch("route_count", route_count, count, c.stream, r); !s.ok()) return s;
  } else if (r.num_chunks > 1) {
    return Launch("route_count_and_scatter", route_count_and_scatter, scatter, c.stream, r);
  }
  return Launch("route_scatter", route_scatter, scatter, c.stream, r);
}

// The weights [L, rows, k] of one GEMM, in the caller's layout.
Status DescribeWeights(const Call& c, const Buffer& weights, const Buffer& scale, int64_t rows, int64_t k, bool zipped,
                       WeightMaps* maps, GemmShape* shape) {
  const int64_t k_blocks = k / kBlockK, experts = c.p.local_num_experts;
  const bool block_major = c.p.block_major_k();
  shape->b_scale = Floats(scale);
  shape->rows_per_expert = int(rows);
  shape->k_blocks = int(k_blocks);
  shape->expert_stride = int(block_major ? rows * k_blocks : rows);
  shape->k_stride = int(block_major ? rows : 0);
  shape->k_columns = block_major ? 0 : kBlockK;
  const bool pairs = c.config.paired_weights;
  Status s;
  if (pairs) s = EncodePairs(&maps->paired, weights.data, experts * rows, k, kWarpgroupRows, zipped, c.config.l2_bytes);
  if (s.ok() && !(pairs && c.config.block_rows == kFewRows))
    s = EncodeWeights(&maps->whole, weights.data, experts * rows * (block_major ? k_blocks : 1),
                      block_major ? kBlockK : k, kHalfRows, zipped, c.config.l2_bytes);
  return s;
}

// The scales of such weights with MxFp8; by_turns: their up and gate rows take turns, which a grid's do not. k_blocks:
// of each of their tiles, or'ed with those of tiles that a launch has before them.
MxWeightScales DescribeScales(const Call& c, const Buffer& scale, const GemmShape& shape, bool by_turns, bool zipped,
                              int k_blocks, int most_words) {
  const unsigned of_row = unsigned(shape.k_blocks), scale_rows = unsigned(c.p.weights_scale_rows);
  const unsigned rows = unsigned(shape.rows_per_expert) / scale_rows;
  const bool interleaved = scale_rows == 1 && c.p.use_shuffled_weight != 0, grid_by_turns = scale_rows > 1 && by_turns;
  MxWeightScales s{};
  s.words = static_cast<const uint32_t*>(scale.data);
  s.to_expert = rows * of_row;
  s.to_128_rows = (grid_by_turns ? 2 : 128 / scale_rows) * of_row;
  s.to_k_block = interleaved ? 128 : 1;
  for (unsigned bit = 0; bit < std::size(s.to_row); ++bit) {
    const unsigned row = 1u << bit;
    if (interleaved)  // 128x4: the words of row r and K block k are at [r / 128][k][r % 32][r % 128 / 32]
      s.to_row[bit] = row < 32 ? 4 * row : row / 32;
    else if (grid_by_turns)  // of 32 rows 16 are up rows, and those in the first of every two eights
      s.to_row[bit] = (row == 8 ? rows / 2 : row / 64) * of_row;
    else
      s.to_row[bit] = row / scale_rows * of_row;
  }
  s.words_per_request = interleaved ? 1 : std::gcd(k_blocks, most_words);
  s.zipped = zipped;
  return s;
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

// What one GEMM is told of its tokens' and its weights' scales.
template <class Format>
typename Format::Scales ScalesOf(const Call& c, const TokenScales& tokens, const Buffer& weights,
                                 const GemmShape& shape, bool by_turns, bool zipped, int k_blocks) {
  if constexpr (!Format::kMx) {
    return tokens;
  } else {
    const MxWeightScales of_weights = DescribeScales(c, weights, shape, by_turns, zipped, k_blocks, Format::kMostWords);
    if constexpr (Format::kTokenPlanes > 1)
      return of_weights;
    else
      return {tokens, of_weights};
  }
}

// GEMM1, GEMM2 of a slab, or both, in one launch.
template <class Format, class Kernel>
Status GroupedGemms(const Call& c, const char* name, Kernel kernel, int stages, Slab slab) {
  const Workspace& w = c.workspace;
  const int64_t rows = c.p.expanded_rows(), hidden = c.p.hidden_size, inter = c.p.intermediate_size;
  // With MxFp8 shuffled up and gate rows take turns in 256 neighbours.
  const bool shuffled = c.p.use_shuffled_weight != 0, by_turns = Format::kMx && shuffled && c.p.gated();
  const bool apart = c.p.gated() && !by_turns;
  GroupedGemmParameters<Format> g{};
  GemmShape &first = g.shape[0], &second = g.shape[1];
  Status s = DescribeWeights(c, c.buffers.gemm1_weights, c.buffers.gemm1_weights_scale, c.p.gemm1_rows(), hidden,
                             !shuffled, &g.weights[0], &first);
  if (s.ok())
    s = DescribeWeights(c, c.buffers.gemm2_weights, c.buffers.gemm2_weights_scale, hidden, inter, false, &g.weights[1],
                        &second);
  // Tokens are float8 beside their scales, or values.
  const bool values = Format::kTokenPlanes > 1;
  const void* h = values ? static_cast<const void*>(w.h_values) : w.h;
  if (s.ok()) s = EncodeBytes(&g.h, h, rows, inter * Format::kTokenPlanes, kBoxRows, c.config.l2_bytes);
  if (s.ok()) s = EncodeBytes(&g.large_h, h, rows, inter * Format::kTokenPlanes, kLargeBoxRows, c.config.l2_bytes);
  if (!s.ok()) return s;
  first.column_step = apart ? 128 : 256;
  first.half_step = apart ? int(inter) : 128;
  second.column_step = kSlabStep;
  second.half_step = 128;
  second.first_row = int(slab.first);
  g.scales[0] = ScalesOf<Format>(c, DescribeTokenScales(c), c.buffers.gemm1_weights_scale, first, by_turns, !shuffled,
                                 first.k_blocks);
  g.scales[1] = ScalesOf<Format>(c, {w.h_scale, w.scale_stride, 1}, c.buffers.gemm2_weights_scale, second, false, false,
                                 first.k_blocks | second.k_blocks);
  const void* codes = c.p.hidden_states_are_bf16() ? w.x : c.buffers.hidden_states.data;
  g.rows = {static_cast<const uint8_t*>(values ? w.x_values : codes), w.permuted_idx_to_token};
  g.schedule = {w.m_blocks, w.num_m_blocks, w.drawn_tiles, {}};
  if (stages & kGemm1) g.schedule.num_columns[0] = c.config.gemm1_columns;
  if (stages & kGemm2) g.schedule.num_columns[1] = int(Ctas(slab.columns, kSlabStep));
  g.handover = {stages & kGemm1 ? w.gemm1_left : nullptr, int(c.p.local_num_experts)};
  const void* delta = c.p.has_gemm1_lora_delta ? c.buffers.gemm1_lora_delta.data : nullptr;
  const LoraDelta lora{static_cast<const uint16_t*>(delta), w.permuted_idx_to_expanded_idx, c.p.gemm1_rows()};
  const bool codes_of_h = !values || delta != nullptr;  // for GEMM2 or the caller
  g.activation = {codes_of_h ? w.h : nullptr,
                  codes_of_h ? w.h_scale : nullptr,
                  values ? w.h_values : nullptr,
                  inter,
                  w.scale_stride,
                  c.activation(),
                  lora,
                  shuffled,
                  c.config.h_stays};
  g.bf16 = {w.y2, w.y2_columns, slab.columns, shuffled, c.config.y2_stays};
  const LaunchShape shape{unsigned(c.config.gemm_grid), kGemmThreads, kGroupedGemmSharedBytes<Format>, true};
  return Launch(name, kernel, shape, c.stream, g);
}

Status Gemms(const Call& c, int stages, Slab slab) {
  const auto launch = [&](auto format, auto kernel) {
    return GroupedGemms<decltype(format)>(c, NameOf(c.config.gemm_kernel), kernel, stages, slab);
  };
  switch (c.config.gemm_kernel) {
    case GroupedKernel::kMany:
      return launch(DeepSeekFormat(), grouped_gemm_sm90);
    case GroupedKernel::kManyPairs:
      return launch(DeepSeekPairsFormat(), grouped_gemm_pairs_sm90);
    case GroupedKernel::kFew:
      return launch(DeepSeekFewFormat(), grouped_gemm_few_sm90);
    case GroupedKernel::kFewPairs:
      return launch(DeepSeekFewPairsFormat(), grouped_gemm_few_pairs_sm90);
    case GroupedKernel::kMxMany:
      return launch(MxFormat(), grouped_gemm_mx_sm90);
    case GroupedKernel::kMxFew:
      return launch(MxFewFormat(), grouped_gemm_mx_few_sm90);
    case GroupedKernel::kMxFewPairs:
      return launch(MxFewPairsFormat(), grouped_gemm_mx_few_pairs_sm90);
  }
  return Status::Internal("gemm1 and gemm2: a kernel that Select() does not know");
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
  f.discards_y2 = c.config.y2_stays;
  if (c.config.h_stays && !c.p.has_gemm1_lora_delta) {  // else h is a result
    f.h = c.config.tokens_are_values ? reinterpret_cast<uint8_t*>(c.workspace.h_values) : c.workspace.h;
    f.h_bytes = int(c.p.intermediate_size * (c.config.tokens_are_values ? 2 : 1));
  }
  f.columns_per_cta = finalize_columns_per_cta(c.p.num_tokens);
  const unsigned grid = unsigned(finalize_ctas(c.p.num_tokens, slab.columns));
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
  const auto run = [&](int stage, const char* name, const auto& launch) -> Status {
    if (!(launched & stage)) return {};
    if (Status s = launch(); !s.ok()) return s;
    return CheckStage(name, call.stream.handle);
  };
  if (config.decode.used) {
    if (Status s = run(kGemm1, "gemm1", [&] { return DecodeGemm1(call); }); !s.ok()) return s;
    return run(kGemm2, "gemm2", [&] { return DecodeGemm2(call); });
  }
  if (Status s = run(kRoute, "route", [&] { return Route(call); }); !s.ok()) return s;
  int gemms = launched & (kGemm1 | kGemm2);  // GEMM1 with the first slab of GEMM2
  for (int64_t first = 0; first < problem.hidden_size; first += workspace.y2_columns, gemms &= kGemm2) {
    const Slab slab = workspace.slab(problem, first);
    if (Status s = run(gemms, "gemm1 and gemm2", [&] { return Gemms(call, gemms, slab); }); !s.ok()) return s;
    if (Status s = run(kFinalize, "finalize", [&] { return Finalize(call, slab); }); !s.ok()) return s;
  }
  return {};
}

}  // namespace jax_moe::cuda
