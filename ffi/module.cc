// The Python module jax_moe._native: the only file that sees Python. A raw layer: pointers and sizes as integers, in
// the order of moe.h. jax_moe/native.py is its one caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <iterator>
#include <new>
#include <stdexcept>

#include "finalize.h"
#include "moe.h"
#include "routing.h"
#include "xla_handlers.h"

#if JAX_MOE_HAS_CUDA
#include "cuda/device.h"
#endif

namespace nb = nanobind;

namespace jax_moe {
namespace {

constexpr int64_t Problem::* kFields[] = {
#define FIELD(name) &Problem::name,
    JAX_MOE_PROBLEM_FIELDS(FIELD)
#undef FIELD
};
constexpr Buffer Buffers::* kBuffers[] = {
#define BUFFER(name) &Buffers::name,
    JAX_MOE_INPUTS(BUFFER) JAX_MOE_OUTPUTS(BUFFER)
#undef BUFFER
};

[[noreturn]] void RaiseNotImplemented(const std::string& text) {
  PyErr_SetString(PyExc_NotImplementedError, text.c_str());
  throw nb::python_error();
}

void RaiseUnlessOk(const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidArgument:
      throw nb::value_error(status.message.c_str());
    case StatusCode::kUnsupported:
      RaiseNotImplemented(status.message);
    case StatusCode::kInternal:
      throw std::runtime_error(status.message);
  }
}

// A struct from the values of its members, in order. `name` begins the message when there are not as many.
template <class Struct, size_t kCount>
Struct FromFields(const char* name, int64_t Struct::* const (&members)[kCount], const std::vector<int64_t>& fields) {
  if (fields.size() != kCount)
    throw nb::value_error((std::string(name) + ": fields must be " + std::to_string(kCount) + " integers, got " +
                           std::to_string(fields.size()))
                              .c_str());
  Struct result;
  for (size_t i = 0; i < kCount; ++i) result.*members[i] = fields[i];
  return result;
}

template <class Struct, size_t kCount>
Struct FromPointers(const char* function, Buffer Struct::* const (&members)[kCount],
                    const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes) {
  if (pointers.size() != kCount || sizes.size() != kCount)
    throw nb::value_error((std::string(function) + ": pointers and sizes must have " + std::to_string(kCount) +
                           " entries, got " + std::to_string(pointers.size()) + " and " + std::to_string(sizes.size()))
                              .c_str());
  Struct buffers;
  for (size_t i = 0; i < kCount; ++i) buffers.*members[i] = {reinterpret_cast<void*>(pointers[i]), sizes[i]};
  return buffers;
}

// Runs `work()` without Python's lock and raises what its Status says.
template <class Work>
void Run(const Work& work) {
  Status status;
  {
    nb::gil_scoped_release released;
    status = work();
  }
  RaiseUnlessOk(status);
}

void ForwardCpu(const Problem& problem, const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes,
                int stages) {
  const Buffers buffers = FromPointers("forward", kBuffers, pointers, sizes);
  Run([&] { return cpu::Forward(problem, buffers, stages); });
}

#if JAX_MOE_HAS_CUDA
constexpr int kCudaRuntime = JAX_MOE_CUDA_RUNTIME;

void ForwardCuda(const Problem& problem, const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes,
                 int device, uintptr_t stream, int stages) {
  const Buffers buffers = FromPointers("forward", kBuffers, pointers, sizes);
  Run([&] { return cuda::Forward(problem, buffers, device, reinterpret_cast<void*>(stream), stages); });
}

std::string Explain(const Problem& problem, int num_sms) { return cuda::Explain(problem, num_sms); }

nb::dict CudaReport() {
  const cuda::DeviceReport found = cuda::ReportDevices();
  nb::list gpus;
  for (const auto& gpu : found.gpus) {
    nb::dict entry;
    entry["name"] = gpu.name;
    entry["major"] = gpu.major;
    entry["minor"] = gpu.minor;
    entry["num_sms"] = gpu.num_sms;
    entry["memory_bytes"] = gpu.memory_bytes;
    gpus.append(entry);
  }
  nb::dict report;
  report["built"] = true;
  report["error"] = found.error;
  report["driver_version"] = found.driver_version;
  report["runtime_version"] = found.runtime_version;
  report["gpus"] = gpus;
  return report;
}
#else
constexpr int kCudaRuntime = 0;
constexpr char kNoCuda[] =
    "this build has no CUDA kernels; reinstall it where a CUDA compiler works (JAX_MOE_CUDA=ON says why none does)";

void ForwardCuda(const Problem&, const std::vector<uintptr_t>&, const std::vector<int64_t>&, int, uintptr_t, int) {
  RaiseNotImplemented(kNoCuda);
}

std::string Explain(const Problem&, int) { RaiseNotImplemented(kNoCuda); }

nb::dict CudaReport() {
  nb::dict report;
  report["built"] = false;
  report["error"] = kNoCuda;
  report["driver_version"] = 0;
  report["runtime_version"] = 0;
  report["gpus"] = nb::list();
  return report;
}
#endif

// ---- routing from logits ----
constexpr int64_t RoutingProblem::* kRoutingFields[] = {
#define FIELD(name) &RoutingProblem::name,
    JAX_MOE_ROUTING_FIELDS(FIELD)
#undef FIELD
};
constexpr Buffer RoutingBuffers::* kRoutingBuffers[] = {
#define BUFFER(name) &RoutingBuffers::name,
    JAX_MOE_ROUTING_BUFFERS(BUFFER)
#undef BUFFER
};

RoutingProblem MakeRoutingProblem(const std::vector<int64_t>& fields, double routed_scaling_factor) {
  RoutingProblem problem = FromFields("RoutingProblem", kRoutingFields, fields);
  problem.routed_scaling_factor = routed_scaling_factor;
  return problem;
}

void RouteLogitsCpu(const RoutingProblem& problem, const std::vector<uintptr_t>& pointers,
                    const std::vector<int64_t>& sizes) {
  const RoutingBuffers buffers = FromPointers("route_logits", kRoutingBuffers, pointers, sizes);
  Run([&] { return cpu::RouteLogits(problem, buffers); });
}

#if JAX_MOE_HAS_CUDA
void RouteLogitsCuda(const RoutingProblem& problem, const std::vector<uintptr_t>& pointers,
                     const std::vector<int64_t>& sizes, int device, uintptr_t stream) {
  const RoutingBuffers buffers = FromPointers("route_logits", kRoutingBuffers, pointers, sizes);
  Run([&] { return cuda::RouteLogits(problem, buffers, device, reinterpret_cast<void*>(stream)); });
}
#else
void RouteLogitsCuda(const RoutingProblem&, const std::vector<uintptr_t>&, const std::vector<int64_t>&, int,
                     uintptr_t) {
  RaiseNotImplemented(kNoCuda);
}
#endif

// ---- finalising apart ----
constexpr int64_t FinalizeProblem::* kFinalizeFields[] = {
#define FIELD(name) &FinalizeProblem::name,
    JAX_MOE_FINALIZE_FIELDS(FIELD)
#undef FIELD
};
constexpr Buffer FinalizeBuffers::* kFinalizeBuffers[] = {
#define BUFFER(name) &FinalizeBuffers::name,
    JAX_MOE_FINALIZE_BUFFERS(BUFFER)
#undef BUFFER
};

void FinalizeCpu(const FinalizeProblem& problem, const std::vector<uintptr_t>& pointers,
                 const std::vector<int64_t>& sizes) {
  const FinalizeBuffers buffers = FromPointers("finalize", kFinalizeBuffers, pointers, sizes);
  Run([&] { return cpu::FinalizeRows(problem, buffers); });
}

#if JAX_MOE_HAS_CUDA
void FinalizeCuda(const FinalizeProblem& problem, const std::vector<uintptr_t>& pointers,
                  const std::vector<int64_t>& sizes, int device, uintptr_t stream) {
  const FinalizeBuffers buffers = FromPointers("finalize", kFinalizeBuffers, pointers, sizes);
  Run([&] { return cuda::FinalizeRows(problem, buffers, device, reinterpret_cast<void*>(stream)); });
}
#else
void FinalizeCuda(const FinalizeProblem&, const std::vector<uintptr_t>&, const std::vector<int64_t>&, int, uintptr_t) {
  RaiseNotImplemented(kNoCuda);
}
#endif

std::pair<int, int> FfiApi() {
  const FfiApiVersion version = CompiledFfiApiVersion();
  return {version.major, version.minor};
}

nb::dict RegistrationCapsules() {
  nb::dict cpu, cuda;
  for (const std::vector<Registration>& entries : {Registrations(), RouteRegistrations(), FinalizeRegistrations()})
    for (const Registration& entry : entries)
      (entry.platform == "cpu" ? cpu : cuda)[entry.target.c_str()] = nb::capsule(entry.handler);
  nb::dict result;
  result["cpu"] = cpu;
  result["CUDA"] = cuda;
  return result;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_MOE_VERSION;
  info["cuda"] = bool(JAX_MOE_HAS_CUDA);
  info["cuda_runtime"] = kCudaRuntime;
  info["compiler"] = JAX_MOE_COMPILER;
  info["ffi_api"] = FfiApi();
  return info;
}

}  // namespace
}  // namespace jax_moe

