#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"
#include "cpu/table.h"
#include "ops.h"
#include "ops/check.h"
#include "ops/linear_call.h"
#include "ops/quant.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "quantized_linear";

// x as the kernels are to see it, where that is not x itself: columns in the packed order, and what the
// integer product leaves out.
struct Outlier {
  int64_t row, k;
  float x;
};
struct Arranged {
  std::vector<float> values;      // [m][k]
  std::vector<Outlier> outliers;  // by row, k ascending
};
Arranged arrange(const TensorView& x, const int64_t* columns, double threshold, int64_t m, int64_t k) {
  Arranged result;
  result.values.resize(static_cast<size_t>(m * k));
  const Rows rows = rows_of(x);
  const auto copy = [&](auto type) {
    using T = decltype(type);
    parallel_ranges(m, std::max<int64_t>(1, kLinearSerial / k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = row<const T>(rows, r);
        float* to = result.values.data() + r * k;
        for (int64_t i = 0; i < k; ++i) to[i] = to_float(from[columns ? columns[i] : i]);
      }
    });
  };
  if (x.dtype == DType::f32) copy(float{});
  if (x.dtype == DType::bf16) copy(bf16{});
  if (x.dtype == DType::f16) copy(f16{});
  if (threshold > 0)
    for (int64_t i = 0; i < m * k; ++i)
      if (float& v = result.values[static_cast<size_t>(i)]; std::isfinite(v) && std::fabs(v) >= threshold) {
        result.outliers.push_back({i / k, i % k, v});
        v = 0.0f;
      }
  return result;
}

// out = y + the outliers' share + bias + residual, y (m, n) being the integer product alone. k ascending,
// fp32.
void add_outliers(const LinearArgs& a, const std::vector<Outlier>& outliers, const float* y, int64_t m) {
  std::vector<int64_t> columns;
  for (const Outlier& o : outliers) columns.push_back(o.k);
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  const int64_t n = a.w.n;
  parallel_ranges(a.w.n_blocks(), 4, [&](int64_t begin, int64_t end) {
    std::vector<float> w(columns.size() * 32);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * 32, count = std::min<int64_t>(32, n - first);
      for (size_t c = 0; c < columns.size(); ++c)
        dequantise_column(a.w, block, columns[c], w.data() + c * 32);
      size_t next = 0;
      for (int64_t r = 0; r < m; ++r) {
        float sum[32];
        std::copy_n(y + r * n + first, count, sum);
        for (; next < outliers.size() && outliers[next].row == r; ++next) {
          const auto c = std::lower_bound(columns.begin(), columns.end(), outliers[next].k) - columns.begin();
          for (int64_t i = 0; i < count; ++i) sum[i] += outliers[next].x * w[static_cast<size_t>(c) * 32 + i];
        }
        for (int64_t i = 0; i < count; ++i) put_output(a, r, first + i, sum[i]);
      }
    }
  });
}

// Outputs of each of the matrices that a weight of n rows holds.
int64_t outputs(int64_t n, const TensorView& sizes) {
  if (!sizes) return n;
  TW_EXPECT(sizes.dtype == DType::i64 && sizes.ndim == 1 && sizes.device_type == 1 && sizes.dim(0) > 0 &&
                (sizes.dim(0) == 1 || sizes.stride(0) == 1),
            kOp, "group_sizes must be a contiguous int64 CPU tensor of one or more sizes");
  const int64_t groups = sizes.dim(0);
  TW_EXPECT(n % groups == 0 && (groups == 1 || n / groups % 32 == 0), kOp,
            "a weight of " + std::to_string(groups) +
                " groups must have a multiple of 32 rows for each, got " + std::to_string(n) + " rows");
  return n / groups;
}

// The groups of a call that have rows; a plain call is one.
std::vector<LinearGroup> groups_of(const LinearArgs& a, const TensorView& sizes, int64_t m, int64_t n) {
  if (!sizes) return {{a, 0, m}};
  std::vector<LinearGroup> groups;
  int64_t begin = 0;
  for (int64_t i = 0; i < sizes.dim(0); ++i) {
    LinearGroup g{a, begin, begin + sizes.as<const int64_t>()[i]};
    g.args.w.n = n;
    g.args.w.data += i * g.args.w.n_blocks() * g.args.w.block_bytes();
    if (a.bias) g.args.bias += i * n;
    begin = g.end;
    if (g.end > g.begin) groups.push_back(g);
  }
  return groups;
}

}  // namespace

