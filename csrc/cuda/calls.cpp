#include "cuda/calls.h"

#include <algorithm>
#include <cfloat>

#include "cuda/act_mul.h"
#include "cuda/call.h"
#include "cuda/norm.h"
#include "cuda/sample.h"

namespace tilewright::cuda {

int device_type = 2;

void norm(Where where, const char* op, const TensorView& x, const TensorView& residual,
          const TensorView& weight, const TensorView& bias, const TensorView& out, const TensorView& total,
          float eps, bool centred) {
  expect_norm(op, {x, residual, weight, bias, out, total}, expect_here);
  const int64_t n = x.dim(-1);
  tw::cuda::NormArgs a;
  if (weight) a.weight_type = type_of(weight.dtype);
  if (bias) a.weight_type = type_of(bias.dtype);
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
  // The kernels' header knows nothing of the CPU's; the two lists are the same.
  static_assert(int(Activation::gelu_tanh) == int(tw::cuda::Activation::gelu_tanh));
  tw::cuda::ActMulArgs a;
  a.activation = static_cast<tw::cuda::Activation>(activation_of("gelu_mul", activation));
  const char* op = a.activation == tw::cuda::Activation::silu ? "silu_mul" : "gelu_mul";
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

void sample(Where where, const TensorView& logits, const TensorView& uniform, const TensorView& out,
            double temperature, int64_t top_k, double top_p, double min_p) {
  constexpr const char* kOp = "sample";
  for (const auto* t : {&logits, &out}) expect_here(kOp, "every tensor", *t);
  expect_storage(kOp, "logits", logits);
  TW_EXPECT(logits.ndim == 2 && logits.dim(1) > 0 && logits.dim(1) <= 1 << 24, kOp,
            "logits must be (batch, vocab) with 1 to 2**24 tokens, got " + shape_of(logits));
  expect_unit_stride(kOp, "logits", logits);
  const int64_t batch = logits.dim(0);
  TW_EXPECT(out.ndim == 1 && out.dim(0) == batch && out.dtype == DType::i64, kOp,
            "out must be int64 of shape (" + std::to_string(batch) + ",), got " + shape_of(out));
  tw::cuda::SampleArgs a;
  if (temperature != 0) {
    expect_here(kOp, "uniform", uniform);
    TW_EXPECT(uniform.ndim == 1 && uniform.dim(0) == batch && uniform.dtype == DType::f64, kOp,
              "uniform must be float64 of shape (" + std::to_string(batch) + ",)");
    a.uniform = uniform.as<const double>(), a.uniform_stride = uniform.stride(0);
  }
  a.logits = logits.data, a.row_stride = logits.stride(0);
  a.out = out.as<int64_t>(), a.out_stride = out.stride(0);
  a.batch = static_cast<int>(row_count(kOp, logits)), a.n = static_cast<int>(logits.dim(1));
  a.type = type_of(logits.dtype);
  a.temperature = static_cast<float>(std::clamp<double>(temperature, FLT_MIN, FLT_MAX));
  a.top_k = top_k, a.top_p = top_p, a.min_p = min_p;
  launch(kOp, where, tw::cuda::sample, a);
}

}  // namespace tilewright::cuda