NB_MODULE(_native, m) {
  using namespace jax_moe;
  using namespace nb::literals;
  m.doc() = "Compiled FP8 mixture-of-experts kernels; see jax_moe.native.";
  nb::class_<Problem>(m, "Problem", "One call: integers in the order of jax_moe.problem.Problem's fields.")
      .def(
          "__init__",
          [](Problem* self, const std::vector<int64_t>& fields) {
            new (self) Problem(FromFields("Problem", kFields, fields));
          },
          "fields"_a);
  m.def("abi_text", &AbiText);
  m.def(
      "workspace_size",
      [](const Problem& problem) {
        const AffineBytes size = WorkspaceSize(problem);
        return std::pair(size.constant, size.per_token);
      },
      "problem"_a);
  m.def("forward_cpu", &ForwardCpu, "problem"_a, "pointers"_a, "sizes"_a, "stages"_a);
  m.def("forward_cuda", &ForwardCuda, "problem"_a, "pointers"_a, "sizes"_a, "device"_a, "stream"_a, "stages"_a);
  nb::class_<RoutingProblem>(m, "RoutingProblem", "A call that routes from logits: the fields of ffi/routing.h.")
      .def(
          "__init__",
          [](RoutingProblem* self, const std::vector<int64_t>& fields, double routed_scaling_factor) {
            new (self) RoutingProblem(MakeRoutingProblem(fields, routed_scaling_factor));
          },
          "fields"_a, "routed_scaling_factor"_a);
  m.def("routing_abi_text", &RoutingAbiText);
  m.def("route_logits_cpu", &RouteLogitsCpu, "problem"_a, "pointers"_a, "sizes"_a);
  m.def("route_logits_cuda", &RouteLogitsCuda, "problem"_a, "pointers"_a, "sizes"_a, "device"_a, "stream"_a);
  nb::class_<FinalizeProblem>(m, "FinalizeProblem", "A call that finalises apart: the fields of ffi/finalize.h.")
      .def(
          "__init__",
          [](FinalizeProblem* self, const std::vector<int64_t>& fields) {
            new (self) FinalizeProblem(FromFields("FinalizeProblem", kFinalizeFields, fields));
          },
          "fields"_a);
  m.def("finalize_abi_text", &FinalizeAbiText);
  m.def("finalize_cpu", &FinalizeCpu, "problem"_a, "pointers"_a, "sizes"_a);
  m.def("finalize_cuda", &FinalizeCuda, "problem"_a, "pointers"_a, "sizes"_a, "device"_a, "stream"_a);
  m.def("explain", &Explain, "problem"_a, "num_sms"_a);
  m.def("registrations", &RegistrationCapsules);
  m.def("ffi_api_version", &FfiApi);
  m.def("build_info", &BuildInfo);
  m.def("cuda_report", &CudaReport);
}
