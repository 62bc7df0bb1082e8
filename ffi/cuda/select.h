// Which kernels and grids a problem gets: a pure function of the problem and the number of SMs, testable and printable
// without a device. A new kernel, tile or GPU makes its entry here.
#pragma once
#include <string>

#include "../moe.h"

namespace jax_moe::cuda {

struct Config {
  int route_chunks;      // CTAs of the route kernels; one launch when 1
  int route_chunk_size;  // expanded indices a CTA
  int gemm1_grid;        // persistent CTAs
  int gemm2_grid;
  int gemm1_columns;  // column tiles of a row block
  int gemm2_columns;
};

// Why a call with MxFp8 is refused on a GPU.
inline constexpr char kNoMxFp8[] =
    "fp8_quantization_type must be DeepSeekFp8 on a GPU in this version, got MxFp8; fold the weights with "
    "prepare_mxfp8_weights() and call with DeepSeekFp8, or run on the CPU";

Config Select(const Problem& problem, int num_sms);

}  // namespace jax_moe::cuda
