// Attention forward: out = softmax(scores) v with scores = mask(softcap(scale * q k^T) + alibi + bias).
//
// The heads of one KV head's group are folded into the rows: row r = query * group + head in the group, so K
// and V are read once for all of them. Both kernels step over keys in blocks, keep (max, sum, unnormalised
// output) per row in fp32, and rescale when a row's maximum grows (Milakov & Gimelshein 2018; Dao 2023).
//   prefill  K and V are packed once per KV head (K transposed) for the register tile; a task is kQueryRows
//   rows
//            against every key block that one of them can see: 4 * rows * keys * head_dim flops.
//   decode   a task is all rows of a KV head against kDecodeChunk keys, read in place: bound by reading K and
//   V
//            once. Partial results merge in chunk order.
// Blocks and chunks count from the first valid key, so neither padding nor threads change a result's bits.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

const float kMinusInf = -__builtin_inff();

TW_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
TW_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

struct Keys {
  int64_t begin, end;
};

// Valid keys of a batch element.
TW_INLINE Keys valid_keys(const AttentionArgs& a, int64_t b) {
  return {a.k_start ? a.k_start[b] : 0, a.k_end ? a.k_end[b] : a.seq_k};
}

// The key index that sits on the diagonal of query i.
TW_INLINE int64_t diagonal(const AttentionArgs& a, Keys valid, int64_t i) {
  return a.causal == Causal::top_left ? valid.begin + i : valid.end - a.seq_q + i;
}

