#include "torch_tensor.h"

#include <cstring>
#include <string>

namespace py = pybind11;

namespace tilewright {
namespace {

DType dtype_of(dlpack::DataType t) {
  enum { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
  if (t.lanes != 1) return DType::unsupported;
  switch (t.code * 256 + t.bits) {
    case kFloat * 256 + 32:
      return DType::f32;
    case kFloat * 256 + 16:
      return DType::f16;
    case kFloat * 256 + 64:
      return DType::f64;
    case kBfloat * 256 + 16:
      return DType::bf16;
    case kInt * 256 + 64:
      return DType::i64;
    case kInt * 256 + 32:
      return DType::i32;
    case kInt * 256 + 8:
      return DType::i8;
    case kUInt * 256 + 8:
      return DType::u8;
    case kBool * 256 + 8:
      return DType::boolean;
    default:
      return DType::unsupported;
  }
}

DType dtype_of(const std::string& torch_name) {
  static const std::pair<const char*, DType> names[] = {
      {"torch.float32", DType::f32}, {"torch.bfloat16", DType::bf16}, {"torch.float16", DType::f16},
      {"torch.float64", DType::f64}, {"torch.int64", DType::i64},     {"torch.int32", DType::i32},
      {"torch.int8", DType::i8},     {"torch.uint8", DType::u8},      {"torch.bool", DType::boolean}};
  for (const auto& [name, dtype] : names)
    if (torch_name == name) return dtype;
  return DType::unsupported;
}

void check(const TensorView& v) {
  if (v.data == nullptr && v.numel() > 0)
    throw std::invalid_argument(
        "tilewright: a tensor of shape " + shape_of(v) +
        " has no memory behind it (meta or fake tensor); call the op through torch.ops to trace it");
}

TensorView from_attributes(py::handle tensor) {
  TensorView v;
  const auto shape = py::cast<py::tuple>(tensor.attr("shape"));
  const auto strides = py::cast<py::tuple>(tensor.attr("stride")());
  if (shape.size() > kMaxDims)
    throw std::invalid_argument("tilewright: tensors of more than 6 dimensions are not supported");
  v.ndim = static_cast<int>(shape.size());
  for (int i = 0; i < v.ndim; ++i) {
    v.shape[i] = shape[i].cast<int64_t>();
    v.strides[i] = strides[i].cast<int64_t>();
  }
  const auto device = py::cast<std::string>(tensor.attr("device").attr("type"));
  v.device_type = device == "cpu" ? 1 : device == "cuda" ? 2 : 0;
  v.dtype = dtype_of(py::cast<std::string>(py::str(tensor.attr("dtype"))));
  v.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return v;
}

}  // namespace

TorchHandles& torch_handles() {
  static TorchHandles handles;
  return handles;
}

void fill_torch_handles(bool use_dlpack) {
  auto& h = torch_handles();
  auto torch = py::module_::import("torch");
  auto own = [](py::object o) { return o.release().ptr(); };  // kept for the life of the process
  h.tensor = reinterpret_cast<PyTypeObject*>(own(torch.attr("Tensor")));
  h.parameter = reinterpret_cast<PyTypeObject*>(own(torch.attr("nn").attr("Parameter")));
  auto c = torch.attr("_C");
  h.get_num_threads = own(c.attr("get_num_threads"));
  h.is_grad_enabled = own(torch.attr("is_grad_enabled"));
  h.is_neg = own(torch.attr("Tensor").attr("is_neg"));
  h.dispatch_depth = own(c.attr("_len_torch_dispatch_stack"));
  h.function_depth = own(c.attr("_len_torch_function_stack"));
  h.peek_functorch = own(c.attr("_functorch").attr("peek_interpreter_stack"));
  h.forward_ad = own(py::module_::import("torch.autograd.forward_ad"));
  h.api = nullptr;
  py::object capsule = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
  if (use_dlpack && PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    auto* header = static_cast<const dlpack::ExchangeApiHeader*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (header && header->version.major != 1) header = header->previous;
    const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    if (api && api->tensor_from_object) h.api = api;
  }
}

TensorView view_of(PyObject* tensor) {
  const auto* api = torch_handles().api;
  TensorView v;
  if (api) {
    dlpack::Tensor t;
    if (api->tensor_from_object(tensor, &t) != 0) throw py::error_already_set();
    if (t.ndim > kMaxDims)
      throw std::invalid_argument("tilewright: tensors of more than 6 dimensions are not supported");
    v.ndim = t.ndim;
    std::memcpy(v.shape, t.shape, sizeof(int64_t) * static_cast<size_t>(t.ndim));
    if (t.strides) {
      std::memcpy(v.strides, t.strides, sizeof(int64_t) * static_cast<size_t>(t.ndim));
    } else {
      int64_t stride = 1;
      for (int i = t.ndim - 1; i >= 0; --i) v.strides[i] = stride, stride *= t.shape[i];
    }
    v.dtype = dtype_of(t.dtype);
    v.device_type = t.device.type;
    v.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  } else {
    v = from_attributes(tensor);
  }
  check(v);
  return v;
}

}  // namespace tilewright
