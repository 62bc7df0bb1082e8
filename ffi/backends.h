// The functions of the contract on the backend of a device, for callers that learn at run time where arrays are.
// `device` is kOnCpu, or a CUDA device whose `stream` (a cudaStream_t) the work goes to: kUnsupported in builds without
// CUDA kernels.
#pragma once
#include "finalize.h"
#include "moe.h"
#include "routing.h"

namespace jax_moe {

inline constexpr int kOnCpu = -1;

Status Forward(const Problem& problem, const Buffers& buffers, int device, void* stream, int stages = kAllStages);
Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers, int device, void* stream);
Status FinalizeRows(const FinalizeProblem& problem, const FinalizeBuffers& buffers, int device, void* stream);

Status CheckCudaBuild();
Status Explain(const Problem& problem, int num_sms, std::string* text);   // cuda::Explain
Status LaunchedStages(const Problem& problem, int num_sms, int* stages);  // cuda::LaunchedStages

}  // namespace jax_moe
