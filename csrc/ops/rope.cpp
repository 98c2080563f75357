#include <string>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"
#include "ops/overlap.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "rope";
constexpr int64_t kGrain = 16384;  // values: less stays on the calling thread, as for the norms

void check_positions(const TensorView& positions, int64_t batch, int64_t seq, int64_t max_positions,
                     RopeArgs& a) {
  const bool fits = positions.ndim == 1 ? positions.dim(0) == seq
                                        : positions.ndim == 2 && positions.dim(1) == seq &&
                                              (positions.dim(0) == batch || positions.dim(0) == 1);
  TW_EXPECT(fits, kOp,
            "positions must have shape (" + std::to_string(seq) + ",) or (" + std::to_string(batch) + ", " +
                std::to_string(seq) + "), got " + shape_of(positions));
  TW_EXPECT(positions.dtype == DType::i64, kOp,
            std::string("positions must be int64, got ") + name_of(positions.dtype));
  a.positions = positions.as<const int64_t>();
  a.positions_seq_stride = positions.stride(-1);
  a.positions_batch_stride = positions.ndim == 2 && positions.dim(0) > 1 ? positions.stride(0) : 0;
  const int64_t rows = a.positions_batch_stride ? batch : 1;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t t = 0; t < seq; ++t) {
      const int64_t p = a.positions[b * a.positions_batch_stride + t * a.positions_seq_stride];
      if (p < 0 || p >= max_positions)
        fail(kOp, "positions must be in [0, " + std::to_string(max_positions) +
                      "), the rows of cos and sin, got " + std::to_string(p));
    }
  }
}

HeadRows rows_by_head(const TensorView& t) {
  return {t.data, t.dim(1), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace

void rope(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
          const TensorView& positions, const TensorView& out_q, const TensorView& out_k, bool interleaved,
          std::optional<int64_t> rotary_dim) {
  for (const auto* t : {&q, &k, &cos, &sin, &positions})
    if (*t) expect_cpu(kOp, "every tensor", *t);
  TW_EXPECT(q.ndim == 4 && k.ndim == 4, kOp,
            "q and k must be (batch, heads, seq, head_dim), got " + shape_of(q) + " and " + shape_of(k));
  expect_storage(kOp, "q", q);
  TW_EXPECT(k.dtype == q.dtype, kOp,
            std::string("q and k must have one dtype, got ") + name_of(q.dtype) + " and " + name_of(k.dtype));
  const int64_t batch = q.dim(0), seq = q.dim(2), head_dim = q.dim(3);
  TW_EXPECT(k.dim(0) == batch && k.dim(2) == seq && k.dim(3) == head_dim, kOp,
            "q and k must agree in batch, seq and head_dim, got " + shape_of(q) + " and " + shape_of(k));
  TW_EXPECT(cos.ndim == 2 && same_shape(cos, sin) && cos.dtype == DType::f32 && sin.dtype == DType::f32, kOp,
            "cos and sin must be float32 of one shape (max_positions, rotary_dim / 2), got " + shape_of(cos) +
                " " + name_of(cos.dtype) + " and " + shape_of(sin) + " " + name_of(sin.dtype));
  const int64_t rotary = rotary_dim.value_or(2 * cos.dim(1));
  TW_EXPECT(rotary == 2 * cos.dim(1) && rotary > 0 && rotary <= head_dim, kOp,
            "rotary_dim must be twice the last dimension of cos (" + std::to_string(cos.dim(1)) +
                "), positive and at most head_dim (" + std::to_string(head_dim) + "), got " +
                std::to_string(rotary));
  expect_unit_stride(kOp, "cos", cos);
  expect_unit_stride(kOp, "sin", sin);
  expect_unit_stride(kOp, "q", q);
  expect_unit_stride(kOp, "k", k);

  RopeArgs a;
  if (positions) {
    check_positions(positions, batch, seq, cos.dim(0), a);
  } else {
    TW_EXPECT(seq <= cos.dim(0), kOp,
              "cos and sin must reach " + std::to_string(seq) + " positions, got " + shape_of(cos));
  }
  if (out_q.data == q.data || out_k.data == k.data)
    TW_EXPECT(!overlaps_itself(q) && !overlaps_itself(k) && !overlaps(q, k), kOp,
              "q and k must not share memory, with each other or within themselves (expanded), when inplace");
  a.in[0] = rows_by_head(q), a.in[1] = rows_by_head(k);
  a.out[0] = rows_by_head(out_q), a.out[1] = rows_by_head(out_k);
  a.cos = cos.as<const float>(), a.sin = sin.as<const float>();
  a.cos_stride = cos.stride(0), a.sin_stride = sin.stride(0);
  a.seq = seq, a.head_dim = head_dim, a.rotary_dim = rotary;
  a.dtype = storage_of(q.dtype);
  a.interleaved = interleaved;
  const auto& kernel = table().rope;
  record(kOp, kernel.isa);
  if (q.numel() + k.numel() == 0) return;
  const int64_t per_token = (q.dim(1) + k.dim(1)) * head_dim;
  parallel_ranges(batch * seq, (kGrain + per_token - 1) / per_token,
                  [&](int64_t begin, int64_t end) { kernel.fn(a, begin, end); });
}

}  // namespace tilewright
