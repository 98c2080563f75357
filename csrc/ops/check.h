// Validation that several ops share.
#pragma once
#include <string>

#include "cpu/kernels.h"
#include "tensor.h"

namespace tilewright {

inline bool is_float_storage(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }
inline Storage storage_of(DType t) {
  return t == DType::f32 ? Storage::f32 : t == DType::bf16 ? Storage::bf16 : Storage::f16;
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

inline void expect_cpu(const char* op, const char* name, const TensorView& t) {
  TW_EXPECT(t.device_type == 1, op, std::string(name) + " must be a CPU tensor");
}

inline void expect_storage(const char* op, const char* name, const TensorView& t) {
  TW_EXPECT(is_float_storage(t.dtype), op,
            std::string(name) + " must be float32, bfloat16 or float16, got " + name_of(t.dtype));
}

inline void expect_unit_stride(const char* op, const char* name, const TensorView& t) {
  TW_EXPECT(t.ndim >= 1 && (t.stride(-1) == 1 || t.dim(-1) <= 1 || t.numel() == 0), op,
            std::string(name) + " must be contiguous in its last dimension, got stride " +
                std::to_string(t.ndim ? t.stride(-1) : 0));
}

inline Activation activation_of(const char* op, const std::string& name) {
  TW_EXPECT(name == "silu" || name == "gelu" || name == "gelu_tanh", op,
            "activation must be silu, gelu or gelu_tanh, got \"" + name + "\"");
  return name == "silu" ? Activation::silu : name == "gelu" ? Activation::gelu : Activation::gelu_tanh;
}

// The tensors of a norm; residual, weight, bias and sum may be absent. here: refuses tensors of another
// device.
struct NormTensors {
  const TensorView &x, &residual, &weight, &bias, &out, &sum;
};
template <class Here>
void expect_norm(const char* op, const NormTensors& norm, Here&& here) {
  const TensorView& x = norm.x;
  expect_storage(op, "x", x);
  expect_unit_stride(op, "x", x);
  for (const auto* t : {&x, &norm.out, &norm.residual, &norm.sum}) {
    if (!*t) continue;
    here(op, "every tensor", *t);
    TW_EXPECT(same_shape(*t, x) && t->dtype == x.dtype, op,
              "residual and outputs must have x's shape and dtype " + shape_of(x) + " " + name_of(x.dtype) +
                  ", got " + shape_of(*t) + " " + name_of(t->dtype));
    expect_unit_stride(op, "residual and outputs", *t);
  }
  const int64_t n = x.dim(-1);
  for (const auto* t : {&norm.weight, &norm.bias}) {
    if (!*t) continue;
    here(op, "every tensor", *t);
    TW_EXPECT(
        t->ndim == 1 && t->dim(0) == n && (t->strides[0] == 1 || n <= 1), op,
        "weight and bias must be contiguous with shape (" + std::to_string(n) + ",), got " + shape_of(*t));
    TW_EXPECT(t->dtype == x.dtype || t->dtype == DType::f32, op,
              std::string("weight and bias must be float32 or x's dtype, got ") + name_of(t->dtype));
  }
  TW_EXPECT(!norm.weight || !norm.bias || norm.weight.dtype == norm.bias.dtype, op,
            "weight and bias must have one dtype");
}

inline Rows rows_of(const TensorView& t) {
  Rows r;
  r.base = t.data;
  // Merge leading dimensions that lie one after the other: most tensors become one.
  for (int i = 0; i + 1 < t.ndim; ++i) {
    if (t.shape[i] == 1) continue;
    if (r.dims > 0 && r.strides[r.dims - 1] == t.shape[i] * t.strides[i]) {
      r.shape[r.dims - 1] *= t.shape[i];
      r.strides[r.dims - 1] = t.strides[i];
    } else {
      r.shape[r.dims] = t.shape[i];
      r.strides[r.dims] = t.strides[i];
      ++r.dims;
    }
  }
  return r;
}

}  // namespace tilewright
