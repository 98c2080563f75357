// The MLP of a decoder layer in one call: gate and up are computed block by block, multiplied, and rounded to
// what the next product reads while they are in L1. The same operations in the same order as linear, act_mul
// and linear, so the same bits.
#include <string>

#include "cpu/table.h"
#include "ops.h"
#include "ops/check.h"
#include "ops/linear_call.h"
#include "ops/quant.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "gated_mlp";

}  // namespace

void gated_mlp(const TensorView& x, const TensorView& gate_up, const WeightFormat& gate_up_format,
               const TensorView& down, const WeightFormat& down_format, const GatedMlpOptions& options,
               const TensorView& out) {
  const PackedWeight w1 = packed_weight(kOp, gate_up, gate_up_format),
                     w2 = packed_weight(kOp, down, down_format);
  const TensorView& residual = options.residual;
  const int64_t inner = w2.k;
  expect_storage(kOp, "x", x);
  for (const auto* t : {&x, &out}) {
    expect_cpu(kOp, "every tensor", *t);
    expect_unit_stride(kOp, "every tensor", *t);
  }
  TW_EXPECT(w1.n == 2 * inner && inner % 32 == 0, kOp,
            "gate_up must have two rows for each of the columns of down, a multiple of 32; got " +
                std::to_string(w1.n) + " rows and " + std::to_string(inner) + " columns");
  TW_EXPECT(x.dim(-1) == w1.k, kOp,
            "the last dimension of x must be " + std::to_string(w1.k) + ", got x " + shape_of(x));
  bool shapes = out.ndim == x.ndim && out.dim(-1) == w2.n && out.dtype == x.dtype;
  for (int i = 0; shapes && i + 1 < x.ndim; ++i) shapes = out.shape[i] == x.shape[i];
  TW_EXPECT(
      shapes, kOp,
      "out must be of x's shape and dtype with " + std::to_string(w2.n) + " columns, got " + shape_of(out));
  expect_residual(kOp, residual, out);
  expect_bias(kOp, "gate_up_bias", options.gate_up_bias, w1.n);
  expect_bias(kOp, "down_bias", options.down_bias, w2.n);
  LinearCall first(kOp, w1, options.activation), second(kOp, w2, options.activation);
  ActMulArgs act;
  act.activation = activation_of(kOp, options.act);
  record(kOp, second.isa());
  const int64_t m = w1.k == 0 ? 0 : x.numel() / w1.k;
  if (m == 0 || w2.n == 0) return;
  TW_EXPECT(inner > 0, kOp, "gate_up and down must not be empty");

  first.place(scratch(Scratch::operands, first.operand_bytes(m)), m);
  first.prepare(rows_of(x), storage_of(x.dtype), m);
  first.args.bias = options.gate_up_bias.as<const float>();
  // The floats of act(gate) * up, where they are needed as a whole: before one scale a row is known, say.
  const bool finite = first.rows_are_finite(0, m), blocks_only = second.by_block() && finite;
  const int64_t operand_bytes = (second.operand_bytes(m) + 63) / 64 * 64;
  char* memory = static_cast<char*>(
      scratch(Scratch::inner, operand_bytes + (blocks_only ? 0 : m * inner * (finite ? 4 : 12))));
  second.place(memory, m);
  float* whole = reinterpret_cast<float*>(memory + operand_bytes);
  const Rows whole_rows{whole, 1, {m}, {inner}};
  const auto multiply_gate = [&](const Rows& gate, const Rows& up, const Rows& to, int64_t n, int64_t begin,
                                 int64_t end) {
    ActMulArgs a = act;
    a.gate = gate, a.up = up, a.out = to, a.n = n;
    table().act_mul.fn(a, begin, end);
  };
  const int64_t half = inner / 32;
  if (finite) {
    const auto some_blocks = [&](int64_t block, int64_t blocks, int64_t begin, int64_t end, char* panel) {
      const int64_t count = end - begin, width = blocks * 32;
      float* gate = extra_of(panel, count);
      for (int part = 0; part < 2; ++part) {
        LinearArgs a = first.from(block + part * half, blocks, begin);
        a.out = Rows{gate + part * count * width, 1, {count}, {width}};
        first.kernel()(a, 0, blocks, 0, count, panel);
      }
      const Rows product{gate, 0, {}, {}}, other{gate + count * width, 0, {}, {}};
      multiply_gate(product, other, product, count * width, 0, count * width);
      for (int64_t i = 0; i < blocks; ++i) {
        const Rows x{gate + i * 32, 1, {count}, {width}};
        if (blocks_only) {
          second.prepare_block(x, block + i, begin, count);
        } else {
          for (int64_t r = 0; r < count; ++r)
            std::copy_n(gate + r * width + i * 32, 32, whole + (begin + r) * inner + (block + i) * 32);
        }
      }
    };
    // As many blocks at a time as kernels read side by side for one row.
    const int64_t together = m == 1 ? 2 : 1;
    run_groups({{first.args, 0, m}}, half, first.chunk(), 256 * together,
               [&](const LinearArgs&, int64_t from, int64_t to, int64_t begin, int64_t end, char* panel) {
                 for (; from < to; from += together)
                   some_blocks(from, std::min(together, to - from), begin, end, panel);
               });
  } else {
    LinearArgs a = first.args;
    float* both = whole + m * inner;
    a.out = Rows{both, 1, {m}, {2 * inner}};
    run_groups({{a, 0, m}}, 2 * half, first.chunk(), 0,
               [&](const LinearArgs& args, int64_t from, int64_t to, int64_t begin, int64_t end,
                   char* panel) { first.kernel()(args, from, to, begin, end, panel); });
    first.redo_rows_not_finite(a, 0, m);
    parallel_ranges(m, 1, [&](int64_t begin, int64_t end) {
      multiply_gate(a.out, Rows{both + inner, 1, {m}, {2 * inner}}, whole_rows, inner, begin * inner,
                    end * inner);
    });
  }
  if (!blocks_only) second.prepare(whole_rows, Storage::f32, m);

  second.args.bias = options.down_bias.as<const float>();
  second.args.out = rows_of(out);
  second.args.out_dtype = storage_of(out.dtype);
  if (residual) second.args.residual = rows_of(residual);
  run_groups({{second.args, 0, m}}, w2.n_blocks(), second.chunk(), 0,
             [&](const LinearArgs& args, int64_t from, int64_t to, int64_t begin, int64_t end, char* panel) {
               second.kernel()(args, from, to, begin, end, panel);
             });
  second.redo_rows_not_finite(second.args, 0, m);
}

}  // namespace tilewright
