// DLPack's C exchange table, version 1.3, as far as it is used here: how a library of tensors lets C code look at its
// Python objects without a copy, a reference or a synchronisation. The layouts are the standard's.
#pragma once
#include <cstdint>

namespace jax_moe::dlpack {

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
struct Device {
  int32_t type, id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2 };
struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};

// `shape` and `strides` (in elements) are the owner's and live as long as the Python object is left alone.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Header {
  Version version;
  Header* previous;  // an older table, or null
};

// Functions end with 0, or with -1 and a Python exception set. Null where the library has none.
struct ExchangeTable {
  Header header;
  void* allocate;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* tensor);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

constexpr char kCapsuleName[] = "dlpack_exchange_api";  // of the type's attribute __dlpack_c_exchange_api__
constexpr uint32_t kMajor = 1, kMinor = 3;  // the first version with this table, which later ones only lengthen

}  // namespace jax_moe::dlpack
