// The Python module jax_moe._native. A raw layer: pointers and sizes as integers, in the order of moe.h, routing.h and
// finalize.h. jax_moe/native.py is its one caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>

#include "backends.h"
#include "python_calls.h"
#include "python_status.h"
#include "xla_handlers.h"

#if JAX_MOE_HAS_CUDA
#include "cuda/device.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace jax_moe {
namespace {

using Integers = std::vector<int64_t>;
using Pointers = std::vector<uintptr_t>;

#define FIELD(name) &Struct::name,
#define BUFFER(name) &Struct::name,
template <class Struct>
struct MembersOf;  // the struct's fields or buffers, in order
template <>
struct MembersOf<Problem> {
  using Struct = Problem;
  static constexpr int64_t Struct::* kList[] = {JAX_MOE_PROBLEM_FIELDS(FIELD)};
};
template <>
struct MembersOf<Buffers> {
  using Struct = Buffers;
  static constexpr Buffer Struct::* kList[] = {JAX_MOE_INPUTS(BUFFER) JAX_MOE_OUTPUTS(BUFFER)};
};
template <>
struct MembersOf<RoutingProblem> {
  using Struct = RoutingProblem;
  static constexpr int64_t Struct::* kList[] = {JAX_MOE_ROUTING_FIELDS(FIELD)};
};
template <>
struct MembersOf<RoutingBuffers> {
  using Struct = RoutingBuffers;
  static constexpr Buffer Struct::* kList[] = {JAX_MOE_ROUTING_BUFFERS(BUFFER)};
};
template <>
struct MembersOf<FinalizeProblem> {
  using Struct = FinalizeProblem;
  static constexpr int64_t Struct::* kList[] = {JAX_MOE_FINALIZE_FIELDS(FIELD)};
};
template <>
struct MembersOf<FinalizeBuffers> {
  using Struct = FinalizeBuffers;
  static constexpr Buffer Struct::* kList[] = {JAX_MOE_FINALIZE_BUFFERS(BUFFER)};
};
#undef FIELD
#undef BUFFER

template <class Struct>
Struct FromFields(const Integers& fields) {
  constexpr auto& members = MembersOf<Struct>::kList;
  if (fields.size() != std::size(members))
    throw nb::value_error(
        ("fields must be " + std::to_string(std::size(members)) + " integers, got " + std::to_string(fields.size()))
            .c_str());
  Struct result;
  for (size_t i = 0; i < std::size(members); ++i) result.*members[i] = fields[i];
  return result;
}

template <class Struct>
Struct FromPointers(const Pointers& pointers, const Integers& sizes) {
  constexpr auto& members = MembersOf<Struct>::kList;
  if (pointers.size() != std::size(members) || sizes.size() != std::size(members))
    throw nb::value_error(("pointers and sizes must have " + std::to_string(std::size(members)) + " entries, got " +
                           std::to_string(pointers.size()) + " and " + std::to_string(sizes.size()))
                              .c_str());
  Struct buffers;
  for (size_t i = 0; i < std::size(members); ++i)
    buffers.*members[i] = {reinterpret_cast<void*>(pointers[i]), sizes[i]};
  return buffers;
}

// A problem's class, and two functions of its op: a plan of it, and `name`, which runs it at once.
template <class ProblemT, class BuffersT>
void BindOp(nb::module_& m, nb::class_<ProblemT> problem_class, const char* name, const char* plan_name,
            Status (*run)(const ProblemT&, const BuffersT&, int device, void* stream)) {
  problem_class.def(
      "__init__", [](ProblemT* self, const Integers& fields) { new (self) ProblemT(FromFields<ProblemT>(fields)); },
      "fields"_a);
  m.def(
      name,
      [run](const ProblemT& problem, const Pointers& pointers, const Integers& sizes, int device, uintptr_t stream) {
        const auto buffers = FromPointers<BuffersT>(pointers, sizes);
        RunUnlocked([&] { return run(problem, buffers, device, reinterpret_cast<void*>(stream)); });
      },
      "problem"_a, "pointers"_a, "sizes"_a, "device"_a, "stream"_a);
  m.def(
      plan_name,
      [run](const ProblemT& problem, const Integers& sizes, std::vector<int> arrays_of_buffers,
            std::vector<nb::callable> allocate, std::vector<int> returned, bool returns_list) {
        const auto launch = [=](const Pointers& pointers, int device, void* stream) {
          return run(problem, FromPointers<BuffersT>(pointers, sizes), device, stream);
        };
        return Plan{launch, std::move(arrays_of_buffers), std::move(allocate), std::move(returned), returns_list};
      },
      "problem"_a, "sizes"_a, "arrays_of_buffers"_a, "allocate"_a, "returned"_a, "returns_list"_a);
}

nb::dict CudaReport() {
  nb::list gpus;
  nb::dict report;
  report["built"] = bool(JAX_MOE_HAS_CUDA);
  report["error"] = CheckCudaBuild().message;
  report["driver_version"] = 0;
  report["runtime_version"] = 0;
#if JAX_MOE_HAS_CUDA
  const cuda::DeviceReport found = cuda::ReportDevices();
  for (const auto& gpu : found.gpus) {
    nb::dict entry;
    entry["name"] = gpu.name;
    entry["major"] = gpu.major;
    entry["minor"] = gpu.minor;
    entry["num_sms"] = gpu.num_sms;
    entry["memory_bytes"] = gpu.memory_bytes;
    gpus.append(entry);
  }
  report["error"] = found.error;
  report["driver_version"] = found.driver_version;
  report["runtime_version"] = found.runtime_version;
#endif
  report["gpus"] = gpus;
  return report;
}

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
  info["cuda_runtime"] = JAX_MOE_CUDA_RUNTIME;
  info["compiler"] = JAX_MOE_COMPILER;
  info["ffi_api"] = FfiApi();
  return info;
}

}  // namespace
}  // namespace jax_moe