void linear(const TensorView& x, const TensorView& packed, const WeightFormat& format,
            const LinearOptions& options, const TensorView& out) {
  const PackedWeight w = packed_weight(kOp, packed, format);
  const TensorView &bias = options.bias, &residual = options.residual, &columns = options.columns,
                   &sizes = options.group_sizes;
  const int64_t n = outputs(w.n, sizes), k = w.k;
  const std::string& activation = options.activation;
  expect_storage(kOp, "x", x);
  expect_cpu(kOp, "x", x);
  expect_cpu(kOp, "out", out);
  expect_unit_stride(kOp, "x", x);
  expect_unit_stride(kOp, "out", out);
  TW_EXPECT(
      x.dim(-1) == k, kOp,
      "the last dimension of x must be the weight's " + std::to_string(k) + " columns, got x " + shape_of(x));
  bool shapes = out.ndim == x.ndim && out.dim(-1) == n;
  for (int i = 0; shapes && i + 1 < x.ndim; ++i) shapes = out.shape[i] == x.shape[i];
  TW_EXPECT(
      shapes && is_float_storage(out.dtype), kOp,
      "out must be a float tensor of x's shape with " + std::to_string(n) + " columns, got " + shape_of(out));
  expect_bias(kOp, "bias", bias, w.n);
  TW_EXPECT(!columns || (columns.dtype == DType::i64 && columns.ndim == 1 && columns.dim(0) == k &&
                         (k <= 1 || columns.stride(0) == 1) && columns.device_type == 1),
            kOp, "columns must be a contiguous int64 CPU tensor of shape (" + std::to_string(k) + ",)");
  if (columns)
    for (int64_t i = 0; i < k; ++i)
      TW_EXPECT(columns.as<const int64_t>()[i] >= 0 && columns.as<const int64_t>()[i] < k, kOp,
                "columns must lie in [0, " + std::to_string(k) + ")");
  LinearCall call(kOp, w, activation);
  expect_residual(kOp, residual, out);
  const int64_t m = n == 0 || k == 0 ? 0 : x.numel() / k;
  if (sizes) {
    int64_t rows = 0;
    bool valid = x.ndim == 2;
    for (int64_t i = 0; valid && i < sizes.dim(0); ++i) {
      const int64_t size = sizes.as<const int64_t>()[i];
      valid = size >= 0 && size <= x.dim(0) - rows;
      rows += valid ? size : 0;
    }
    TW_EXPECT(valid && rows == x.dim(0), kOp,
              "group_sizes must add up to the rows of x (rows, columns), got x " + shape_of(x));
    TW_EXPECT(options.outlier_threshold == 0, kOp, "weights with an outlier threshold cannot be grouped");
  }

  record(kOp, call.isa());
  if (m == 0) return;
  const bool integer = activation == "int8" || activation == "int8_token";
  LinearArgs& a = call.args;
  a.bias = bias.as<const float>();
  a.out = rows_of(out);
  if (residual) a.residual = rows_of(residual);
  a.out_dtype = storage_of(out.dtype);

  Rows rows = rows_of(x);
  Storage dtype = storage_of(x.dtype);
  Arranged arranged;
  if (columns || (options.outlier_threshold > 0 && integer)) {
    arranged = arrange(x, columns.as<const int64_t>(), integer ? options.outlier_threshold : 0.0, m, k);
    rows = Rows{arranged.values.data(), 1, {m}, {k}};
    dtype = Storage::f32;
  }
  std::vector<float> inliers;
  LinearArgs whole = a;  // with outliers, `a` computes the rest into `inliers`
  if (!arranged.outliers.empty()) {
    inliers.resize(static_cast<size_t>(m * n));
    a.out = Rows{inliers.data(), 1, {m}, {n}};
    a.out_dtype = Storage::f32;
    a.bias = nullptr;
    a.residual.base = nullptr;
  }

  call.place(scratch(Scratch::operands, call.operand_bytes(m)), m);
  call.prepare(rows, dtype, m);
  const std::vector<LinearGroup> groups = groups_of(a, sizes, m, n);
  run_groups(groups, groups[0].args.w.n_blocks(), call.chunk(), 0,
             [&](const LinearArgs& args, int64_t first, int64_t last, int64_t begin, int64_t end,
                 void* panel) { call.kernel()(args, first, last, begin, end, panel); });
  for (const LinearGroup& g : groups) call.redo_rows_not_finite(g.args, g.begin, g.end);
  if (!arranged.outliers.empty()) add_outliers(whole, arranged.outliers, inliers.data(), m);
}

}  // namespace tilewright
