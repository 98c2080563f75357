#include <string>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {
namespace {

constexpr int64_t kGrain = 8192;  // values: an activation costs about twice what a norm does

bool is_contiguous(const TensorView& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  return true;
}

}  // namespace

void act_mul(const TensorView& gate, const TensorView& up, const TensorView& out,
             const std::string& activation) {
  ActMulArgs a;
  a.activation = activation_of("gelu_mul", activation);
  const char* op = a.activation == Activation::silu ? "silu_mul" : "gelu_mul";
  expect_cpu(op, "gate", gate);
  expect_cpu(op, "up", up);
  expect_storage(op, "gate", gate);
  TW_EXPECT(same_shape(gate, up) && gate.dtype == up.dtype, op,
            "gate and up must have one shape and dtype, got " + shape_of(gate) + " " + name_of(gate.dtype) +
                " and " + shape_of(up) + " " + name_of(up.dtype));
  for (const auto* t : {&gate, &up, &out})
    if (t->ndim > 0) expect_unit_stride(op, "every tensor", *t);
  const auto& kernel = table().act_mul;
  record(op, kernel.isa);
  const int64_t total = gate.numel();
  if (total == 0) return;
  a.gate = rows_of(gate), a.up = rows_of(up), a.out = rows_of(out);
  a.n = gate.ndim ? gate.dim(-1) : 1;
  if (is_contiguous(gate) && is_contiguous(up) && is_contiguous(out)) {  // one row
    a.gate.dims = a.up.dims = a.out.dims = 0;
    a.n = total;
  }
  a.dtype = storage_of(gate.dtype);
  parallel_ranges(total, kGrain, [&](int64_t begin, int64_t end) { kernel.fn(a, begin, end); });
}

}  // namespace tilewright
