#include "cuda/calls.h"

#include <stdexcept>

#include "cuda/act_mul.h"
#include "cuda/norm.h"
#include "ops/check.h"

namespace tilewright::cuda {

int device_type = 2;

namespace {

void expect_here(const char* op, const char* name, const TensorView& t) {
  TW_EXPECT(t.device_type == device_type, op, std::string(name) + " must be a CUDA tensor");
}

tw::cuda::Type type_of(DType t) {
  return t == DType::f32    ? tw::cuda::Type::f32
         : t == DType::bf16 ? tw::cuda::Type::bf16
                            : tw::cuda::Type::f16;
}

tw::cuda::Rows rows_on_gpu(const TensorView& t) {
  const Rows rows = rows_of(t);
  tw::cuda::Rows r;
  r.base = rows.base;
  r.dims = rows.dims;
  for (int d = 0; d < rows.dims; ++d)
    r.shape[d] = static_cast<uint32_t>(rows.shape[d]), r.strides[d] = rows.strides[d];
  return r;
}

uint32_t row_count(const char* op, const TensorView& t) {
  const int64_t rows = t.ndim && t.dim(-1) ? t.numel() / t.dim(-1) : t.numel();
  if (rows >= int64_t{1} << 31)
    throw NotSupported(std::string(op) + ": up to 2**31 - 1 rows are supported on a GPU, got " +
                       std::to_string(rows));
  return static_cast<uint32_t>(rows);
}

// Makes the tensors' device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device)), changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  static void check(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Args>
void launch(const char* op, Where where, cudaError_t (*kernel)(const Args&, cudaStream_t), const Args& args) {
  const DeviceGuard guard(where.device);
  const cudaError_t e = kernel(args, where.stream);
  if (e != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(e));
}

}  // namespace

void norm(Where where, const char* op, const TensorView& x, const TensorView& residual,
          const TensorView& weight, const TensorView& bias, const TensorView& out, const TensorView& total,
          float eps, bool centred) {
  expect_storage(op, "x", x);
  expect_unit_stride(op, "x", x);
  const int64_t n = x.dim(-1);
  tw::cuda::NormArgs a;
  for (const auto* t : {&x, &out, &residual, &total}) {
    if (!*t) continue;
    expect_here(op, "every tensor", *t);
    TW_EXPECT(same_shape(*t, x) && t->dtype == x.dtype, op,
              "residual and outputs must have x's shape and dtype " + shape_of(x) + " " + name_of(x.dtype) +
                  ", got " + shape_of(*t) + " " + name_of(t->dtype));
    expect_unit_stride(op, "residual and outputs", *t);
  }
  for (const auto* t : {&weight, &bias}) {
    if (!*t) continue;
    expect_here(op, "every tensor", *t);
    TW_EXPECT(
        t->ndim == 1 && t->dim(0) == n && (t->strides[0] == 1 || n <= 1), op,
        "weight and bias must be contiguous with shape (" + std::to_string(n) + ",), got " + shape_of(*t));
    TW_EXPECT(t->dtype == x.dtype || t->dtype == DType::f32, op,
              std::string("weight and bias must be float32 or x's dtype, got ") + name_of(t->dtype));
    a.weight_type = type_of(t->dtype);
  }
  TW_EXPECT(!weight || !bias || weight.dtype == bias.dtype, op, "weight and bias must have one dtype");
  a.x = rows_on_gpu(x), a.out = rows_on_gpu(out);
  if (residual) a.residual = rows_on_gpu(residual), a.total = rows_on_gpu(total);
  a.weight = weight.data, a.bias = bias.data;
  a.rows = row_count(op, x), a.n = n;
  a.eps = eps;
  a.type = type_of(x.dtype);
  a.centred = centred;
  if (x.numel() > 0) launch(op, where, tw::cuda::norm, a);
}

void act_mul(Where where, const TensorView& gate, const TensorView& up, const TensorView& out,
             const std::string& activation) {
  using tw::cuda::Activation;
  tw::cuda::ActMulArgs a;
  a.activation = activation == "silu"   ? Activation::silu
                 : activation == "gelu" ? Activation::gelu
                                        : Activation::gelu_tanh;
  const char* op = a.activation == Activation::silu ? "silu_mul" : "gelu_mul";
  TW_EXPECT(a.activation != Activation::gelu_tanh || activation == "gelu_tanh", op,
            "activation must be silu, gelu or gelu_tanh, got \"" + activation + "\"");
  expect_storage(op, "gate", gate);
  for (const auto* t : {&gate, &up, &out}) {
    expect_here(op, "every tensor", *t);
    TW_EXPECT(same_shape(*t, gate) && t->dtype == gate.dtype, op,
              "gate and up must have one shape and dtype, got " + shape_of(gate) + " " + name_of(gate.dtype) +
                  " and " + shape_of(*t) + " " + name_of(t->dtype));
    if (t->ndim > 0) expect_unit_stride(op, "every tensor", *t);
  }
  if (gate.numel() == 0) return;
  a.gate = rows_on_gpu(gate), a.up = rows_on_gpu(up), a.out = rows_on_gpu(out);
  a.rows = row_count(op, gate), a.n = gate.ndim ? gate.dim(-1) : 1;
  if (gate.is_contiguous() && up.is_contiguous() && out.is_contiguous()) {  // one row
    a.gate.dims = a.up.dims = a.out.dims = 0;
    a.rows = 1, a.n = gate.numel();
  }
  a.type = type_of(gate.dtype);
  launch(op, where, tw::cuda::act_mul, a);
}

}  // namespace tilewright::cuda
