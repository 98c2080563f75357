// What attention's kernels share: which keys a row sees, what its scores become, its softmax state, its end.
//
//   out = softmax(scores) v with scores = mask(softcap(scale * q k^T) + alibi + bias)
//
// The heads of one KV head's group are folded into the rows: row r = query * group + head in the group, so K
// and V are read once for all of them. Every kernel steps over keys in blocks, keeps (max, sum, unnormalised
// output) per row in fp32, and rescales when a row's maximum grows (Milakov & Gimelshein 2018; Dao 2023).
// Without extras (softcap, masks, ...) the scores stay q k^T, and scale joins the exponential: see
// score_unit. Blocks and chunks count from the first valid key, so neither padding nor threads change a
// result's bits. Included after cpu/simd.h.
#pragma once
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

const float kMinusInf = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;

TW_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
TW_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

using Sequence = AttentionSequence;
struct Keys {
  int64_t begin, end;
};

// The key index that sits on the diagonal of query i.
TW_INLINE int64_t diagonal(const AttentionArgs& a, const Sequence& q, int64_t i) {
  return a.causal == Causal::top_left ? q.k_begin + i : q.k_end - q.q_count + i;
}

// Keys that query i may see by causality, window and length.
TW_INLINE Keys visible_keys(const AttentionArgs& a, const Sequence& q, int64_t i) {
  const int64_t d = diagonal(a, q, i);
  Keys r = {q.k_begin, q.k_end};
  if (a.window_left >= 0) r.begin = min64(max64(r.begin, d - a.window_left), q.k_end);
  if (a.window_right >= 0) r.end = min64(r.end, d + a.window_right + 1);
  if (a.causal != Causal::none) r.end = min64(r.end, d + 1);
  if (r.end < r.begin) r.end = r.begin;
  return r;
}

// Where row `key` of sequence q begins in k or v, in elements, without its head.
TW_INLINE int64_t key_offset(const AttentionArgs& a, const AttentionTensor& t, const Sequence& q,
                             int64_t key) {
  if (!a.block_table) return q.k_batch * t.batch + key * t.row;
  return a.block_table[q.k_batch * a.table_stride + key / a.page_size] * t.batch + key % a.page_size * t.row;
}

// Row r of the folded rows -> its place in q or out.
template <class T>
TW_INLINE T* at(const AttentionArgs& a, const AttentionTensor& t, const Sequence& q, int64_t kv_head,
                int64_t r) {
  const int64_t group = a.heads / a.kv_heads;
  return static_cast<T*>(t.data) + q.q_batch * t.batch + (kv_head * group + r % group) * t.head +
         (q.q_first + r / group) * t.row;
}

// tanh for softcap, absolute error below 1e-7: Cephes' polynomial near 0, where the exponential form cancels.
TW_INLINE F tanh(F x) {
  const F z = mul(x, x);
  F p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F near_zero = fma(mul(p, z), x, x);
  const F e = exp(mul(x, set1(2.0f)));
  const F far = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  return select_less(abs(x), set1(0.625f), near_zero, far);
}

// Row state of one task.
struct State {
  float* scores;         // [rows][ld]
  float* probabilities;  // [rows][ld / depth] elements
  float* out;            // [rows][v_pad]
  float* max;            // [rows]
  float* sum;
  int64_t ld, v_pad;
};

template <class T>
TW_INLINE F gather(const T* p, int64_t stride, int count) {
  if (stride == 1) return count == W ? load(p) : load(p, count);
  float values[W] = {};
  for (int i = 0; i < count; ++i) values[i] = to_float(p[i * stride]);
  return load(values);
}

TW_INLINE F read_bias(const ScoreTensor& t, int64_t at, int count) {
  if (t.kind == MaskKind::f32) return gather(static_cast<const float*>(t.data) + at, t.key, count);
  if (t.kind == MaskKind::bf16) return gather(static_cast<const bf16*>(t.data) + at, t.key, count);
  return gather(static_cast<const f16*>(t.data) + at, t.key, count);
}

TW_INLINE F apply_mask(const ScoreTensor& t, int64_t at, int count, F s) {
  const auto* p = static_cast<const uint8_t*>(t.data) + at;
  if (t.key == 1) return select_nonzero(p, count, s, set1(kMinusInf));
  uint8_t flags[W] = {};
  for (int i = 0; i < count; ++i) flags[i] = p[i * t.key];
  return select_nonzero(flags, count, s, set1(kMinusInf));
}

TW_INLINE bool is_general(const AttentionArgs& a) {
  return a.softcap > 0 || a.alibi || a.bias.kind != MaskKind::none || a.mask.kind != MaskKind::none ||
         a.scale <= 0;
}

// What one unit of a kernel's scores and maxima is worth: scale, unless the extras needed real scores.
TW_INLINE float score_unit(const AttentionArgs& a) { return is_general(a) ? 1.0f : a.scale; }

