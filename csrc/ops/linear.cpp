#include <algorithm>
#include <string>

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

// Runs kernel over blocks x row chunks; chunks are the outer loop, so that threads share the rows in cache.
template <class Kernel>
void run(const LinearArgs& a, int64_t m, int64_t chunk, int64_t panel_bytes, const Kernel& kernel) {
  const int64_t blocks = a.w.n_blocks(), chunks = (m + chunk - 1) / chunk;
  const auto one = [&](int64_t block, int64_t c) {
    void* panel = scratch(Scratch::panel, panel_bytes);
    kernel(a, block, c * chunk, std::min(m, (c + 1) * chunk), panel);
  };
  if (m <= 8) {  // memory bound: each thread streams its own stretch of the weights
    const int64_t grain = std::max<int64_t>(1, kSerial / (m * 32 * std::max<int64_t>(1, a.w.k)));
    parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) one(b, 0);
    });
  } else {
    parallel_tasks(blocks * chunks, [&](int64_t task) { one(task % blocks, task / blocks); });
  }
}

}  // namespace

void linear(const TensorView& x, const TensorView& packed, int64_t n, int64_t k, int bits, int64_t group_size,
            int offset, int scale_bits, const TensorView& bias, const std::string& activation,
            const TensorView& out) {
  const PackedWeight w = packed_weight(kOp, packed, n, k, bits, group_size, offset, scale_bits);
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
  TW_EXPECT(!bias || (bias.ndim == 1 && bias.dim(0) == n && (n <= 1 || bias.strides[0] == 1) &&
                      bias.dtype == DType::f32 && bias.device_type == 1),
            kOp, "bias must be a contiguous float32 CPU tensor of shape (" + std::to_string(n) + ",)");
  const int64_t m = n == 0 || k == 0 ? 0 : x.numel() / k;

  LinearArgs a;
  a.w = w;
  a.bias = bias.as<const float>();
  a.out = rows_of(out);
  a.out_dtype = storage_of(out.dtype);
  const int64_t k_blocks = w.k_blocks(), kp = k_blocks * 32;
  const int64_t grain = std::max<int64_t>(1, kSerial / 4 / std::max<int64_t>(1, k));
  const bool integer = activation == "int8" || activation == "int8_token";
  TW_EXPECT(integer || activation == "bf16" || activation == "fp32", kOp,
            "activation must be int8, int8_token, bf16 or fp32, got " + activation);

  if (integer) {
    record(kOp, table().linear_int8.isa);
    if (m == 0) return;
    auto* memory = static_cast<char*>(scratch(Scratch::operands, m * (kp + 8 * k_blocks)));
    QuantiseArgs q;
    q.x = rows_of(x);
    q.dtype = storage_of(x.dtype);
    q.k = k;
    q.k_blocks = k_blocks;
    q.per_token = activation == "int8_token";
    q.offset = w.offset;
    q.zero = 1 << (bits - 1);
    q.codes = reinterpret_cast<int8_t*>(memory);
    q.scales = reinterpret_cast<float*>(memory + m * kp);
    q.corrections = reinterpret_cast<int32_t*>(q.scales + m * k_blocks);
    parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { table().quantise_rows.fn(q, begin, end); });
    a.codes = q.codes;
    a.scales = q.scales;
    a.corrections = q.corrections;
    run(a, m, row_chunk(kp), kp * 32, table().linear_int8.fn);
    return;
  }
  const bool pairs = activation == "bf16" && table().linear_bf16.fn;
  PrepareArgs p;
  p.x = rows_of(x);
  p.dtype = storage_of(x.dtype);
  p.k = k;
  p.k_blocks = k_blocks;
  p.round_bf16 = activation == "bf16";
  if (pairs) {
    record(kOp, table().linear_bf16.isa);
    if (m == 0) return;
    auto* memory = static_cast<char*>(scratch(Scratch::operands, m * (kp * 2 + k_blocks * 4)));
    p.out = memory;
    a.sums = p.sums = reinterpret_cast<float*>(memory + m * kp * 2);
    parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { table().prepare_bf16.fn(p, begin, end); });
    a.x = p.out;
    run(a, m, row_chunk(kp * 2), kp * 64, table().linear_bf16.fn);
    return;
  }
  record(kOp, table().linear_f32.isa);
  if (m == 0) return;
  auto* memory = static_cast<char*>(scratch(Scratch::operands, m * (kp + k_blocks) * 4));
  p.out = memory;
  a.sums = p.sums = reinterpret_cast<float*>(memory + m * kp * 4);
  parallel_ranges(m, grain, [&](int64_t begin, int64_t end) { table().prepare_f32.fn(p, begin, end); });
  a.x = p.out;
  const int64_t chunk = row_chunk(512 * 4);
  run(a, m, chunk, (128 + std::min(m, chunk)) * 32 * 4, table().linear_f32.fn);
}

}  // namespace tilewright
