// Between the contract and XLA: Status to errors, arrays to Buffers. For the files that see XLA.
#pragma once
#include <string>

#include "moe.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

// `function` begins the message: "name: ".
inline xla::ffi::Error ToError(const std::string& function, const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return xla::ffi::Error::InvalidArgument(function + status.message);
    case StatusCode::kUnsupported:
      return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, function + status.message);
    case StatusCode::kInternal:
      break;
  }
  return xla::ffi::Error::Internal(function + status.message);
}

// What a build without CUDA says to callers on a GPU; without a handler XLA would say only that it does not know the
// target.
inline xla::ffi::Error NoCudaError(const std::string& function) {
  return ToError(function, Status::Unsupported("this build has no CUDA kernels; reinstall where nvcc works with "
                                               "JAX_MOE_CUDA=ON, or run on a CPU device"));
}

// Where an array is; null when it has no elements.
inline Buffer Place(const xla::ffi::AnyBuffer& array) {
  if (array.element_count() == 0) return {};
  return {array.untyped_data(), static_cast<int64_t>(array.size_bytes())};
}

// kNone for types that are no choice of the contract's, which the check of a problem refuses.
inline int64_t FloatType(xla::ffi::DataType dtype) {
  return int64_t(dtype == xla::ffi::DataType::BF16  ? DataType::kBFloat16
                 : dtype == xla::ffi::DataType::F32 ? DataType::kFloat32
                                                    : DataType::kNone);
}

}  // namespace jax_moe
