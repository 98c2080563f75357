#include <string>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {
namespace {
// Rows below this many elements together stay on the calling thread: waking a worker costs about what
// normalising 16k elements does.
constexpr int64_t kGrain = 16384;
}  // namespace

void norm(const char* op, const TensorView& x, const TensorView& residual, const TensorView& weight,
          const TensorView& bias, const TensorView& out, const TensorView& sum, float eps, bool centred) {
  expect_storage(op, "x", x);
  expect_unit_stride(op, "x", x);
  const int64_t n = x.dim(-1);
  NormArgs a;
  for (const auto* t : {&x, &out, &residual, &sum}) {
    if (!*t) continue;
    expect_cpu(op, "every tensor", *t);
    TW_EXPECT(same_shape(*t, x) && t->dtype == x.dtype, op,
              "residual and outputs must have x's shape and dtype " + shape_of(x) + " " + name_of(x.dtype) +
                  ", got " + shape_of(*t) + " " + name_of(t->dtype));
    expect_unit_stride(op, "residual and outputs", *t);
  }
  for (const auto* t : {&weight, &bias}) {
    if (!*t) continue;
    expect_cpu(op, "every tensor", *t);
    TW_EXPECT(
        t->ndim == 1 && t->dim(0) == n && (t->strides[0] == 1 || n <= 1), op,
        "weight and bias must be contiguous with shape (" + std::to_string(n) + ",), got " + shape_of(*t));
    TW_EXPECT(t->dtype == x.dtype || t->dtype == DType::f32, op,
              std::string("weight and bias must be float32 or x's dtype, got ") + name_of(t->dtype));
    a.weight_dtype = storage_of(t->dtype);
  }
  TW_EXPECT(!weight || !bias || weight.dtype == bias.dtype, op, "weight and bias must have one dtype");
  a.x = rows_of(x);
  a.out = rows_of(out);
  if (residual) a.residual = rows_of(residual), a.sum = rows_of(sum);
  a.weight = weight.data;
  a.bias = bias.data;
  a.n = n;
  a.eps = eps;
  a.dtype = storage_of(x.dtype);
  a.centred = centred;
  const auto& kernel = table().norm;
  record(op, kernel.isa);
  if (x.numel() == 0) return;
  parallel_ranges(x.numel() / n, (kGrain + n - 1) / n,
                  [&](int64_t begin, int64_t end) { kernel.fn(a, begin, end); });
}

}  // namespace tilewright
