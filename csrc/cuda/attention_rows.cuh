// What attention's kernels share: where a sequence lies, which keys a row sees, how its softmax ends.
//
// The heads of one KV head's group are folded into the rows: row r = query * group + head in the group, so K
// and V are read once for all of them. Keys count from the sequence's first valid one, whatever padding
// precedes it.
#pragma once
#include "attention_launch.h"
#include "convert.cuh"

namespace tw::cuda {

constexpr float kLog2e = 1.4426950408889634f;
__device__ constexpr float kInfinity = __builtin_huge_valf();

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger one, or NaN if one of them is.
__device__ inline float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
// tanh with an absolute error below 2e-7: Cephes' polynomial near 0, where the exponential form cancels.
__device__ inline float tanh_accurate(float x) {
  const float z = x * x;
  float p = fmaf(z, -5.70498872745e-3f, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float near_zero = fmaf(p * z, x, x), e = exp2_fast(x * (2 * kLog2e));
  return fabsf(x) < 0.625f ? near_zero : 1.0f - __fdividef(2.0f, e + 1.0f);
}

struct Sequence {
  int k_row, k_begin;           // row of k and v (or of the block table), its first valid key
  int index, q_outer, q_first;  // q_outer: index in q's batch dimension
  int count, keys, shift;       // queries, keys; query i has key i + shift on its diagonal
  bool known;                   // its bounds exist; there are no keys otherwise
};

__device__ inline Sequence sequence_of(const AttentionArgs& a, int b) {
  Sequence s;
  s.index = b, s.q_outer = a.q_start ? 0 : b;
  int64_t first = 0, last = a.seq_q, begin = 0, end = a.capacity;
  if (a.q_start) {
    first = a.q_start[b], last = a.q_end[b];
    if (first < 0 || last < first || last > a.seq_q) first = last = 0;
  }
  s.q_first = static_cast<int>(first), s.count = static_cast<int>(last - first);
  if (a.k_start) begin = a.k_start[b];
  if (a.k_end) end = a.k_end[b];
  if (a.kv.counts) end = a.kv.counts[0];
  int64_t row = a.k_batch ? a.k_batch[b] : a.packed_keys ? 0 : b;
  s.known = begin >= 0 && begin <= end && end <= a.capacity && row >= 0 && row < a.k_rows &&
            (a.kv.score_keys < 0 || a.kv.score_keys == end);
  if (!s.known) begin = end = row = 0;
  s.k_row = static_cast<int>(row), s.k_begin = static_cast<int>(begin),
  s.keys = static_cast<int>(end - begin);
  s.shift = a.causal == CausalMask::top_left ? 0 : s.keys - s.count;
  return s;
}

// Which sequence tile number `tile` of packed rows belongs to, and its number there: the tiles of sequence b
// count from start[b] * step / size + b on, so none is shared and a few are empty.
struct PackedTile {
  int sequence, tile;
};
__device__ inline PackedTile packed_tile(const int64_t* start, int batch, int tile, int size, int step) {
  int low = 0, high = batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (start[middle] * step / size + middle <= tile)
      low = middle;
    else
      high = middle;
  }
  return {low, static_cast<int>(tile - start[low] * step / size - low)};
}

// Row `row` of the folded rows of a KV head.
struct Folded {
  int query, head;
};
__device__ inline Folded folded(const AttentionLaunch& a, int kv_head, int row) {
  const int query = a.group == 1 ? row : row / a.group;
  return {query, kv_head * a.group + row - query * a.group};
}

struct Range {
  int first, end;
};
// Keys that a query sees by causality, window and length.
__host__ __device__ inline Range visible_keys(const AttentionLaunch& a, const Sequence& s, int query) {
  const int diagonal = query + s.shift;
  Range r = {0, s.keys};
  if (a.left >= 0) r.first = max(diagonal - a.left, 0);
  if (a.right >= 0) r.end = min(r.end, diagonal + a.right + 1);
  if (a.causal != CausalMask::none) r.end = min(r.end, diagonal + 1);
  return r;
}
// Queries that see a key of [low, high] by causality and window; as visible_keys, the other way round.
__device__ inline Range seeing_queries(const AttentionLaunch& a, const Sequence& s, int low, int high) {
  Range r = {0, s.count};
  if (a.causal != CausalMask::none) r.first = max(r.first, low - s.shift);
  if (a.right >= 0) r.first = max(r.first, low - s.shift - a.right);
  if (a.left >= 0) r.end = min(r.end, high - s.shift + a.left + 1);
  return r;
}

// The sink joins a row's maximum and sum (of natural logits): what was accumulated shrinks by `factor`.
__device__ inline void join_sink(float sink, float& top, float& sum, float& factor) {
  factor = 1.0f;
  if (sink == -kInfinity) return;
  if (sink > top) {
    factor = top == -kInfinity ? 0.0f : exp2_fast((top - sink) * kLog2e);
    sum = sum * factor + 1.0f;
    top = sink;
  } else {
    sum += exp2_fast((sink - top) * kLog2e);
  }
}
// Logarithm of the softmax's denominator.
__device__ inline float log_sum(float top, float sum) {
  return sum == 0.0f ? -kInfinity : top == kInfinity ? top : top + logf(sum);
}
// What accumulated values are multiplied with at the end.
__device__ inline float end_factor(const AttentionArgs& a, float sum) {
  return sum == 0.0f || a.keep == 0.0f ? 0.0f : __fdividef(1.0f, sum * a.keep);
}

__device__ inline int64_t lse_index(const AttentionArgs& a, const Sequence& s, int head, int query) {
  return (s.q_outer * a.heads + head) * a.seq_q + s.q_first + query;
}

}  // namespace tw::cuda
