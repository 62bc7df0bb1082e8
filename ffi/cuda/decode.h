// Launches of the decode kernels (kernels/decode_gemm_sm90.cuh), when select.cc chose them.
#pragma once
#include "call.h"

namespace jax_moe::cuda {

Status DecodeGemm1(const Call& call);
Status DecodeGemm2(const Call& call);

}  // namespace jax_moe::cuda