NB_MODULE(_native, m) {
  using namespace jax_moe;
  nb::set_leak_warnings(false);  // torch's registry of ops keeps plans to the end of the process
  m.doc() = "Compiled FP8 mixture-of-experts kernels; see jax_moe.native.";
  nb::class_<Plan>(m, "Plan", "What a call of certain layouts and options does: ffi/python_calls.h.");
  nb::class_<PlannedCalls>(m, "PlannedCalls", "Finds the plan of a call from its Python objects and runs it.")
      .def(nb::init<nb::capsule, nb::tuple, std::vector<nb::callable>, nb::callable, nb::object>(), "table"_a,
           "types"_a, "watchers"_a, "is_grad_enabled"_a, "current_gpu"_a.none())
      .def("run", &PlannedCalls::Run, "tensors"_a, "options"_a)
      .def("keep", &PlannedCalls::Keep, "tensors"_a, "options"_a, "plan"_a);

  BindOp<Problem, Buffers>(
      m, nb::class_<Problem>(m, "Problem", "A call: the fields of ffi/moe.h."), "forward", "plan_forward",
      [](const Problem& p, const Buffers& b, int device, void* stream) { return Forward(p, b, device, stream); });
  m.def(
      "forward_stages",
      [](const Problem& problem, const Pointers& pointers, const Integers& sizes, int device, uintptr_t stream,
         int stages) {
        const auto buffers = FromPointers<Buffers>(pointers, sizes);
        RunUnlocked([&] { return Forward(problem, buffers, device, reinterpret_cast<void*>(stream), stages); });
      },
      "problem"_a, "pointers"_a, "sizes"_a, "device"_a, "stream"_a, "stages"_a);
  m.def("abi_text", &AbiText);
  m.def(
      "workspace_size",
      [](const Problem& problem) {
        const AffineBytes size = WorkspaceSize(problem);
        return std::pair(size.constant, size.per_token);
      },
      "problem"_a);
  m.def(
      "explain",
      [](const Problem& problem, int num_sms) {
        std::string text;
        RaiseUnlessOk(Explain(problem, num_sms, &text));
        return text;
      },
      "problem"_a, "num_sms"_a);
  m.def(
      "launched_stages",
      [](const Problem& problem, int num_sms) {
        int stages = 0;
        RaiseUnlessOk(LaunchedStages(problem, num_sms, &stages));
        return stages;
      },
      "problem"_a, "num_sms"_a);

  BindOp<RoutingProblem, RoutingBuffers>(
      m,
      nb::class_<RoutingProblem>(m, "RoutingProblem", "A call that routes from logits: the fields of ffi/routing.h.")
          .def_rw("routed_scaling_factor", &RoutingProblem::routed_scaling_factor),
      "route_logits", "plan_route_logits", &RouteLogits);
  m.def("routing_abi_text", &RoutingAbiText);

  BindOp<FinalizeProblem, FinalizeBuffers>(
      m,
      nb::class_<FinalizeProblem>(m, "FinalizeProblem", "A call that finalises apart: the fields of ffi/finalize.h."),
      "finalize", "plan_finalize", &FinalizeRows);
  m.def("finalize_abi_text", &FinalizeAbiText);

  m.def("registrations", &RegistrationCapsules);
  m.def("ffi_api_version", &FfiApi);
  m.def("build_info", &BuildInfo);
  m.def("cuda_report", &CudaReport);
}
