#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/simd.h"
#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"
#include "ops/quant.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "quantized_linear";

// Rows of x per pass over the weights: their int8 codes and one block's unpacked weights stay in L2 together.
// A multiple of every kernel's row tile.
constexpr int64_t kRowsBytes = 384 << 10;
// Below this many multiply-adds the call stays on its thread: about what waking a worker costs.
constexpr int64_t kSerial = 1 << 16;

int64_t row_chunk(int64_t row_bytes) { return std::max<int64_t>(96, kRowsBytes / row_bytes / 24 * 24); }

// Rows [begin, end) of x and the matrix that they are multiplied by.
struct Group {
  LinearArgs args;
  int64_t begin, end;
};

// Runs kernel over blocks x row chunks of each group; chunks are the outer loop, so that threads share the
// rows in cache.
void run(const std::vector<Group>& groups, int64_t chunk, LinearKernel kernel) {
  const PackedWeight& w = groups[0].args.w;
  const int64_t blocks = w.n_blocks();
  struct Chunk {
    const LinearArgs* args;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  int64_t most = 0;
  for (const Group& g : groups)
    for (int64_t m = g.begin; m < g.end; m += chunk) {
      chunks.push_back({&g.args, m, std::min(g.end, m + chunk)});
      most = std::max(most, chunks.back().end - m);
    }
  const int64_t panel_bytes = kPanelBytes + kPanelScaleBytes + most * 128;
  const auto one = [&](int64_t task) {
    const Chunk& c = chunks[static_cast<size_t>(task / blocks)];
    kernel(*c.args, task % blocks, c.begin, c.end, scratch(Scratch::panel, panel_bytes));
  };
  const int64_t tasks = static_cast<int64_t>(chunks.size()) * blocks;
  if (most <= 8) {  // memory bound: each thread streams its own stretch of the weights
    const int64_t grain = std::max<int64_t>(1, kSerial / (most * 32 * std::max<int64_t>(1, w.k)));
    parallel_ranges(tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) one(task);
    });
  } else {
    parallel_tasks(tasks, one);
  }
}

