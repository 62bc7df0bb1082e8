// From the contract's Status to Python's exceptions. For the files that see Python.
#pragma once
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "moe.h"

namespace jax_moe {

[[noreturn]] inline void RaiseNotImplemented(const std::string& text) {
  PyErr_SetString(PyExc_NotImplementedError, text.c_str());
  throw nanobind::python_error();
}

inline void RaiseUnlessOk(const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidArgument:
      throw nanobind::value_error(status.message.c_str());
    case StatusCode::kUnsupported:
      RaiseNotImplemented(status.message);
    case StatusCode::kInternal:
      throw std::runtime_error(status.message);
  }
}

// Runs `work()` without Python's lock and raises what its Status says.
template <class Work>
void RunUnlocked(const Work& work) {
  Status status;
  {
    nanobind::gil_scoped_release released;
    status = work();
  }
  RaiseUnlessOk(status);
}

}  // namespace jax_moe
