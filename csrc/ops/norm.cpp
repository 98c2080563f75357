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
  expect_norm(op, {x, residual, weight, bias, out, sum}, expect_cpu);
  const int64_t n = x.dim(-1);
  NormArgs a;
  if (weight) a.weight_dtype = storage_of(weight.dtype);
  if (bias) a.weight_dtype = storage_of(bias.dtype);
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
