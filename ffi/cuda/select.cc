// The choice, with its reasons.
#include "select.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "../workspace.h"
#include "kernels/decode_layout.h"

namespace jax_moe::cuda {
namespace {

// A CTA places 1024 indices a round. Up to so many rounds every CTA has counted all indices, of not too many experts,
// before a launch that counts them once would have ended.
constexpr int64_t kRouteRound = 1024;
constexpr int64_t kMostCountedRounds = 8;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes in flight an SM: under 64 KiB the memory is read visibly slower; far more only make everything else that is
// read, tokens, scales and h, wait behind weights. Stages of 16 KiB, where K and the rows allow.
constexpr int kLeastRingBytes = 64 * 1024, kStageBytes = 16 * 1024;
static_assert(kStageBytes / (kDecodeGemm1Rows * kScaleBlock) <= kDecodeWarps / kFewestTeams / (kDecodeGemm1Rows / 16),
              "for_block(): of a stage of gemm1 a warp has one K block at most");
constexpr int kRingBytes = 96 * 1024;
// Of gemm1, where a tile has more than that, and tokens do not come from a kernel before.
constexpr int kLongRingBytes = 128 * 1024;
// Rows of h are read while others are multiplied: with buffers for few experts at a time, each would be waited for.
constexpr int kHBytes = 96 * 1024;
// Local slots and bytes of weights to expect, with one and with two tiles of 8 tokens, beyond which the grouped kernels
// are level or faster: they cost some microseconds more before and behind the weights, but have less to do for each
// token. With MxFp8 and one tile slots alone count.
constexpr int64_t kMostExpectedSlots[2] = {64, 48};
constexpr double kMostExpectedBytes[2] = {750e6, 480e6};
// Rows of an expert to expect, up to which blocks of kFewRows hold most experts' whole: their small stages make room
// for more of them in the ring, and memory is read 1 to 3 % faster. MxFp8: up to which products of float8 and a factor
// a sum cost less than to make bf16 of the weights.
constexpr int64_t kFewExpectedRows = 28, kMxFewExpectedRows = 34;
// Bytes that L2 reads at a time. With 256 each request of TMA, for 128 of a row, brings the next K block's from memory
// too: weights that are read once come 1 to 8 % slower, but where row blocks share them, and arithmetic decides, tiles
// wait less. Rows of an expert to expect, up to which they count as read once.
constexpr int kL2BytesOnce = 128, kL2BytesShared = 256;
constexpr int64_t kMostRowsOnce = 64;
// 256 neighbouring bytes of a weight row, of two K blocks, asked for together come 2 to 4 % faster from memory, where
// they are read once. Each tile then waits for the products of a K block more: with less K than that it is level at
// best. In blocks of few rows, and with DeepSeekFp8, whose products take less, it pays sooner.
constexpr int64_t kLeastPairedK = 3072, kFewLeastPairedK = 2048;
// Bytes of h, or h and y2, to expect that L2 can keep until finalize, beside the weights that stream through it. To
// write what it drops takes memory twice as long as to read as much; but to keep it and to discard it takes
// instructions.
constexpr int64_t kMostKeptBytes = 40'000'000;
// More elements of bf16 tokens than that, every CTA would be longer at quantising them than its first weights take.
// Up to as many, tokens and h are held as f16.
constexpr int kMostTokenElements = 16 * 1024;
// NOTE: a decode kernel asks for more than half an SM's shared memory, else two of its CTAs might share an SM when they
// start beside the end of an earlier kernel.
constexpr int kMoreThanHalf = 120 * 1024;

// `most_teams`: of math warps, where a tile is one stage, which is then one team's from its first scale to its last
// sum. Where it is several, every team has some of each tile.
bool FitTile(const Problem& p, int64_t k, int rows, int ring_bytes, int other_bytes, int most_teams, DecodeTile* tile) {
  const int k_blocks = int(k / kScaleBlock);
  const int most_chunks = std::max(kStageBytes / (rows * int(kScaleBlock)), 1);
  tile->steps = int(CeilDiv(k_blocks, most_chunks));
  tile->chunks = int(CeilDiv(k_blocks, tile->steps));
  tile->stage_bytes = rows * tile->chunks * int(kScaleBlock);
  const int scale_bytes = p.mx() ? int(mx_stage_bytes(tile->stage_bytes)) : 0, left = kMaxSharedBytes - other_bytes;
  const int room = std::min<int64_t>(ring_bytes, int64_t(left) * tile->stage_bytes / (tile->stage_bytes + scale_bytes));
  const int stages = std::min(room / tile->stage_bytes, kMaxRingStages);
  tile->teams = kFewestTeams;
  if (tile->steps == 1)
    while (tile->teams < kMostTeams && 2 * tile->teams <= std::min({stages, most_teams, kDecodeWarps * 16 / rows}))
      tile->teams *= 2;
  tile->stages = stages / tile->teams * tile->teams;
  tile->shared_bytes = std::max(tile->stages * (tile->stage_bytes + scale_bytes) + other_bytes, kMoreThanHalf);
  const StageShares shares(rows, tile->teams);
  return room >= kLeastRingBytes && shares.blocks_of_tile(tile->chunks, tile->steps) <= 32 &&
         (tile->steps == 1 || shares.blocks_of_stage(tile->chunks) == 1);
}

// Of the weights of local experts that some token asks for, if all experts are as likely.
double ExpectedBytes(const Problem& p) {
  const double share = double(p.top_k) / double(p.num_experts);
  const double active = double(p.local_num_experts) * (1 - std::pow(1 - std::min(share, 1.), double(p.num_tokens)));
  return active * double(p.gemm1_rows() * p.hidden_size + p.hidden_size * p.intermediate_size);
}

// A few tokens: the weights of the active experts are all that matters, and reading them once at full rate is what
// the decode kernels do. Tiles of gemm1 are as small as a product instruction allows, so that even one expert occupies
// all SMs. gemm2 takes the widest slice that still gives two thirds of the SMs one each: that many read at full rate,
// and every slice reads all of h.
DecodeConfig SelectDecode(const Problem& p, int num_sms) {
  DecodeConfig d{};
  const int64_t tokens = p.num_tokens;
  if (!MayDecode(p) || tokens < 1 || tokens > kMaxDecodeTokens || p.expanded_rows() > kMaxDecodeSlots) return d;
  d.token_tiles = int(CeilDiv(tokens, 8));
  const int64_t most_slots = kMostExpectedSlots[d.token_tiles - 1];
  if (p.expanded_rows() * p.local_num_experts > most_slots * p.num_experts) return d;
  const bool any_bytes = p.mx() && d.token_tiles == 1;
  if (!any_bytes && ExpectedBytes(p) > kMostExpectedBytes[d.token_tiles - 1]) return d;
  d.slice_columns = 16;
  for (int columns : {32, 64, 128})
    if (p.hidden_size / columns >= num_sms * 2 / 3) d.slice_columns = columns;
  const int h_blocks = int(p.hidden_size / kScaleBlock), i_blocks = int(p.intermediate_size / kScaleBlock);
  const bool fresh = p.hidden_states_are_bf16() && tokens * p.hidden_size > kMostTokenElements;
  if (fresh) d.quantize_ctas = int(CeilDiv(tokens * h_blocks, 16));
  // As f16 where that is little memory. NOTE: the workspace has room for f16 of half as many slots.
  const auto value_bytes = [&](int64_t columns) {
    return d.token_tiles == 1 && tokens * columns <= kMostTokenElements ? kHalfBytes : kCodeBytes;
  };
  d.gemm1.value_bytes = value_bytes(p.hidden_size);
  d.gemm2.value_bytes =
      p.expanded_rows() * kHalfBytes <= kMaxDecodeSlots ? value_bytes(p.intermediate_size) : kCodeBytes;
  const auto gemm2_bytes = [&](int h_buffers) {
    return int(
        DecodeGemm2Layout(0, i_blocks, int(tokens), int(p.top_k), d.token_tiles, h_buffers, d.gemm2.value_bytes, p.mx())
            .bytes);
  };
  const int gemm1_other =
      int(DecodeGemm1Layout(0, h_blocks, int(tokens), d.token_tiles, d.gemm1.value_bytes, p.mx()).bytes);
  d.h_buffers = std::clamp(kHBytes / (gemm2_bytes(1) - gemm2_bytes(0)), 2, kMaxHBuffers);
  const bool is_long = kDecodeGemm1Rows * p.hidden_size > kRingBytes && !fresh;
  const bool gemm1_fits = FitTile(p, p.hidden_size, kDecodeGemm1Rows, is_long ? kLongRingBytes : kRingBytes,
                                  gemm1_other, kFewestTeams, &d.gemm1);
  const bool gemm2_fits =
      FitTile(p, p.intermediate_size, d.slice_columns, kRingBytes, gemm2_bytes(d.h_buffers), d.h_buffers, &d.gemm2);
  // NOTE: as with stages of the ring.
  if (d.gemm2.steps == 1) d.h_buffers = d.h_buffers / d.gemm2.teams * d.gemm2.teams;
  d.used = gemm1_fits && gemm2_fits;
  d.overlap_previous = true;
  const int64_t most_tiles = std::min(p.expanded_rows(), p.local_num_experts) * (p.gemm1_rows() / kDecodeGemm1Rows);
  d.gemm1.grid = int(std::min<int64_t>(num_sms, most_tiles));
  d.gemm2.grid = int(std::min<int64_t>(num_sms, p.hidden_size / d.slice_columns));
  return d;
}

}  // namespace

const char* NameOf(GroupedKernel kernel) {
  switch (kernel) {
    case GroupedKernel::kMany:
      return "grouped_gemm_sm90";
    case GroupedKernel::kManyPairs:
      return "grouped_gemm_pairs_sm90";
    case GroupedKernel::kFew:
      return "grouped_gemm_few_sm90";
    case GroupedKernel::kFewPairs:
      return "grouped_gemm_few_pairs_sm90";
    case GroupedKernel::kMxMany:
      return "grouped_gemm_mx_sm90";
    case GroupedKernel::kMxFew:
      return "grouped_gemm_mx_few_sm90";
    case GroupedKernel::kMxFewPairs:
      return "grouped_gemm_mx_few_pairs_sm90";
  }
  return "";
}

Config Select(const Problem& p, int num_sms) {
  Config c{};
  c.decode = SelectDecode(p, num_sms);
  const int64_t rows = std::max<int64_t>(p.expanded_rows(), 1);
  const int64_t rounds = CeilDiv(rows, kRouteRound);
  c.route_chunk_size = int(CeilDiv(rounds, kMaxRouteChunks) * kRouteRound);
  c.route_chunks = int(CeilDiv(rows, c.route_chunk_size));
  c.route_counts_apart = rounds > (p.local_num_experts <= kMostCountedExperts ? kMostCountedRounds : 1);
  // 64 blocks of 128 a CTA of 1024 threads, four times in flight; two CTAs an SM.
  c.quantize_ctas = int(std::clamp<int64_t>(CeilDiv(p.num_tokens * p.hidden_size / kScaleBlock, 64), 1, 2 * num_sms));

  // NOTE: both kernels of DeepSeekFp8 sum in the same order, those of MxFp8 do not.
  const int64_t few_rows = p.mx() ? kMxFewExpectedRows : kFewExpectedRows;
  const bool few = p.expanded_rows() <= few_rows * p.num_experts && !(p.mx() && p.batch_invariant);
  c.tokens_are_values = p.mx() && !few && !c.decode.used;
  c.block_rows = few ? kFewRows : kBlockM;
  const bool read_once = p.expanded_rows() <= kMostRowsOnce * p.num_experts;
  c.l2_bytes = read_once ? kL2BytesOnce : kL2BytesShared;
  // NOTE: in BlockMajorK a K block's rows are the neighbours.
  c.paired_weights = read_once && !p.block_major_k() && !c.tokens_are_values &&
                     p.hidden_size >= (few && !p.mx() ? kFewLeastPairedK : kLeastPairedK);
  const int64_t expected_rows = p.expanded_rows() * p.local_num_experts / p.num_experts;
  const int64_t h_bytes = expected_rows * (c.tokens_are_values ? 2 : 1) * p.intermediate_size;
  const int64_t y2_bytes = expected_rows * 2 * p.hidden_size;
  // NOTE: half of the columns after the other, h is needed twice.
  c.h_stays = p.do_finalize && Y2Columns(p) == p.hidden_size && h_bytes <= kMostKeptBytes;
  c.y2_stays = c.h_stays && h_bytes + y2_bytes <= kMostKeptBytes;
  c.most_tail_rows = few ? 0 : kMostTailRows;
  if (c.tokens_are_values)
    c.gemm_kernel = GroupedKernel::kMxMany;
  else if (p.mx())
    c.gemm_kernel = c.paired_weights ? GroupedKernel::kMxFewPairs : GroupedKernel::kMxFew;
  else if (few)
    c.gemm_kernel = c.paired_weights ? GroupedKernel::kFewPairs : GroupedKernel::kFew;
  else
    c.gemm_kernel = c.paired_weights ? GroupedKernel::kManyPairs : GroupedKernel::kMany;
  // A gated GEMM1 multiplies 128 up rows beside their 128 gate rows, all others 256 neighbours. One persistent CTA an
  // SM, fewer when even the worst routing has fewer tiles of either GEMM.
  const int64_t most_m_blocks = std::min(rows, rows / c.block_rows + std::min(p.local_num_experts, rows));
  c.gemm1_columns = int(CeilDiv(p.intermediate_size, p.gated() ? 128 : 256));
  const int64_t most_columns = std::max<int64_t>(c.gemm1_columns, CeilDiv(Y2Columns(p), kSlabStep));
  c.gemm_grid = int(std::min<int64_t>(num_sms, most_m_blocks * most_columns));
  return c;
}

int LaunchedStages(const Problem& p, const Config& c) {
  if (p.num_tokens == 0) return 0;
  if (c.decode.used) return kGemm1 | kGemm2;
  return kRoute | kGemm1 | kGemm2 | (p.do_finalize ? kFinalize : 0);
}

int LaunchedStages(const Problem& p, int num_sms) { return LaunchedStages(p, Select(p, num_sms)); }

std::string Explain(const Problem& p, int num_sms) {
  const Config c = Select(p, num_sms);
  std::ostringstream text;
  if (const DecodeConfig& d = c.decode; d.used) {
    text << "gemm1: decode_gemm_sm90, " << d.token_tiles * 8 << " token columns, tiles of " << kDecodeGemm1Rows
         << " rows, ring of " << d.gemm1.stages << " x " << d.gemm1.stage_bytes << " bytes for " << d.gemm1.teams
         << " teams, " << d.gemm1.grid << " CTAs\n"
         << "gemm2: decode_gemm_sm90, slices of " << d.slice_columns << " columns, ring of " << d.gemm2.stages << " x "
         << d.gemm2.stage_bytes << " bytes for " << d.gemm2.teams << " teams, h of " << d.h_buffers << " experts, "
         << d.gemm2.grid << " CTAs, weighted sum inside\n"
         << (p.mx() ? "scales: E8M0, with every stage\n" : "") << "workspace: " << WorkspaceSize(p).at(p.num_tokens)
         << " bytes\n";
    return text.str();
  }
  const std::string format = p.mx() ? "1x32" : "1x128", values = c.tokens_are_values ? " as bf16 values" : " e4m3";
  const bool few = c.block_rows == kFewRows;
  if (p.batch_invariant) text << "batch invariant: grouped kernels at every size\n";
  text << "route: " << c.route_chunks << " x " << c.route_chunk_size << " indices, " << (c.route_counts_apart ? 2 : 1)
       << " launch(es)" << (p.hidden_states_are_bf16() ? ", tokens quantised " + format + values + " on the side" : "")
       << "\n"
       << "gemm1 and gemm2: " << NameOf(c.gemm_kernel) << ", " << c.gemm_grid << " CTAs, " << (few ? 8 : 16) << " to "
       << c.block_rows << " tokens, " << c.l2_bytes << " bytes into L2 at a time"
       << (c.paired_weights ? ", weights of two K blocks together" : "") << "\n"
       << "gemm1: " << (p.gated() ? "(128+128) rows" : "256 rows") << ", gathered A, activation + " << format << values
       << ", " << c.gemm1_columns << " column tiles\n"
       << "gemm2: 256 rows, bf16, " << CeilDiv(Y2Columns(p), kSlabStep) << " column tiles\n"
       << (Y2Columns(p) < p.hidden_size ? "gemm2 and finalize: one half of the columns after the other\n" : "")
       << "finalize: " << (p.do_finalize ? "weighted sum in slot order" : "left to the caller")
       << (c.h_stays ? (c.y2_stays ? ", h and y2 stay in L2 until then" : ", h stays in L2 until then") : "") << "\n"
       << "workspace: " << WorkspaceSize(p).at(p.num_tokens) << " bytes\n";
  return text.str();
}

}  // namespace jax_moe::cuda
