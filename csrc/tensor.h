// TensorView: what a kernel may know of a tensor. No torch, no Python.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tilewright {

enum class DType : uint8_t { f32, bf16, f16, f64, i64, i32, i8, u8, boolean, unsupported };

constexpr int kMaxDims = 6;

// Strides count elements, as torch's do; shape and strides are valid up to ndim.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::unsupported;
  int ndim = 0;
  int device_type = 0;  // DLPack's numbers: 1 = CPU, 2 = CUDA
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};

  explicit operator bool() const { return ndim > 0 || data != nullptr; }
  // Sizes and strides from the end: dim(-1) is the last dimension.
  int64_t dim(int i) const { return shape[i < 0 ? ndim + i : i]; }
  int64_t stride(int i) const { return strides[i < 0 ? ndim + i : i]; }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline int64_t size_of(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    default:
      return 1;
  }
}

inline const char* name_of(DType t) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "float64", "int64",
                                      "int32",   "int8",     "uint8",   "bool",    "unsupported dtype"};
  return names[static_cast<int>(t)];
}

// Raised where the request is sound but not supported; Python sees NotImplementedError.
struct NotSupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string shape_of(const TensorView& t) {
  std::string s = "(";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + (t.ndim == 1 ? ",)" : ")");
}

[[noreturn]] inline void fail(const char* op, const std::string& message) {
  throw std::invalid_argument(std::string(op) + ": " + message);
}

}  // namespace tilewright

// The one way a validation fails: "op: expected ..., got ...". A macro, so that the message is built only
// then.
#define TW_EXPECT(ok, op, ...)             \
  do {                                     \
    if (!(ok)) [[unlikely]]                \
      ::tilewright::fail(op, __VA_ARGS__); \
  } while (0)
