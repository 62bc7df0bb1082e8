// The choice, with its reasons.
#include "select.h"

#include <algorithm>
#include <sstream>

#include "../workspace.h"

namespace jax_moe::cuda {
namespace {

// A CTA places 1024 indices a round. Up to four rounds one CTA is done before a second launch would have started.
constexpr int64_t kRouteRound = 1024;
constexpr int64_t kSingleRouteRounds = 4;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Config Select(const Problem& p, int num_sms) {
  Config c{};
  const int64_t rows = std::max<int64_t>(p.expanded_rows(), 1);
  const int64_t rounds = CeilDiv(rows, kRouteRound);
  const int64_t rounds_per_cta = rounds <= kSingleRouteRounds ? rounds : CeilDiv(rounds, kMaxRouteChunks);
  c.route_chunk_size = int(rounds_per_cta * kRouteRound);
  c.route_chunks = int(CeilDiv(rows, c.route_chunk_size));

  // A gated GEMM1 multiplies 128 up rows beside their 128 gate rows, all others 256 neighbours. One persistent CTA an
  // SM, fewer when even the worst routing has fewer tiles.
  const int64_t most_m_blocks = std::min(rows, rows / kBlockM + std::min(p.local_num_experts, rows));
  c.gemm1_columns = int(CeilDiv(p.intermediate_size, p.gated() ? 128 : 256));
  c.gemm2_columns = int(CeilDiv(p.hidden_size, 256));
  c.gemm1_grid = int(std::min<int64_t>(num_sms, most_m_blocks * c.gemm1_columns));
  c.gemm2_grid = int(std::min<int64_t>(num_sms, most_m_blocks * c.gemm2_columns));
  return c;
}

std::string Explain(const Problem& p, int num_sms) {
  if (p.mx()) return std::string("no kernels: ") + kNoMxFp8 + "\n";
  const Config c = Select(p, num_sms);
  std::ostringstream text;
  text << "route: " << c.route_chunks << " x " << c.route_chunk_size << " indices, " << (c.route_chunks > 1 ? 2 : 1)
       << " launch(es)\n"
       << "permute: " << (p.hidden_states_are_bf16() ? "quantise 1x128, " : "") << "scales to permuted order\n"
       << "gemm1: grouped_gemm_sm90 " << (p.gated() ? "128x(128+128)x128" : "128x256x128")
       << ", gathered A, activation + 1x128 e4m3, " << c.gemm1_columns << " column tiles, " << c.gemm1_grid << " CTAs\n"
       << "gemm2: grouped_gemm_sm90 128x256x128, bf16, " << c.gemm2_columns << " column tiles, " << c.gemm2_grid
       << " CTAs\n"
       << "finalize: " << (p.do_finalize ? "weighted sum in slot order" : "left to the caller") << "\n"
       << "workspace: " << WorkspaceSize(p).at(p.num_tokens) << " bytes\n";
  return text.str();
}

}  // namespace jax_moe::cuda
