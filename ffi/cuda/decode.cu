// From a call to the parameters and tensor maps of the two decode kernels.
#include "decode.h"
#include "kernels/decode_gemm_sm90.cuh"
#include "kernels/quantize.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace jax_moe::cuda {
namespace {

// Weights [L, rows, k] in the caller's layout, in tiles of tile_rows and boxes of box_rows x `tile.chunks` K blocks.
Status DescribeStream(const Call& c, const Buffer& weights, const Buffer& scale, int64_t rows, int64_t k, int tile_rows,
                      int box_rows, const DecodeTile& tile, CUtensorMap* map, WeightStream* stream) {
  const int64_t k_blocks = k / kScaleBlock, experts = c.p.local_num_experts;
  const bool block_major = c.p.block_major_k();
  stream->scale = Floats(scale);
  stream->rows = int(rows);
  stream->k_blocks = int(k_blocks);
  stream->chunks = tile.chunks;
  stream->steps = tile.steps;
  stream->shares = StageShares(tile_rows, tile.teams);
  stream->stage_blocks = stream->shares.blocks_of_stage(tile.chunks);
  stream->tile_blocks = stream->shares.blocks_of_tile(tile.chunks, tile.steps);
  stream->expert_y = block_major ? 0 : int(rows);
  stream->expert_z = block_major ? int(k_blocks) : 0;
  stream->stages = tile.stages;
  stream->stage_bytes = unsigned(tile.stage_bytes);
  return block_major ? EncodeChunks(map, weights.data, rows, experts * k_blocks, kScaleBlock, rows * kScaleBlock,
                                    box_rows, tile.chunks)
                     : EncodeChunks(map, weights.data, experts * rows, k_blocks, k, kScaleBlock, box_rows, tile.chunks);
}

// With MxFp8, the scales of the same weights, of which the stream has stages.
MxScaleStream DescribeMxScales(const Call& c, const Buffer& scale, const WeightStream& stream, bool gated) {
  MxScaleStream s{};
  if (!c.p.mx()) return s;
  s.bytes = static_cast<const uint8_t*>(scale.data);
  s.k_blocks = stream.k_blocks;
  s.expert_bytes = stream.rows / c.p.weights_scale_rows * stream.k_blocks * 4;
  s.grid = c.p.weights_scale_rows > 1;
  s.step = c.p.use_shuffled_weight && !s.grid ? 512 : 4;
  s.copy_bytes = 4;
  if (s.step == 4)
    for (int words : {2, 4})
      if (stream.chunks % words == 0 && stream.k_blocks % words == 0) s.copy_bytes = words * 4;
  s.half_rows = c.p.use_shuffled_weight && gated ? stream.rows / 2 : 0;
  return s;
}

LaunchShape ShapeOf(const Call& c, const DecodeTile& tile, bool overlap) {
  return {unsigned(tile.grid), unsigned(decode_threads(c.p.mx())), unsigned(tile.shared_bytes), overlap};
}

}  // namespace

Status DecodeGemm1(const Call& c) {
  const DecodeConfig& d = c.config.decode;
  DecodeGemm1Parameters p{};
  CUtensorMap map;
  Status s = DescribeStream(c, c.buffers.gemm1_weights, c.buffers.gemm1_weights_scale, c.p.gemm1_rows(),
                            c.p.hidden_size, kDecodeGemm1Rows, 16, d.gemm1, &map, &p.stream);
  if (!s.ok()) return s;
  p.slots = c.slot_experts();
  p.num_tokens = int(c.p.num_tokens);
  p.top_k = int(c.p.top_k);
  p.x = c.buffers.hidden_states.data;
  p.x_is_bf16 = c.p.hidden_states_are_bf16();
  p.x_is_fresh = d.quantize_ctas > 0;
  p.x_scale = c.buffers.hidden_states_scale.data;
  p.block_stride = c.p.hidden_states_scale_block_stride;
  p.token_stride = c.p.hidden_states_scale_token_stride;
  bool overlap = d.overlap_previous;
  if (p.x_is_fresh) {
    const QuantizeTokens tokens = c.quantize_tokens(word_pitch(p.stream.k_blocks));
    s = Launch("quantize_tokens", quantize_tokens, {unsigned(d.quantize_ctas), kQuantizeThreads, 0, overlap}, c.stream,
               tokens);
    if (!s.ok()) return s;
    overlap = true;
    p.x = tokens.codes;
    p.x_is_bf16 = false;
    p.x_scale = tokens.scales;
  }
  p.intermediate = int(c.p.intermediate_size);
  p.num_tiles = int(c.p.gemm1_rows() / kDecodeGemm1Rows);
  p.shuffled = c.p.use_shuffled_weight != 0;
  p.activation = c.activation();
  p.h = c.workspace.decode_h;
  p.mx = DescribeMxScales(c, c.buffers.gemm1_weights_scale, p.stream, c.p.gated());
  s = Launch("decode_gemm1", FindDecodeGemm1(d.token_tiles, c.p.mx(), d.gemm1.value_bytes),
             ShapeOf(c, d.gemm1, d.overlap_previous), c.stream, map, p);
  if (!s.ok()) return s;
  DecodeQuantizeParameters q{};
  q.slots = p.slots;
  q.num_slots = int(c.p.expanded_rows());
  q.top_k = p.top_k;
  q.k_blocks = int(c.p.intermediate_size / kScaleBlock);
  q.h = p.h;
  q.values = c.workspace.decode_codes;
  q.value_bytes = d.gemm2.value_bytes;
  q.scales = c.workspace.decode_scales;
  const unsigned warps = unsigned(q.num_slots * q.k_blocks), per_cta = kDecodeQuantizeThreads / 32;
  return Launch("decode_quantize", c.p.mx() ? decode_quantize_mx : decode_quantize,
                {(warps + per_cta - 1) / per_cta, kDecodeQuantizeThreads, 0, true}, c.stream, q);
}

Status DecodeGemm2(const Call& c) {
  const DecodeConfig& d = c.config.decode;
  DecodeGemm2Parameters p{};
  CUtensorMap map;
  Status s = DescribeStream(c, c.buffers.gemm2_weights, c.buffers.gemm2_weights_scale, c.p.hidden_size,
                            c.p.intermediate_size, d.slice_columns, d.slice_columns, d.gemm2, &map, &p.stream);
  if (!s.ok()) return s;
  p.slots = c.slot_experts();
  p.weights = c.slot_weights();
  p.num_tokens = int(c.p.num_tokens);
  p.top_k = int(c.p.top_k);
  p.h = c.workspace.decode_codes;
  p.h_scale = c.workspace.decode_scales;
  p.hidden = int(c.p.hidden_size);
  p.slice_rows = d.slice_columns;
  p.h_buffers = d.h_buffers;
  p.shuffled = c.p.use_shuffled_weight != 0;
  p.output = static_cast<uint16_t*>(c.buffers.output.data);
  p.mx = DescribeMxScales(c, c.buffers.gemm2_weights_scale, p.stream, false);
  return Launch("decode_gemm2", FindDecodeGemm2(d.token_tiles, c.p.mx(), d.gemm2.value_bytes),
                ShapeOf(c, d.gemm2, true), c.stream, map, p);
}

}  // namespace jax_moe::cuda