// Numbers for a row's dropout: weight j is kept where the hash of j with them is below keep * 2^24.
struct DropoutRow {
  uint32_t first, second;
};
TW_INLINE DropoutRow dropout_row(uint64_t seed, int64_t batch, int64_t head, int64_t query) {
  // splitmix64's finaliser (Steele, Lea & Flood 2014) over the row's coordinates.
  uint64_t x = seed;
  const uint64_t coordinates[3] = {uint64_t(batch), uint64_t(head), uint64_t(query)};
  for (const uint64_t c : coordinates) {
    x += (c + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return {uint32_t(x), uint32_t(x >> 32)};
}
// x where weights [key, key + W) of the row are kept, 0 where dropped.
TW_INLINE F drop(DropoutRow row, float keep, int64_t key, F x) {
  I h = iadd(iadd(lane_number(), iset1(int32_t(uint32_t(key)))), iset1(int32_t(row.first)));
  h = imul(ixor(h, ishr<16>(h)), iset1(0x21f0aaad));
  h = iadd(ixor(h, ishr<15>(h)), iset1(int32_t(row.second)));
  h = imul(ixor(h, ishr<15>(h)), iset1(0x735a2d97));
  h = ixor(h, ishr<15>(h));
  return select_less(to_float(ishr<8>(h)), set1(keep * 16777216.0f), x, zero());
}

#if defined(__AVX512BF16__)
TW_INLINE F store_operand(bf16* p, F x) {  // an operand of vdpbf16ps, which takes subnormals as 0 anyway
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}
#endif
TW_INLINE F store_operand(float* p, F x) {
  store(p, x);
  return x;
}

// What one row's scores depend on beside q and k.
struct ScoreRow {
  const AttentionArgs& a;
  int64_t bias_row, mask_row, diagonal;
  float slope;

  TW_INLINE ScoreRow(const AttentionArgs& args, const Sequence& q, int64_t b, int64_t head, int64_t query)
      : a(args),
        bias_row(b * args.bias.batch + head * args.bias.head + query * args.bias.row),
        mask_row(b * args.mask.batch + head * args.mask.head + query * args.mask.row),
        diagonal(tilewright::diagonal(args, q, query)),
        slope(args.alibi ? args.alibi[b * args.alibi_batch + head] : 0.0f) {}

  // Scores of keys [key, key + count) from q k^T; `slant` becomes d score / d (scale * q k^T).
  TW_INLINE F scores(F product, int64_t key, int count, F& slant) const {
    F x = mul(product, set1(a.scale));
    slant = set1(1.0f);
    if (a.softcap > 0) {
      const F t = tanh(div(x, set1(a.softcap)));
      x = mul(set1(a.softcap), t);
      slant = fma(sub(zero(), t), t, slant);
    }
    if (a.alibi) x = sub(x, mul(set1(slope), abs(add(set1(float(key - diagonal)), lane_index()))));
    if (a.bias.kind != MaskKind::none) {
      // A bias of -inf masks, whatever the score is.
      const F bias = read_bias(a.bias, bias_row + key * a.bias.key, count);
      x = select_less(bias, set1(-3.4028234663852886e38f), set1(kMinusInf), add(x, bias));
    }
    if (a.mask.kind != MaskKind::none) x = apply_mask(a.mask, mask_row + key * a.mask.key, count, x);
    return x;
  }
};

// One row's softmax step over keys [first, first + count): scores -> probabilities, updating max, sum and
// out. P is float or bf16. General adds softcap, alibi, bias and mask; it leaves the scores with -inf where
// the row does not attend.
template <class P, bool General>
TW_INLINE void softmax_row(const AttentionArgs& a, const State& s, const Sequence& q, int64_t r, int64_t b,
                           int64_t head, int64_t query, int64_t first, int64_t count) {
  const Keys see = visible_keys(a, q, query);
  float* scores = s.scores + r * s.ld;
  P* probabilities = reinterpret_cast<P*>(s.probabilities + r * (s.ld * int64_t(sizeof(P)) / 4));
  const F minus_inf = set1(kMinusInf);
  const auto nothing = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += W) {
      store_operand(probabilities + j, zero());
      if constexpr (General) store(scores + j, minus_inf);
    }
  };
  const int64_t lo = max64(see.begin - first, 0), hi = min64(see.end - first, count);
  if (lo >= hi) return nothing(0, s.ld);
  const ScoreRow row(a, q, b, head, query);
  F top = minus_inf;
  // Vectors outside [lo, hi) are skipped; those on its border are masked lane by lane.
  const int64_t j_begin = lo / W * W, j_end = (hi + W - 1) / W * W;
  for (int64_t j = j_begin; j < j_end; j += W) {
    F x = load(scores + j), slant;
    if constexpr (General) x = row.scores(x, first + j, int(min64(W, count - j)), slant);
    const bool border = j < lo || j + W > hi;
    if (j < lo) x = keep_below(minus_inf, x, j, lo);
    if (j + W > hi) x = keep_below(x, minus_inf, j, hi);
    if (General || border) store(scores + j, x);
    top = max(top, x);
  }
  const float row_max = reduce_max(top), old_max = s.max[r];
  const F unit = set1((General ? 1.0f : a.scale) * kLog2e);
  const float new_max = row_max > old_max || row_max != row_max ? row_max : old_max;
  if (new_max == kMinusInf) {  // nothing to attend to so far (a NaN score is not less than -inf: see below)
    bool nan = false;
    for (int64_t j = j_begin; j < j_end; j += W) nan |= any_nan(load(scores + j));
    if (!nan) return nothing(0, s.ld);
  }
  nothing(0, j_begin);
  F total = zero();
  const F m = set1(new_max);
  for (int64_t j = j_begin; j < j_end; j += W) {
    // The denominator sums what the product multiplies: rounding alone must not change a row's weights'
    // total.
    const F p = exp2(mul(sub(load(scores + j), m), unit));
    total = add(total, store_operand(probabilities + j, p));
  }
  nothing(j_end, s.ld);
  if (a.keep < 1.0f) {
    const DropoutRow dropout = dropout_row(a.seed, b, head, query);
    for (int64_t j = j_begin; j < j_end; j += W)
      store_operand(probabilities + j, drop(dropout, a.keep, first - q.k_begin + j, load(probabilities + j)));
  }
  float sum = reduce_add(total);
  if (new_max != old_max && old_max != kMinusInf) {
    float lanes[W];
    store(lanes, exp2(mul(set1(old_max - new_max), unit)));
    const F factor = set1(lanes[0]);
    sum = sum + s.sum[r] * lanes[0];
    float* out = s.out + r * s.v_pad;
    for (int64_t d = 0; d < s.v_pad; d += W) store(out + d, mul(load(out + d), factor));
  } else {
    sum += s.sum[r];
  }
  s.sum[r] = sum;
  s.max[r] = new_max;
}

