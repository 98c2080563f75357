// Calls of quantised linear layers.
#include "cuda/call.h"
#include "cuda/linear.h"

namespace tilewright::cuda {
namespace {

constexpr const char* kOp = "quantized_linear";

void expect_matrix(const char* name, const TensorView& t, DType dtype) {
  expect_here(kOp, name, t);
  TW_EXPECT(t.ndim == 2 && t.dtype == dtype && t.is_contiguous(), kOp,
            std::string(name) + " must be a contiguous matrix of " + name_of(dtype) + ", got " +
                name_of(t.dtype) + " " + shape_of(t));
}

tw::cuda::GpuWeight weight_of(const GpuWeightInputs& in) {
  using tw::cuda::Offset;
  tw::cuda::GpuWeight w;
  expect_matrix("codes", in.codes, DType::u8);
  expect_storage(kOp, "scales", in.scales);
  expect_matrix("scales", in.scales, in.scales.dtype);
  TW_EXPECT(in.bits == 4 || in.bits == 8, kOp, "bits must be 4 or 8, got " + std::to_string(in.bits));
  TW_EXPECT(in.group == 0 || in.group == 16 || (in.group > 0 && in.group % 32 == 0), kOp,
            "group must be 0, 16 or a multiple of 32, got " + std::to_string(in.group));
  const int64_t padded = (in.k + 63) / 64 * 64, groups = in.group ? (in.k + in.group - 1) / in.group : 1;
  TW_EXPECT(in.codes.dim(1) == padded * in.bits / 8 && reinterpret_cast<uintptr_t>(in.codes.data) % 16 == 0,
            kOp,
            "codes of " + std::to_string(in.k) + " columns must have " +
                std::to_string(padded * in.bits / 8) + " aligned bytes a row, got " + shape_of(in.codes));
  TW_EXPECT(in.scales.dim(0) >= groups && in.scales.dim(1) == in.codes.dim(0), kOp,
            "scales must be (groups, rows) = (" + std::to_string(groups) + ", " +
                std::to_string(in.codes.dim(0)) + "), got " + shape_of(in.scales));
  w.offset = in.offset == "zero" ? Offset::zero : in.offset == "min" ? Offset::min : Offset::none;
  TW_EXPECT(w.offset != Offset::none || in.offset == "none", kOp,
            "offset must be none, zero or min, got " + in.offset);
  if (w.offset != Offset::none) {
    expect_matrix("offsets", in.offsets, w.offset == Offset::zero ? DType::u8 : in.scales.dtype);
    TW_EXPECT(same_shape(in.offsets, in.scales), kOp, "offsets must have the shape of scales");
  }
  w.codes = in.codes.as<const uint8_t>(), w.code_stride = in.codes.dim(1);
  w.bits = in.bits, w.middle = in.middle;
  w.scales = in.scales.data, w.offsets = in.offsets.data;
  w.scale_type = type_of(in.scales.dtype);
  w.group = static_cast<int>(in.group), w.groups = static_cast<int>(in.scales.dim(0));
  return w;
}

}  // namespace

int64_t linear_workspace_bytes(int64_t m, int64_t k) {
  return tw::cuda::integer_linear_workspace_bytes(m, k);
}

void linear(Where where, const TensorView& x, const GpuWeightInputs& weight, const TensorView& bias,
            const TensorView& group_sizes, const std::string& activation, const TensorView& workspace,
            const TensorView& out) {
  tw::cuda::IntegerLinearArgs integers;
  tw::cuda::LinearArgs& a = integers.linear;
  a.w = weight_of(weight);
  expect_here(kOp, "x", x);
  expect_here(kOp, "out", out);
  expect_storage(kOp, "x", x);
  expect_unit_stride(kOp, "x", x);
  TW_EXPECT(x.ndim == 2 && x.dim(1) == weight.k && weight.k > 0, kOp,
            "x must be (rows, " + std::to_string(weight.k) + "), the weight's columns, got " + shape_of(x));
  int64_t n = weight.codes.dim(0);
  if (group_sizes) {
    expect_here(kOp, "group_sizes", group_sizes);
    TW_EXPECT(group_sizes.ndim == 1 && group_sizes.dtype == DType::i64 && group_sizes.is_contiguous() &&
                  group_sizes.dim(0) > 0 && n % group_sizes.dim(0) == 0,
              kOp,
              "group_sizes must be contiguous int64 (groups,) and divide the weight's " + std::to_string(n) +
                  " rows, got " + name_of(group_sizes.dtype) + " " + shape_of(group_sizes));
    a.group_sizes = group_sizes.as<const int64_t>();
    a.experts = static_cast<int>(group_sizes.dim(0));
    n /= a.experts;
  }
  TW_EXPECT(out.ndim == 2 && out.dim(0) == x.dim(0) && out.dim(1) == n && is_float_storage(out.dtype) &&
                out.is_contiguous(),
            kOp,
            "out must be contiguous (" + std::to_string(x.dim(0)) + ", " + std::to_string(n) +
                ") of float32, bfloat16 or float16, got " + shape_of(out) + " " + name_of(out.dtype));
  if (bias) {
    expect_here(kOp, "bias", bias);
    TW_EXPECT(bias.ndim == 1 && bias.dim(0) == weight.codes.dim(0) && bias.dtype == DType::f32 &&
                  bias.is_contiguous(),
              kOp,
              "bias must be contiguous float32 (" + std::to_string(weight.codes.dim(0)) + ",), got " +
                  shape_of(bias) + " " + name_of(bias.dtype));
    a.bias = bias.as<const float>();
  }
  for (const int64_t size : {x.dim(0), n, weight.k})
    expect_countable(kOp, "rows or columns", size + (1 << 20));
  a.x = x.data, a.x_stride = x.stride(0), a.out = out.data;
  a.type = type_of(x.dtype), a.out_type = type_of(out.dtype);
  a.m = static_cast<int>(x.dim(0)), a.n = static_cast<int>(n), a.k = static_cast<int>(weight.k);
  if (x.dim(0) == 0 || n == 0) return;
  if (activation == "float") {
    if (x.dtype == DType::f32)
      throw NotSupported(std::string(kOp) + ": x must be bfloat16 or float16, got float32");
    return launch(kOp, where, tw::cuda::linear, a);
  }
  TW_EXPECT(activation == "int8" || activation == "int8_token", kOp,
            "activation must be float, int8 or int8_token, got " + activation);
  const int64_t needed = linear_workspace_bytes(a.m, a.k);
  expect_here(kOp, "workspace", workspace);
  TW_EXPECT(workspace.is_contiguous() && workspace.numel() * size_of(workspace.dtype) >= needed &&
                reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0,
            kOp, "the workspace must have " + std::to_string(needed) + " aligned bytes");
  integers.per_token = activation == "int8_token";
  integers.workspace = workspace.data;
  launch(kOp, where, tw::cuda::integer_linear, integers);
}

}  // namespace tilewright::cuda
