#include "ops/linear_call.h"

#include <cmath>

#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"
#include "cpu/table.h"
#include "ops/check.h"
#include "ops/overlap.h"
#include "ops/quant.h"

namespace tilewright {
namespace {

// Int8 codes of the rows of a pass and one block's unpacked weights stay in L2 together. Chunks are multiples
// of every kernel's row tile.
constexpr int64_t kRowsBytes = 384 << 10;
int64_t row_chunk(int64_t row_bytes) { return std::max<int64_t>(96, kRowsBytes / row_bytes / 48 * 48); }
// fp32 rows are read a panel at a time, so their length does not matter.
constexpr int64_t kFloatRowBytes = 512 * 4;

// Over how many columns one integer product goes: as far as its scales last.
int64_t run_length(const PackedWeight& w, bool per_token) {
  if (w.group == 16 || !per_token) return std::min<int64_t>(w.group, 32);
  const int64_t blocks = w.blocks_per_group();
  int64_t run = std::min(blocks, kLongRun / 32);
  while (blocks != w.k_blocks() && blocks % run != 0) --run;  // groups end where runs do
  return run * 32;
}

int64_t grain_of(int64_t k) { return std::max<int64_t>(1, kLinearSerial / 4 / std::max<int64_t>(1, k)); }

}  // namespace

LinearCall::LinearCall(const char* op, const PackedWeight& w, const std::string& activation) {
  const bool integer = activation == "int8" || activation == "int8_token";
  TW_EXPECT(integer || activation == "bf16" || activation == "fp32", op,
            "activation must be int8, int8_token, bf16 or fp32, got " + activation);
  args.w = w;
  per_token_ = activation == "int8_token";
  mode_ = integer                                          ? w.is_float() ? Mode::int8_values : Mode::int8
          : activation == "bf16" && table().linear_bf16.fn ? Mode::bf16
                                                           : Mode::fp32;
  round_bf16_ = activation == "bf16";
  const int64_t kp = w.k_blocks() * 32;
  const auto& entry = mode_ == Mode::int8   ? table().linear_int8
                      : mode_ == Mode::bf16 ? table().linear_bf16
                                            : table().linear_f32;
  isa_ = entry.isa;
  kernel_ = entry.fn;
  prepare_ = mode_ == Mode::bf16 ? table().prepare_bf16.fn : table().prepare_f32.fn;
  chunk_ = row_chunk(mode_ == Mode::int8 ? kp : mode_ == Mode::bf16 ? kp * 2 : kFloatRowBytes);
  if (mode_ == Mode::int8) {
    args.run = run_length(w, per_token_);
    args.runs = (kp + args.run - 1) / args.run;
  } else {
    args.run = 32;
    args.runs = w.k_blocks();
  }
}

int64_t LinearCall::operand_bytes(int64_t m) const {
  const int64_t k_blocks = args.w.k_blocks(), kp = k_blocks * 32, sums = k_blocks * args.w.parts();
  const int64_t codes = kp + 4 * k_blocks + 4 * args.runs;
  return m * (mode_ == Mode::int8          ? codes
              : mode_ == Mode::int8_values ? codes + (kp + sums) * 4
                                           : kp * (mode_ == Mode::bf16 ? 2 : 4) + sums * 4);
}

void LinearCall::place(void* memory, int64_t m) {
  const int64_t k_blocks = args.w.k_blocks(), kp = k_blocks * 32, sums = k_blocks * args.w.parts();
  auto* at = static_cast<char*>(memory);
  if (mode_ != Mode::int8) {
    args.x = at;
    at += m * kp * (mode_ == Mode::bf16 ? 2 : 4);
    args.sums = reinterpret_cast<float*>(at);
    at += m * sums * 4;
  }
  if (mode_ == Mode::int8 || mode_ == Mode::int8_values) {
    args.codes = reinterpret_cast<int8_t*>(at);
    args.scales = reinterpret_cast<float*>(at + m * kp);
    args.corrections = reinterpret_cast<const int32_t*>(args.scales + m * k_blocks);
  }
}

QuantiseArgs LinearCall::quantise_args() const {
  const PackedWeight& w = args.w;
  QuantiseArgs q;
  q.k = w.k;
  q.k_blocks = q.row_blocks = w.k_blocks();
  q.run = args.run;
  q.runs = args.runs;
  q.per_token = per_token_;
  q.offset = w.offset;
  q.zero = w.is_table() ? 128 : 1 << (w.bits() - 1);
  q.codes = const_cast<int8_t*>(args.codes);
  q.scales = const_cast<float*>(args.scales);
  q.corrections = const_cast<int32_t*>(args.corrections);
  return q;
}

PrepareArgs LinearCall::prepare_args() const {
  PrepareArgs p;
  p.k = args.w.k;
  p.k_blocks = p.row_blocks = args.w.k_blocks();
  p.run = 32 / args.w.parts();
  p.round_bf16 = round_bf16_;
  p.out = const_cast<void*>(args.x);
  p.sums = const_cast<float*>(args.sums);
  return p;
}

void LinearCall::prepare(const Rows& x, Storage dtype, int64_t m) {
  const int64_t grain = grain_of(args.w.k), k_blocks = args.w.k_blocks();
  if (mode_ == Mode::bf16 || mode_ == Mode::fp32) {
    PrepareArgs p = prepare_args();
    p.x = x;
    p.dtype = dtype;
    parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { prepare_(p, begin, end); });
    return;
  }
  QuantiseArgs q = quantise_args();
  q.x = x;
  q.dtype = dtype;
  parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { table().quantise_rows.fn(q, begin, end); });
  if (mode_ == Mode::int8) return;
  // The same rounded x as floats. Nothing is corrected, so no sums are read.
  auto* values = static_cast<float*>(const_cast<void*>(args.x));
  parallel_ranges(m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * k_blocks; i < end * k_blocks; ++i)
      for (int64_t j = i * 32; j < (i + 1) * 32; ++j)
        values[j] = static_cast<float>(args.codes[j]) * args.scales[i];
  });
  std::fill_n(const_cast<float*>(args.sums), m * k_blocks * args.w.parts(), 0.0f);
}

