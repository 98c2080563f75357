// pybind11 type caster: torch.Tensor -> TensorView without linking libtorch. Tensors are read through
// DLPack's C exchange API (https://dmlc.github.io/dlpack, struct DLPackExchangeAPI, ABI version 1), which
// torch publishes as a capsule on the tensor type; a torch without it is asked attribute by attribute.
// The view borrows: it is valid while the caller holds the tensor.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace tilewright {

// The part of DLPack's ABI that is used, from its specification.
namespace dlpack {
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};
struct ExchangeApi {
  ExchangeApiHeader header;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_work_stream;
};
}  // namespace dlpack

// What the bindings keep of torch; filled once, when the module is imported.
struct TorchHandles {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  const dlpack::ExchangeApi* api = nullptr;  // nullptr: attribute path
  PyObject* get_num_threads = nullptr;
  PyObject* is_grad_enabled = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* dispatch_depth = nullptr;
  PyObject* function_depth = nullptr;
  PyObject* peek_functorch = nullptr;
  PyObject* forward_ad = nullptr;
};
TorchHandles& torch_handles();
// Looks torch's names up. Without use_dlpack tensors are read attribute by attribute.
void fill_torch_handles(bool use_dlpack);

TensorView view_of(PyObject* tensor);

}  // namespace tilewright

namespace pybind11::detail {
template <>
struct type_caster<tilewright::TensorView> {
  PYBIND11_TYPE_CASTER(tilewright::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (source.is_none()) {
      value = {};
      return true;
    }
    if (!PyObject_TypeCheck(source.ptr(), tilewright::torch_handles().tensor)) return false;
    value = tilewright::view_of(source.ptr());
    return true;
  }
};
}  // namespace pybind11::detail