// Keys that query i may see by causality, window and length.
TW_INLINE Keys visible_keys(const AttentionArgs& a, Keys valid, int64_t i) {
  const int64_t d = diagonal(a, valid, i);
  Keys r = valid;
  if (a.window_left >= 0) r.begin = min64(max64(r.begin, d - a.window_left), valid.end);
  if (a.window_right >= 0) r.end = min64(r.end, d + a.window_right + 1);
  if (a.causal != Causal::none) r.end = min64(r.end, d + 1);
  if (r.end < r.begin) r.end = r.begin;
  return r;
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

// Row state of one task, and where a row's extra score terms lie.
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

// One row's softmax step over keys [first, first + count): scores -> probabilities, updating max, sum and
// out. P is float or bf16. General adds softcap, alibi, bias and mask.
template <class P, bool General>
TW_INLINE void softmax_row(const AttentionArgs& a, const State& s, int64_t r, int64_t b, int64_t head,
                           int64_t query, Keys valid, int64_t first, int64_t count) {
  const Keys see = visible_keys(a, valid, query);
  float* scores = s.scores + r * s.ld;
  P* probabilities = reinterpret_cast<P*>(s.probabilities + r * (s.ld * int64_t(sizeof(P)) / 4));
  const int64_t lo = max64(see.begin - first, 0), hi = min64(see.end - first, count);
  if (lo >= hi) {
    for (int64_t j = 0; j < s.ld; j += W) {
      store_operand(probabilities + j, zero());
      if constexpr (General) store(scores + j, set1(kMinusInf));
    }
    return;
  }
  const F scale = set1(a.scale), minus_inf = set1(kMinusInf);
  const int64_t bias_row = b * a.bias.batch + head * a.bias.head + query * a.bias.row;
  const int64_t mask_row = b * a.mask.batch + head * a.mask.head + query * a.mask.row;
  F top = minus_inf;
  // Vectors outside [lo, hi) are skipped; those on its border are masked lane by lane.
  const int64_t j_begin = lo / W * W, j_end = (hi + W - 1) / W * W;
  for (int64_t j = j_begin; j < j_end; j += W) {
    F x = mul(load(scores + j), scale);
    if constexpr (General) {
      const int64_t key = first + j;
      const int lanes = int(min64(W, count - j));
      if (a.softcap > 0) x = mul(set1(a.softcap), tanh(div(x, set1(a.softcap))));
      if (a.alibi) {
        const F distance = sub(add(set1(float(key - diagonal(a, valid, query))), lane_index()), zero());
        x = sub(x, mul(set1(a.alibi[b * a.alibi_batch + head]), abs(distance)));
      }
      if (a.bias.kind != MaskKind::none) {
        // A bias of -inf masks, whatever the score is.
        const F bias = read_bias(a.bias, bias_row + key * a.bias.key, lanes);
        x = select_less(bias, set1(-3.4028234663852886e38f), minus_inf, add(x, bias));
      }
      if (a.mask.kind != MaskKind::none) x = apply_mask(a.mask, mask_row + key * a.mask.key, lanes, x);
    }
    if (j < lo) x = keep_below(minus_inf, x, j, lo);
    if (j + W > hi) x = keep_below(x, minus_inf, j, hi);
    store(scores + j, x);
    top = max(top, x);
  }
  const float row_max = reduce_max(top), old_max = s.max[r];
  const float new_max = row_max > old_max || row_max != row_max ? row_max : old_max;
  if (new_max == kMinusInf) {  // nothing to attend to so far (a NaN score is not less than -inf: see below)
    bool nan = false;
    for (int64_t j = j_begin; j < j_end; j += W) nan |= any_nan(load(scores + j));
    if (!nan) {
      for (int64_t j = 0; j < s.ld; j += W) {
        store_operand(probabilities + j, zero());
        if constexpr (General) store(scores + j, minus_inf);
      }
      return;
    }
  }
  for (int64_t j = 0; j < j_begin; j += W) {
    store_operand(probabilities + j, zero());
    if constexpr (General) store(scores + j, minus_inf);
  }
  F total = zero();
  const F m = set1(new_max);
  for (int64_t j = j_begin; j < j_end; j += W) {
    // The denominator sums what the product multiplies: rounding alone must not change a row's weights'
    // total.
    total = add(total, store_operand(probabilities + j, exp(sub(load(scores + j), m))));
  }
  for (int64_t j = j_end; j < s.ld; j += W) {
    store_operand(probabilities + j, zero());
    if constexpr (General) store(scores + j, minus_inf);
  }
  float sum = reduce_add(total);
  if (new_max != old_max && old_max != kMinusInf) {
    float lanes[W];
    store(lanes, exp(set1(old_max - new_max)));
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

TW_INLINE bool is_general(const AttentionArgs& a) {
  return a.softcap > 0 || a.alibi || a.bias.kind != MaskKind::none || a.mask.kind != MaskKind::none;
}

template <class P>
void softmax_rows(const AttentionArgs& a, const State& s, int64_t rows, int64_t b, int64_t kv_head,
                  int64_t first_row, Keys valid, int64_t first, int64_t count) {
  const int64_t group = a.heads / a.kv_heads;
  const bool general = is_general(a);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
    if (general)
      softmax_row<P, true>(a, s, r, b, head, query, valid, first, count);
    else
      softmax_row<P, false>(a, s, r, b, head, query, valid, first, count);
  }
}

// Row r of the folded rows -> its place in a (batch, heads, seq, dim) tensor.
template <class T>
TW_INLINE T* at(const AttentionArgs& a, const AttentionTensor& t, int64_t b, int64_t kv_head, int64_t r) {
  const int64_t group = a.heads / a.kv_heads;
  return static_cast<T*>(t.data) + b * t.batch + (kv_head * group + r % group) * t.head + (r / group) * t.row;
}

// out = accumulated / sum; the sink joins the denominator here, once.
void finish_row(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t r, float max, float sum,
                const float* acc) {
  const int64_t group = a.heads / a.kv_heads, head = kv_head * group + r % group;
  float factor = 1.0f;
  if (a.sinks && a.sinks[head] != kMinusInf) {
    const float sink = a.sinks[head];
    float lanes[W];
    if (sink > max) {
      store(lanes, exp(set1(max - sink)));
      factor = max == kMinusInf ? 0.0f : lanes[0];
      sum = sum * factor + 1.0f;
      max = sink;
    } else {
      store(lanes, exp(set1(sink - max)));
      sum += lanes[0];
    }
  }
  const F scale = set1(sum == 0.0f ? 0.0f : factor / sum);
  with_storage(a.out.dtype, [&](auto t) {
    auto* out = at<decltype(t)>(a, a.out, b, kv_head, r);
    for (int64_t d = 0; d < a.v_dim; d += W) {
      const F y = mul(load(acc + d), scale);
      if (a.v_dim - d >= W)
        store(out + d, y);
      else
        store(out + d, y, int(a.v_dim - d));
    }
  });
  if (a.lse)
    a.lse[(b * a.heads + head) * a.seq_q + r / group] = sum == 0.0f               ? kMinusInf
                                                        : max == __builtin_inff() ? max
                                                                                  : max + __builtin_logf(sum);
}

// --- prefill ---

// [d / depth][kKeyBlock] elements of keys [first, first + count), zero elsewhere.
template <class E, class T>
void pack_k(const T* k, int64_t stride, int64_t d, int64_t count, float* out) {
  const int64_t depth = E::depth, elements = (d + depth - 1) / depth;
  for (int64_t key = 0; key < kKeyBlock; key += W) {
    for (int64_t e = 0; e < elements; e += W) {
      F block[W];
      for (int i = 0; i < W; ++i) {
        const T* p = k + (key + i) * stride + e * depth;
        const int64_t left = key + i < count ? d - e * depth : 0;
        if constexpr (E::depth == 2) {
          if (left >= 2 * W) {
            block[i] = load(reinterpret_cast<const float*>(p));
          } else {
            alignas(64) float pairs[W] = {};
            if (left > 0) std::memcpy(pairs, p, size_t(left) * 2);
            block[i] = load(pairs);
          }
        } else {
          block[i] = left >= W ? load(p) : load(p, left > 0 ? int(left) : 0);
        }
      }
      transpose(block);
      const int rows = int(min64(W, elements - e));
      for (int i = 0; i < rows; ++i) store(out + (e + i) * kKeyBlock + key, block[i]);
    }
  }
}

// [kKeyBlock / depth][v_pad] elements. Returns whether a value is NaN or infinite.
template <class E, class T>
bool pack_v(const T* v, int64_t stride, int64_t d, int64_t v_pad, int64_t count, float* out) {
  bool bad = false;
  const auto value = [&](int64_t key, int64_t at) {
    const int64_t left = key < count ? d - at : 0;
    return left >= W ? load(v + key * stride + at) : load(v + key * stride + at, left > 0 ? int(left) : 0);
  };
  for (int64_t key = 0; key < kKeyBlock; key += E::depth)
    for (int64_t at = 0; at < v_pad; at += W) {
      float* to = out + key / E::depth * v_pad + at;
      const F x = value(key, at);
      bad |= any_not_finite(x);
      if constexpr (E::depth == 2) {
#if defined(__AVX512BF16__)
        const F y = value(key + 1, at);
        bad |= any_not_finite(y);
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
        const __m512i high = _mm512_castps_si512(y);  // bf16 in the upper half, zeros below
        _mm512_storeu_si512(to, _mm512_or_si512(low, high));
#endif
      } else {
        store(to, x);
      }
    }
  return bad;
}

template <class E, class T>
void pack_task(const AttentionArgs& a, int64_t task) {
  const int64_t block = task % a.key_blocks, slot = task / a.key_blocks;
  const int64_t b = slot / a.kv_heads, h = slot % a.kv_heads;
  const Keys valid = valid_keys(a, b);
  const int64_t first = valid.begin + block * kKeyBlock, count = min64(kKeyBlock, valid.end - first);
  // Keys that no query can see stay unread: they may hold anything.
  const int64_t lo = visible_keys(a, valid, 0).begin, hi = visible_keys(a, valid, a.seq_q - 1).end;
  const int64_t used = min64(count, hi - first);
  if (used <= 0 || first + kKeyBlock <= lo) return;
  const int64_t v_pad = padded16(a.v_dim);
  const T* k = static_cast<const T*>(a.k.data) + b * a.k.batch + h * a.k.head + first * a.k.row;
  const T* v = static_cast<const T*>(a.v.data) + b * a.v.batch + h * a.v.head + first * a.v.row;
  pack_k<E>(k, a.k.row, a.head_dim, used,
            static_cast<float*>(a.packed_k) + task * packed_block_elements(a.head_dim));
  a.v_not_finite[task] = pack_v<E>(v, a.v.row, a.v_dim, v_pad, used,
                                   static_cast<float*>(a.packed_v) + task * packed_block_elements(a.v_dim));
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

// A copy of a V block in which keys that no row of the task attends are zero: 0 * NaN must not reach the
// output.
template <class E, class P>
const float* without_unseen(const AttentionArgs& a, const State& s, int64_t rows, int64_t lo, int64_t hi,
                            const float* v, float* copy) {
  std::memcpy(copy, v, size_t(kKeyBlock / E::depth * s.v_pad) * 4);
  for (int64_t key = 0; key < kKeyBlock; ++key) {
    if (is_seen(a, s, rows, lo, hi, key)) continue;
    char* row = reinterpret_cast<char*>(copy + key / E::depth * s.v_pad) + (key % E::depth) * sizeof(P);
    for (int64_t d = 0; d < s.v_pad; ++d) std::memset(row + d * 4, 0, sizeof(P));
  }
  return copy;
}

template <class E, class P>
void prefill_task(const AttentionArgs& a, int64_t task, float* memory) {
  const int64_t group = a.heads / a.kv_heads, total_rows = a.seq_q * group;
  const int64_t row_blocks = (total_rows + kQueryRows - 1) / kQueryRows, slots = a.batch * a.kv_heads;
  // The last rows see the most keys when causal: they go first.
  const int64_t row_block = row_blocks - 1 - task / slots, slot = task % slots;
  const int64_t b = slot / a.kv_heads, h = slot % a.kv_heads;
  const int64_t first_row = row_block * kQueryRows, rows = min64(kQueryRows, total_rows - first_row);
  const int64_t depth = E::depth, q_elements = (a.head_dim + depth - 1) / depth, q_ld = padded16(a.head_dim);

  State s;
  s.ld = kKeyBlock;
  s.v_pad = padded16(a.v_dim);
  float* q = memory;
  s.scores = q + kQueryRows * q_ld;
  s.probabilities = s.scores + kQueryRows * kKeyBlock;
  s.out = s.probabilities + kQueryRows * kKeyBlock;
  s.max = s.out + kQueryRows * s.v_pad;
  s.sum = s.max + kQueryRows;
  float* v_copy = s.sum + kQueryRows;

  with_storage(a.q.dtype, [&](auto t) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = at<const decltype(t)>(a, a.q, b, h, first_row + r);
      P* to = reinterpret_cast<P*>(q + r * q_ld);
      for (int64_t d = 0; d < q_ld; d += W) {
        const int64_t left = a.head_dim - d;
        store(to + d, left >= W ? load(from + d) : load(from + d, left > 0 ? int(left) : 0));
      }
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    s.max[r] = kMinusInf;
    s.sum[r] = 0.0f;
  }
  std::memset(s.out, 0, size_t(rows * s.v_pad) * 4);

  const Keys valid = valid_keys(a, b);
  const int64_t lo = visible_keys(a, valid, first_row / group).begin;
  const int64_t hi = visible_keys(a, valid, (first_row + rows - 1) / group).end;
  for (int64_t block = (lo - valid.begin) / kKeyBlock; valid.begin + block * kKeyBlock < hi; ++block) {
    const int64_t first = valid.begin + block * kKeyBlock, index = slot * a.key_blocks + block;
    const float* k = static_cast<const float*>(a.packed_k) + index * packed_block_elements(a.head_dim);
    const float* v = static_cast<const float*>(a.packed_v) + index * packed_block_elements(a.v_dim);
    // On the diagonal only the keys that some row sees are multiplied.
    const int64_t count = min64(kKeyBlock, hi - first), width = (count + W - 1) / W * W;
    multiply<E>(rows, width, q, q_ld, k, kKeyBlock, q_elements, s.scores, kKeyBlock, false);
    softmax_rows<P>(a, s, rows, b, h, first_row, valid, first, count);
    if (a.v_not_finite[index]) v = without_unseen<E, P>(a, s, rows, lo - first, hi - first, v, v_copy);
    multiply<E>(rows, s.v_pad, s.probabilities, kKeyBlock / depth, v, s.v_pad, (width + depth - 1) / depth,
                s.out, s.v_pad, true);
  }
  for (int64_t r = 0; r < rows; ++r)
    finish_row(a, b, h, first_row + r, s.max[r], s.sum[r], s.out + r * s.v_pad);
}

// --- decode ---

constexpr int kTogether = 4;  // rows that share the loads of a key or value: 4 x 2 accumulators

// scores[r][j] = q[r] . k[j] for the rows of one group; q is [rows][d_pad] floats, zero beyond d.
template <class T, int N>
void decode_scores(const float* q, int64_t d_pad, const T* k, int64_t stride, int64_t d, int64_t count,
                   float* scores, int64_t ld) {
  for (int64_t j = 0; j < count; j += W) {
    const int keys = int(min64(W, count - j));
    F sums[N][W];
    for (int i = 0; i < keys; ++i) {
      const T* key = k + (j + i) * stride;
      F acc[N];
      TW_UNROLL for (int t = 0; t < N; ++t) acc[t] = zero();
      int64_t at = 0;
      for (; at + W <= d; at += W) {
        const F x = load(key + at);
        TW_UNROLL for (int t = 0; t < N; ++t) acc[t] = fma(x, load(q + t * d_pad + at), acc[t]);
      }
      if (at < d) {
        const F x = load(key + at, int(d - at));
        TW_UNROLL for (int t = 0; t < N; ++t) acc[t] = fma(x, load(q + t * d_pad + at), acc[t]);
      }
      TW_UNROLL for (int t = 0; t < N; ++t) sums[t][i] = acc[t];
    }
    for (int i = keys; i < W; ++i) {
      TW_UNROLL for (int t = 0; t < N; ++t) sums[t][i] = zero();
    }
    TW_UNROLL for (int t = 0; t < N; ++t) {
      F lanes[W];
      TW_UNROLL for (int i = 0; i < W; ++i) lanes[i] = sums[t][i];
      transpose(lanes);
      TW_UNROLL for (int step = W / 2; step > 0; step /= 2) {
        TW_UNROLL for (int i = 0; i < step; ++i) lanes[i] = add(lanes[i], lanes[i + step]);
      }
      store(scores + t * ld + j, lanes[0]);
    }
  }
}

// out[r] += sum_j p[r][j] v[j] over the keys listed in `seen`.
template <class T, int N>
void decode_values(const float* p, int64_t ld, const T* v, int64_t stride, int64_t d, const int* seen,
                   int count, float* out, int64_t v_pad) {
  for (int64_t at = 0; at < d; at += 2 * W) {
    const int64_t left = d - at;
    const int n0 = int(min64(W, left)), n1 = int(max64(0, min64(W, left - W)));
    const int64_t second =
        n1 > 0 ? W : 0;  // a d of at most W is read and stored once more instead of past its end
    F acc[N][2];
    TW_UNROLL for (int t = 0; t < N; ++t) {
      acc[t][0] = load(out + t * v_pad + at);
      acc[t][1] = load(out + t * v_pad + at + second);
    }
    const auto step = [&](int j, F x0, F x1) {
      TW_UNROLL for (int t = 0; t < N; ++t) {
        const F weight = set1(p[t * ld + j]);
        acc[t][0] = fma(weight, x0, acc[t][0]);
        acc[t][1] = fma(weight, x1, acc[t][1]);
      }
    };
    if (n1 == W) {
      for (int s = 0; s < count; ++s) {
        const T* row = v + seen[s] * stride + at;
        step(seen[s], load(row), load(row + W));
      }
    } else {
      for (int s = 0; s < count; ++s) {
        const T* row = v + seen[s] * stride + at;
        step(seen[s], load(row, n0), load(row + second, second ? n1 : n0));
      }
    }
    TW_UNROLL for (int t = 0; t < N; ++t) {
      store(out + t * v_pad + at, acc[t][0]);
      store(out + t * v_pad + at + second, acc[t][1]);
    }
  }
}

template <class T>
void decode_task(const AttentionArgs& a, int64_t task, float* memory) {
  const int64_t group = a.heads / a.kv_heads, rows = a.seq_q * group;
  const int64_t chunk = task % a.chunks, slot = task / a.chunks, b = slot / a.kv_heads, h = slot % a.kv_heads;
  const int64_t q_pad = padded16(a.head_dim);
  State s;
  s.ld = kDecodeBlock;
  s.v_pad = padded16(a.v_dim);
  float* q = memory;
  s.scores = q + kDecodeRows * q_pad;
  s.probabilities = s.scores + kDecodeRows * kDecodeBlock;
  s.out = s.probabilities + kDecodeRows * kDecodeBlock;
  s.max = s.out + kDecodeRows * s.v_pad;
  s.sum = s.max + kDecodeRows;
  with_storage(a.q.dtype, [&](auto t) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = at<const decltype(t)>(a, a.q, b, h, r);
      for (int64_t d = 0; d < q_pad; d += W) {
        const int64_t left = a.head_dim - d;
        store(q + r * q_pad + d, left >= W ? load(from + d) : load(from + d, left > 0 ? int(left) : 0));
      }
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    s.max[r] = kMinusInf;
    s.sum[r] = 0.0f;
  }
  std::memset(s.out, 0, size_t(rows * s.v_pad) * 4);

  const Keys valid = valid_keys(a, b);
  const int64_t lo = visible_keys(a, valid, 0).begin, hi = visible_keys(a, valid, a.seq_q - 1).end;
  const int64_t chunk_begin = valid.begin + chunk * kDecodeChunk, chunk_end = chunk_begin + kDecodeChunk;
  const T* k = static_cast<const T*>(a.k.data) + b * a.k.batch + h * a.k.head;
  const T* v = static_cast<const T*>(a.v.data) + b * a.v.batch + h * a.v.head;
  for (int64_t first = chunk_begin; first < min64(hi, chunk_end); first += kDecodeBlock) {
    if (first + kDecodeBlock <= lo) continue;
    // Scores of keys before lo are never looked at, but for those in lo's own vector.
    const int64_t count = min64(min64(kDecodeBlock, hi - first), chunk_end - first);
    const int64_t from = max64(0, lo - first) / W * W;
    in_tiles<kTogether>(0, rows, [&](int64_t r, auto n) {
      decode_scores<T, n.n>(q + r * q_pad, q_pad, k + (first + from) * a.k.row, a.k.row, a.head_dim,
                            count - from, s.scores + r * s.ld + from, s.ld);
    });
    softmax_rows<float>(a, s, rows, b, h, 0, valid, first, count);
    // Keys that no row attends are not read: they may hold anything.
    int seen[kDecodeBlock], n_seen = 0;
    for (int64_t j = 0; j < count; ++j)
      if (is_seen(a, s, rows, lo - first, hi - first, j)) seen[n_seen++] = int(j);
    in_tiles<kTogether>(0, rows, [&](int64_t r, auto n) {
      decode_values<T, n.n>(s.probabilities + r * s.ld, s.ld, v + first * a.v.row, a.v.row, a.v_dim, seen,
                            n_seen, s.out + r * s.v_pad, s.v_pad);
    });
  }
  if (a.chunks == 1) {
    for (int64_t r = 0; r < rows; ++r) finish_row(a, b, h, r, s.max[r], s.sum[r], s.out + r * s.v_pad);
    return;
  }
  float* partial = a.partials + task * rows * (s.v_pad + 2);
  for (int64_t r = 0; r < rows; ++r, partial += s.v_pad + 2) {
    partial[0] = s.max[r];
    partial[1] = s.sum[r];
    std::memcpy(partial + 2, s.out + r * s.v_pad, size_t(s.v_pad) * 4);
  }
}

// One row of one KV head: its chunks' partial results, in ascending order.
void merge_task(const AttentionArgs& a, int64_t task, float* acc) {
  const int64_t rows = a.seq_q * (a.heads / a.kv_heads), slot = task / rows, r = task % rows;
  const int64_t v_pad = padded16(a.v_dim), size = v_pad + 2;
  const float* first = a.partials + (slot * a.chunks * rows + r) * size;
  float max = kMinusInf, sum = 0.0f;
  bool nan = false;
  for (int64_t c = 0; c < a.chunks; ++c) {
    const float m = first[c * rows * size];
    nan |= m != m;
    max = m > max ? m : max;
  }
  if (nan) max = __builtin_nanf("");
  std::memset(acc, 0, size_t(v_pad) * 4);
  for (int64_t c = 0; c < a.chunks; ++c) {
    const float* p = first + c * rows * size;
    if (p[0] == kMinusInf && p[1] == 0.0f) continue;  // the chunk attended to nothing
    float lanes[W];
    store(lanes, exp(set1(p[0] - max)));
    sum += p[1] * lanes[0];
    for (int64_t d = 0; d < v_pad; d += W)
      store(acc + d, fma(load(p + 2 + d), set1(lanes[0]), load(acc + d)));
  }
  finish_row(a, slot / a.kv_heads, slot % a.kv_heads, r, max, sum, acc);
}

template <class Fn>
TW_INLINE void with_operands([[maybe_unused]] const AttentionArgs& a, Fn&& f) {
#if defined(__AVX512BF16__)
  if (a.k.dtype == Storage::bf16) return f(Bf16Pairs{}, bf16{});
#endif
  f(Fp32{}, float{});
}

}  // namespace

void TW_KERNEL(attention_pack)(const AttentionArgs& a, int64_t task, void*) {
  with_operands(a, [&](auto e, auto) {
    using E = decltype(e);
    if constexpr (E::depth == 2)
      pack_task<E, bf16>(a, task);
    else
      with_storage(a.k.dtype, [&](auto t) { pack_task<E, decltype(t)>(a, task); });
  });
}

void TW_KERNEL(attention_prefill)(const AttentionArgs& a, int64_t task, void* memory) {
  with_operands(a, [&](auto e, auto p) {
    prefill_task<decltype(e), decltype(p)>(a, task, static_cast<float*>(memory));
  });
}

void TW_KERNEL(attention_decode)(const AttentionArgs& a, int64_t task, void* memory) {
  with_storage(a.k.dtype, [&](auto t) { decode_task<decltype(t)>(a, task, static_cast<float*>(memory)); });
}

void TW_KERNEL(attention_merge)(const AttentionArgs& a, int64_t task, void* memory) {
  merge_task(a, task, static_cast<float*>(memory));
}

}  // namespace tilewright