void LinearCall::prepare_block(const Rows& x, int64_t kb, int64_t first, int64_t count) {
  const int64_t at = first * args.w.k_blocks() + kb, k = std::min<int64_t>(32, args.w.k - kb * 32);
  if (mode_ == Mode::int8) {
    QuantiseArgs q = quantise_args();
    q.x = x;
    q.k = k;
    q.k_blocks = 1;
    q.codes += at * 32;
    q.scales += at;
    q.corrections += first * args.runs + kb * (32 / args.run);
    table().quantise_rows.fn(q, 0, count);
  } else {
    PrepareArgs p = prepare_args();
    p.x = x;
    p.k = k;
    p.k_blocks = 1;
    p.out = static_cast<char*>(p.out) + at * 32 * (mode_ == Mode::bf16 ? 2 : 4);
    p.sums += at * args.w.parts();
    prepare_(p, 0, count);
  }
}

bool LinearCall::rows_are_finite(int64_t begin, int64_t end) const {
  if (mode_ == Mode::int8 || mode_ == Mode::int8_values) return true;
  const int64_t sums = args.w.k_blocks() * args.w.parts();
  bool finite = true;
  for (int64_t i = begin * sums; i < end * sums; ++i) finite &= std::isfinite(args.sums[i]);
  return finite;
}

void LinearCall::redo_rows_not_finite(const LinearArgs& a, int64_t begin, int64_t end) const {
  const int64_t kp = a.w.k_blocks() * 32, k = a.w.k;
  for (int64_t r = begin; r < end; ++r) {
    if (rows_are_finite(r, r + 1)) continue;
    const auto x = [&](int64_t i) {
      if (mode_ != Mode::bf16) return static_cast<const float*>(a.x)[r * kp + i];
      constexpr int kPlace[4] = {0, 2, 1, 3};  // as prepare_bf16 orders the columns of a step
      return to_float(static_cast<const bf16*>(a.x)[r * kp + i / 4 * 4 + kPlace[i % 4]]);
    };
    parallel_ranges(a.w.n, 8, [&](int64_t first, int64_t last) {
      auto* w = static_cast<float*>(scratch(Scratch::panel, k * 4));
      for (int64_t n = first; n < last; ++n) {
        dequantise_row(a.w, n, w);
        float sum = 0.0f;
        for (int64_t i = 0; i < k; ++i) sum += x(i) * w[i];
        put_output(a, r, n, sum);
      }
    });
  }
}

void expect_bias(const char* op, const char* name, const TensorView& bias, int64_t n) {
  TW_EXPECT(
      !bias || (bias.ndim == 1 && bias.dim(0) == n && (n <= 1 || bias.strides[0] == 1) &&
                bias.dtype == DType::f32 && bias.device_type == 1),
      op,
      std::string(name) + " must be a contiguous float32 CPU tensor of shape (" + std::to_string(n) + ",)");
}

void expect_residual(const char* op, const TensorView& residual, const TensorView& out) {
  if (!residual) return;
  TW_EXPECT(residual.dtype == out.dtype && same_shape(residual, out), op,
            "residual must be of the result's shape " + shape_of(out) + " and dtype " + name_of(out.dtype) +
                ", got " + shape_of(residual) + " " + name_of(residual.dtype));
  expect_cpu(op, "residual", residual);
  expect_unit_stride(op, "residual", residual);
  TW_EXPECT(!overlaps(residual, out), op, "out must not overlap residual");
}

void put_output(const LinearArgs& a, int64_t r, int64_t n, float v) {
  if (a.bias) v += a.bias[n];
  with_storage(a.out_dtype, [&](auto t) {
    using T = decltype(t);
    if (a.residual.base) v += to_float(row<const T>(a.residual, r)[n]);
    T& to = row<T>(a.out, r)[n];
    if constexpr (std::is_same_v<T, float>) to = v;
    if constexpr (std::is_same_v<T, bf16>) to = to_bf16(v);
    if constexpr (std::is_same_v<T, f16>) to = to_f16(v);
  });
}

LinearArgs LinearCall::from(int64_t block, int64_t blocks, int64_t row) const {
  LinearArgs one = args;
  const int64_t k_blocks = args.w.k_blocks(), sums = k_blocks * args.w.parts();
  one.w.data += block * args.w.block_bytes();
  one.w.n = blocks * 32;
  if (args.bias) one.bias += block * 32;
  if (args.codes) {
    one.codes += row * k_blocks * 32;
    one.scales += row * k_blocks;
    one.corrections += row * args.runs;
  }
  if (args.x) {
    one.x = static_cast<const char*>(args.x) + row * k_blocks * 32 * (mode_ == Mode::bf16 ? 2 : 4);
    one.sums += row * sums;
  }
  return one;
}

}  // namespace tilewright
