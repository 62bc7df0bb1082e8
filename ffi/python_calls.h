// Calls that repeat. A Plan is what a call of certain layouts and options does; PlannedCalls finds the plan of a call
// from its Python objects and runs it, so that nothing is checked or converted in Python a second time.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "dlpack_exchange.h"
#include "moe.h"

namespace jax_moe {

// "Arrays" are the tensors that a call is given, then those that it allocates.
struct Plan {
  // Runs on the buffers of the contract, in its order. `device` and `stream` are those of backends.h.
  using Launch = std::function<Status(const std::vector<uintptr_t>& pointers, int device, void* stream)>;
  Launch launch;
  std::vector<int> arrays_of_buffers;        // the array that each buffer is, -1 where it is absent
  std::vector<nanobind::callable> allocate;  // of no arguments
  std::vector<int> returned;                 // arrays
  bool returns_list;                         // or the one array itself
};

class PlannedCalls {
 public:
  // `table` is the capsule of DLPack's exchange table, `types` the types that it reads. The rest are functions of no
  // arguments. Calls are left alone while one of `watchers` returns something else than None, False or 0.
  // `current_gpu` gives the number of the current device, and is None in a library of tensors that has no GPUs.
  PlannedCalls(nanobind::capsule table, nanobind::tuple types, std::vector<nanobind::callable> watchers,
               nanobind::callable is_grad_enabled, nanobind::object current_gpu);

  // The result of a call like one whose plan was kept; None where none was, or where the call is not a plain one:
  // nobody watches, and tensors are None or of exactly the given types, dense memory on one device, the current one if
  // it is a GPU, and want no gradient.
  nanobind::object Run(nanobind::tuple tensors, nanobind::tuple options);
  // Keeps what `make_plan()` gives for calls like this one, which was checked. Only plain calls are kept.
  void Keep(nanobind::tuple tensors, nanobind::tuple options, nanobind::callable make_plan);

 private:
  using Key = std::vector<int64_t>;
  struct Hash {
    size_t operator()(const Key& key) const;
  };
  struct Kept {
    Plan plan;
    nanobind::tuple options;  // alive, so that their addresses stay theirs
  };
  struct Call {
    Key key;  // layouts, options and the environment: two calls of one key differ in addresses only
    std::vector<uintptr_t> pointers;
    dlpack::Device device{dlpack::kCpu, 0};
  };

  bool Describe(nanobind::tuple tensors, nanobind::tuple options, bool grad, Call* call) const;
  bool DescribeTensor(nanobind::handle object, bool grad, Call* call) const;
  bool IsWatched() const;
  bool IsOfGivenType(nanobind::handle object) const;
  bool IsCurrent(dlpack::Device device) const;
  bool Read(nanobind::handle object, dlpack::Tensor* tensor) const;

  const dlpack::ExchangeTable* table_;  // null: every call is left alone
  nanobind::tuple types_;
  std::vector<nanobind::callable> watchers_;
  nanobind::callable is_grad_enabled_;
  nanobind::object current_gpu_;
  nanobind::str requires_grad_, is_neg_;
  std::unordered_map<Key, std::shared_ptr<const Kept>, Hash> kept_;
};

}  // namespace jax_moe
