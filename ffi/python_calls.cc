// Finds and runs the plans of calls that repeat. Everything here runs under Python's lock but the launch itself.
#include "python_calls.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "backends.h"
#include "python_status.h"

namespace nb = nanobind;

namespace jax_moe {
namespace {

constexpr size_t kMostPlans = 4096;  // more are layouts that do not come back: all are forgotten then

const dlpack::ExchangeTable* FindTable(const nb::capsule& capsule) {
  const auto* header = static_cast<const dlpack::Header*>(capsule.data(dlpack::kCapsuleName));
  while (header != nullptr && header->version.major != dlpack::kMajor) header = header->previous;
  const auto* table = reinterpret_cast<const dlpack::ExchangeTable*>(header);
  const bool usable = table != nullptr && header->version.minor >= dlpack::kMinor &&
                      table->tensor_from_object != nullptr && table->current_work_stream != nullptr;
  return usable ? table : nullptr;
}

// An option's value where it is a plain number, else its address: members of enums are single objects.
bool DescribeOption(nb::handle option, std::vector<int64_t>* key) {
  int64_t value = reinterpret_cast<intptr_t>(option.ptr());
  if (Py_IS_TYPE(option.ptr(), &PyLong_Type)) {
    value = PyLong_AsLongLong(option.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  } else if (Py_IS_TYPE(option.ptr(), &PyFloat_Type)) {
    const double number = PyFloat_AsDouble(option.ptr());
    std::memcpy(&value, &number, sizeof value);
  }
  key->push_back(reinterpret_cast<intptr_t>(Py_TYPE(option.ptr())));
  key->push_back(value);
  return true;
}

// What an option that is None may read (jax_moe/options.py): the first bytes tell its right values apart.
int64_t DescribeEnvironment() {
  int64_t word = 0;
  if (const char* value = std::getenv("JAX_MOE_BATCH_INVARIANT"))
    std::memcpy(&word, value, std::min(std::strlen(value), sizeof word));
  return word;
}

}  // namespace

PlannedCalls::PlannedCalls(nb::capsule table, nb::tuple types, std::vector<nb::callable> watchers,
                           nb::callable is_grad_enabled, nb::object current_gpu)
    : table_(FindTable(table)),
      types_(std::move(types)),
      watchers_(std::move(watchers)),
      is_grad_enabled_(std::move(is_grad_enabled)),
      current_gpu_(std::move(current_gpu)),
      requires_grad_("requires_grad"),
      is_neg_("is_neg") {}

bool PlannedCalls::IsWatched() const {
  for (const nb::callable& watcher : watchers_) {
    const nb::object answer = watcher();
    if (!answer.is_none() && PyObject_IsTrue(answer.ptr()) != 0) return true;
  }
  return false;
}

size_t PlannedCalls::Hash::operator()(const Key& key) const {
  uint64_t hash = key.size();
  for (const int64_t word : key) {
    hash = (hash ^ uint64_t(word)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

bool PlannedCalls::IsOfGivenType(nb::handle object) const {
  for (size_t i = 0; i < types_.size(); ++i)
    if (object.type().is(types_[i])) return true;
  return false;
}

bool PlannedCalls::IsCurrent(dlpack::Device device) const {
  return device.type == dlpack::kCuda && !current_gpu_.is_none() && nb::cast<int>(current_gpu_()) == device.id;
}

bool PlannedCalls::Read(nb::handle object, dlpack::Tensor* tensor) const {
  if (table_->tensor_from_object(object.ptr(), tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

bool PlannedCalls::DescribeTensor(nb::handle object, bool grad, Call* call) const {
  dlpack::Tensor t;
  if (!IsOfGivenType(object) || !Read(object, &t)) return false;
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  if (elements > 0 && t.data == nullptr) return false;  // memory that is made when it is asked for in another way
  if (grad && nb::cast<bool>(object.attr(requires_grad_))) return false;
  // A negation that is still to be done; only float32 tensors can have one, as parts of conjugates.
  const bool is_float32 = t.type.code == dlpack::kFloat && t.type.bits == 32;
  if (is_float32 && nb::cast<bool>(object.attr(is_neg_)())) return false;
  call->device = t.device;
  call->pointers.push_back(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
  call->key.push_back(int64_t(t.ndim) << 32 | int64_t(t.type.code) << 24 | t.type.bits << 16 | t.type.lanes);
  call->key.push_back(int64_t(t.device.type) << 32 | t.device.id);
  call->key.insert(call->key.end(), t.shape, t.shape + t.ndim);
  call->key.insert(call->key.end(), t.strides, t.strides + t.ndim);
  return true;
}

bool PlannedCalls::Describe(nb::tuple tensors, nb::tuple options, bool grad, Call* call) const {
  call->key.reserve(160);
  call->pointers.reserve(20);
  for (const nb::handle object : tensors) {
    if (object.is_none()) {
      call->key.push_back(-1);
      call->pointers.push_back(0);
    } else if (!DescribeTensor(object, grad, call)) {
      return false;
    }
  }
  for (const nb::handle option : options)
    if (!DescribeOption(option, &call->key)) return false;
  call->key.push_back(DescribeEnvironment());
  return call->device.type == dlpack::kCpu || IsCurrent(call->device);
}

void PlannedCalls::Keep(nb::tuple tensors, nb::tuple options, nb::callable make_plan) {
  Call call;
  if (table_ == nullptr || IsWatched() || !Describe(tensors, options, false, &call)) return;
  auto kept = std::make_shared<const Kept>(Kept{nb::cast<Plan>(make_plan()), std::move(options)});
  if (kept_.size() >= kMostPlans) kept_.clear();
  kept_[std::move(call.key)] = std::move(kept);
}

nb::object PlannedCalls::Run(nb::tuple tensors, nb::tuple options) {
  Call call;
  if (table_ == nullptr || IsWatched() || !Describe(tensors, options, nb::cast<bool>(is_grad_enabled_()), &call))
    return nb::none();
  const auto found = kept_.find(call.key);
  if (found == kept_.end()) return nb::none();
  const std::shared_ptr<const Kept> kept = found->second;  // another thread may drop it meanwhile
  const Plan& plan = kept->plan;

  const size_t given = call.pointers.size();
  std::vector<nb::object> allocated;
  allocated.reserve(plan.allocate.size());
  for (const nb::callable& allocate : plan.allocate) {
    dlpack::Tensor t;
    allocated.push_back(allocate());
    if (!Read(allocated.back(), &t)) throw std::runtime_error("a tensor that was just allocated cannot be read");
    call.pointers.push_back(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
  }
  std::vector<uintptr_t> buffers;
  buffers.reserve(plan.arrays_of_buffers.size());
  for (const int array : plan.arrays_of_buffers) buffers.push_back(array < 0 ? 0 : call.pointers[array]);

  const bool on_gpu = call.device.type == dlpack::kCuda;
  void* stream = nullptr;
  if (on_gpu && table_->current_work_stream(call.device.type, call.device.id, &stream) != 0) throw nb::python_error();
  RunUnlocked([&] { return plan.launch(buffers, on_gpu ? call.device.id : kOnCpu, stream); });

  const auto array = [&](int i) { return size_t(i) < given ? nb::object(tensors[i]) : allocated[i - given]; };
  if (!plan.returns_list) return array(plan.returned.at(0));
  nb::list results;
  for (const int i : plan.returned) results.append(array(i));
  return results;
}

}  // namespace jax_moe