template <class P>
void softmax_rows(const AttentionArgs& a, const State& s, int64_t rows, int64_t b, int64_t kv_head,
                  int64_t first_row, int64_t first, int64_t count) {
  const int64_t group = a.heads / a.kv_heads;
  const bool general = is_general(a);
  const Sequence& q = a.sequences[b];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
    if (general)
      softmax_row<P, true>(a, s, q, r, b, head, query, first, count);
    else
      softmax_row<P, false>(a, s, q, r, b, head, query, first, count);
  }
}

// Whether a row attends key j of the block just softmaxed; [lo, hi) are the keys of the block that are in
// some row's range. Probabilities would not tell: they may vanish, and 0 * NaN is NaN where a key is
// attended.
TW_INLINE bool is_seen(const AttentionArgs& a, const State& s, int64_t rows, int64_t lo, int64_t hi,
                       int64_t j) {
  if (j < lo || j >= hi) return false;
  if (!is_general(a)) return true;
  for (int64_t r = 0; r < rows; ++r)
    if (!(s.scores[r * s.ld + j] == kMinusInf)) return true;
  return false;
}

// out = accumulated / sum; the sink joins the denominator here, once. `max` is in units of score_unit.
TW_INLINE void finish_row(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t r, float max, float sum,
                          const float* acc) {
  const int64_t group = a.heads / a.kv_heads, head = kv_head * group + r % group;
  const Sequence& q = a.sequences[b];
  float factor = 1.0f;
  max *= score_unit(a);
  if (a.sinks && a.sinks[head] != kMinusInf) {
    const float sink = a.sinks[head];
    float lanes[W];
    if (sink > max) {
      store(lanes, exp2(set1((max - sink) * kLog2e)));
      factor = max == kMinusInf ? 0.0f : lanes[0];
      sum = sum * factor + 1.0f;
      max = sink;
    } else {
      store(lanes, exp2(set1((sink - max) * kLog2e)));
      sum += lanes[0];
    }
  }
  const F scale = set1(sum == 0.0f || a.keep == 0.0f ? 0.0f : factor / (sum * a.keep));
  with_storage(a.out.dtype, [&](auto t) {
    auto* out = at<decltype(t)>(a, a.out, q, kv_head, r);
    for (int64_t d = 0; d < a.v_dim; d += W) {
      const F y = mul(load(acc + d), scale);
      if (a.v_dim - d >= W)
        store(out + d, y);
      else
        store(out + d, y, int(a.v_dim - d));
    }
  });
  if (a.lse)
    a.lse[(q.q_batch * a.heads + head) * a.lse_rows + q.q_first + r / group] =
        sum == 0.0f               ? kMinusInf
        : max == __builtin_inff() ? max
                                  : max + __builtin_logf(sum);
}

// How the products of attention read k and v, and round P, at this level: f(Operand{}, P{}).
template <class Fn>
TW_INLINE void with_operands([[maybe_unused]] Storage dtype, Fn&& f) {
#if defined(__AVX512BF16__)
  if (dtype == Storage::bf16) return f(Bf16Pairs{}, bf16{});
#endif
  f(Fp32{}, float{});
}

}  // namespace
}  // namespace tilewright