// The float kernels multiply x by codes and correct for zero points and minima afterwards, where an infinity
// would become NaN. Rows of x with a value that is not finite are computed here once more, from the
// dequantised weight; they are rare, so plainly.
void redo_rows_not_finite(const Group& group, bool pairs) {
  const LinearArgs& a = group.args;
  const int64_t k_blocks = a.w.k_blocks(), k = a.w.k, sums = k_blocks * a.w.parts();
  for (int64_t r = group.begin; r < group.end; ++r) {
    bool finite = true;
    for (int64_t i = 0; i < sums; ++i) finite &= std::isfinite(a.sums[r * sums + i]);
    if (finite) continue;
    const auto x = [&](int64_t i) {
      if (!pairs) return static_cast<const float*>(a.x)[r * k_blocks * 32 + i];
      constexpr int kPlace[4] = {0, 2, 1, 3};  // as prepare_bf16 orders the columns of a step
      return to_float(static_cast<const bf16*>(a.x)[r * k_blocks * 32 + i / 4 * 4 + kPlace[i % 4]]);
    };
    int64_t offset = 0, index = r;
    for (int d = a.out.dims - 1; d >= 0; --d) {
      offset += index % a.out.shape[d] * a.out.strides[d];
      index /= a.out.shape[d];
    }
    parallel_ranges(a.w.n, 8, [&](int64_t begin, int64_t end) {
      auto* w = static_cast<float*>(scratch(Scratch::panel, k * 4));
      for (int64_t n = begin; n < end; ++n) {
        dequantise_row(a.w, n, w);
        float sum = 0.0f;
        for (int64_t i = 0; i < k; ++i) sum += x(i) * w[i];
        if (a.bias) sum += a.bias[n];
        if (a.out_dtype == Storage::f32) static_cast<float*>(a.out.base)[offset + n] = sum;
        if (a.out_dtype == Storage::bf16) static_cast<bf16*>(a.out.base)[offset + n] = to_bf16(sum);
        if (a.out_dtype == Storage::f16) static_cast<f16*>(a.out.base)[offset + n] = to_f16(sum);
      }
    });
  }
}

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
    parallel_ranges(m, std::max<int64_t>(1, kSerial / k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        int64_t offset = 0, index = r;
        for (int d = rows.dims - 1; d >= 0; --d) {
          offset += index % rows.shape[d] * rows.strides[d];
          index /= rows.shape[d];
        }
        const T* from = static_cast<const T*>(rows.base) + offset;
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

// out = y + the outliers' share + bias, y (m, n) being the integer product alone. k ascending, fp32.
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
        int64_t offset = first, index = r;
        for (int d = a.out.dims - 1; d >= 0; --d) {
          offset += index % a.out.shape[d] * a.out.strides[d];
          index /= a.out.shape[d];
        }
        for (int64_t i = 0; i < count; ++i) {
          const float v = a.bias ? sum[i] + a.bias[first + i] : sum[i];
          if (a.out_dtype == Storage::f32) static_cast<float*>(a.out.base)[offset + i] = v;
          if (a.out_dtype == Storage::bf16) static_cast<bf16*>(a.out.base)[offset + i] = to_bf16(v);
          if (a.out_dtype == Storage::f16) static_cast<f16*>(a.out.base)[offset + i] = to_f16(v);
        }
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
std::vector<Group> groups_of(const LinearArgs& a, const TensorView& sizes, int64_t m, int64_t n) {
  if (!sizes) return {{a, 0, m}};
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t i = 0; i < sizes.dim(0); ++i) {
    Group g{a, begin, begin + sizes.as<const int64_t>()[i]};
    g.args.w.n = n;
    g.args.w.data += i * g.args.w.n_blocks() * g.args.w.block_bytes();
    if (a.bias) g.args.bias += i * n;
    begin = g.end;
    if (g.end > g.begin) groups.push_back(g);
  }
  return groups;
}

// Over how many columns one integer product goes: as far as its scales last.
int64_t run_length(const PackedWeight& w, bool per_token) {
  if (w.group == 16 || !per_token) return std::min<int64_t>(w.group, 32);
  const int64_t blocks = w.blocks_per_group();
  int64_t run = std::min(blocks, kLongRun / 32);
  while (blocks != w.k_blocks() && blocks % run != 0) --run;  // groups end where runs do
  return run * 32;
}

}  // namespace

void linear(const TensorView& x, const TensorView& packed, const WeightFormat& format,
            const LinearOptions& options, const TensorView& out) {
  const PackedWeight w = packed_weight(kOp, packed, format);
  const TensorView &bias = options.bias, &columns = options.columns, &sizes = options.group_sizes;
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
  TW_EXPECT(!bias || (bias.ndim == 1 && bias.dim(0) == w.n && (w.n <= 1 || bias.strides[0] == 1) &&
                      bias.dtype == DType::f32 && bias.device_type == 1),
            kOp, "bias must be a contiguous float32 CPU tensor of shape (" + std::to_string(w.n) + ",)");
  TW_EXPECT(!columns || (columns.dtype == DType::i64 && columns.ndim == 1 && columns.dim(0) == k &&
                         (k <= 1 || columns.stride(0) == 1) && columns.device_type == 1),
            kOp, "columns must be a contiguous int64 CPU tensor of shape (" + std::to_string(k) + ",)");
  if (columns)
    for (int64_t i = 0; i < k; ++i)
      TW_EXPECT(columns.as<const int64_t>()[i] >= 0 && columns.as<const int64_t>()[i] < k, kOp,
                "columns must lie in [0, " + std::to_string(k) + ")");
  const bool integer = activation == "int8" || activation == "int8_token";
  TW_EXPECT(integer || activation == "bf16" || activation == "fp32", kOp,
            "activation must be int8, int8_token, bf16 or fp32, got " + activation);
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

  LinearArgs a;
  a.w = w;
  a.bias = bias.as<const float>();
  a.out = rows_of(out);
  a.out_dtype = storage_of(out.dtype);
  const int64_t k_blocks = w.k_blocks(), kp = k_blocks * 32, sums = k_blocks * w.parts();
  const int64_t grain = std::max<int64_t>(1, kSerial / 4 / std::max<int64_t>(1, k));
  const bool integer_codes = integer && !w.is_float();
  const bool pairs = activation == "bf16" && table().linear_bf16.fn;
  record(kOp, integer_codes ? table().linear_int8.isa
              : pairs       ? table().linear_bf16.isa
                            : table().linear_f32.isa);
  if (m == 0) return;

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
  }

  if (integer) {
    QuantiseArgs q;
    q.x = rows;
    q.dtype = dtype;
    q.k = k;
    q.k_blocks = k_blocks;
    q.run = a.run = integer_codes ? run_length(w, activation == "int8_token") : 32;
    q.runs = a.runs = (kp + q.run - 1) / q.run;
    q.per_token = activation == "int8_token";
    q.offset = w.offset;
    q.zero = w.is_table() ? 128 : 1 << (w.bits() - 1);
    const int64_t floats = integer_codes ? 0 : m * (kp + sums) * 4;
    auto* memory =
        static_cast<char*>(scratch(Scratch::operands, floats + m * (kp + 4 * k_blocks + 4 * q.runs))) +
        floats;
    q.codes = reinterpret_cast<int8_t*>(memory);
    q.scales = reinterpret_cast<float*>(memory + m * kp);
    q.corrections = reinterpret_cast<int32_t*>(q.scales + m * k_blocks);
    parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { table().quantise_rows.fn(q, begin, end); });
    a.codes = q.codes;
    a.scales = q.scales;
    a.corrections = q.corrections;
    if (integer_codes) {
      run(groups_of(a, sizes, m, n), row_chunk(kp), table().linear_int8.fn);
    } else {
      // Codes that are no integers: the same rounded x, in fp32. No correction, so no sums are read.
      auto* values = reinterpret_cast<float*>(memory - floats);
      parallel_ranges(m, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * k_blocks; i < end * k_blocks; ++i)
          for (int64_t j = i * 32; j < (i + 1) * 32; ++j)
            values[j] = static_cast<float>(q.codes[j]) * q.scales[i];
      });
      std::fill_n(values + m * kp, m * sums, 0.0f);
      a.x = values;
      a.sums = values + m * kp;
      run(groups_of(a, sizes, m, n), row_chunk(512 * 4), table().linear_f32.fn);
    }
  } else {
    PrepareArgs p;
    p.x = rows;
    p.dtype = dtype;
    p.k = k;
    p.k_blocks = k_blocks;
    p.run = 32 / w.parts();
    p.round_bf16 = activation == "bf16";
    const int64_t size = pairs ? 2 : 4;
    auto* memory = static_cast<char*>(scratch(Scratch::operands, m * (kp * size + sums * 4)));
    p.out = memory;
    a.sums = p.sums = reinterpret_cast<float*>(memory + m * kp * size);
    const auto& prepare = pairs ? table().prepare_bf16 : table().prepare_f32;
    parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { prepare.fn(p, begin, end); });
    a.x = p.out;
    const std::vector<Group> groups = groups_of(a, sizes, m, n);
    if (pairs)
      run(groups, row_chunk(kp * 2), table().linear_bf16.fn);
    else
      run(groups, row_chunk(512 * 4), table().linear_f32.fn);
    for (const Group& group : groups) redo_rows_not_finite(group, pairs);
  }
  if (!arranged.outliers.empty()) add_outliers(whole, arranged.outliers, inliers.data(), m);
}

}  // namespace tilewright
