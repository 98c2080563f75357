// Attention forward for few rows: a task is all rows of a KV head against kDecodeChunk keys, read in place;
// bound by reading K and V once. Partial results merge in chunk order.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_decode.h"

namespace tilewright {
namespace {

// How rows of q, k and v meet: 16-bit or float rows in place, widened to float; or bf16 pairs of head_dim and
// of keys for vdpbf16ps, with q and P rounded to bf16.
struct Widened {
  using Q = float;
  static constexpr int step = W;  // values of head_dim at a time
  static constexpr bool pairs = false;
};
#if defined(__AVX512BF16__)
struct Paired {
  using Q = bf16;
  static constexpr int step = 2 * W;
  static constexpr bool pairs = true;
};
TW_INLINE __m512i load_pairs(const bf16* p, int64_t count) {  // up to 32 values, zero beyond count
  return count >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << count) - 1, p);
}
TW_INLINE F dot_pairs(__m512i a, __m512i b, F acc) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#endif

// scores[r][j] = q[r] . key j for N rows and keys [0, count); q is [N][q_ld], zero beyond d.
template <class D, class T, int N>
void decode_scores(const typename D::Q* q, int64_t q_ld, const T* k, const int64_t* offsets, int64_t d,
                   int64_t count, float* scores, int64_t ld) {
  constexpr int kKeys = W / N;  // so that one sum_lanes ends N x kKeys products
  for (int64_t j = 0; j < count; j += kKeys) {
    // Key by key, so that memory is read in order.
    F acc[N * kKeys];
    TW_UNROLL for (int i = 0; i < kKeys; ++i) {
      const T* key = k + offsets[min64(j + i, count - 1)];
      F sum[N];
      TW_UNROLL for (int t = 0; t < N; ++t) sum[t] = zero();
      const auto step = [&](int64_t at, int64_t left) {
        if constexpr (D::pairs) {
#if defined(__AVX512BF16__)
          const __m512i x = load_pairs(key + at, left);
          TW_UNROLL for (int t = 0; t < N; ++t) sum[t] =
              dot_pairs(x, _mm512_loadu_si512(q + t * q_ld + at), sum[t]);
#endif
        } else {
          const F x = left >= W ? load(key + at) : load(key + at, int(left));
          TW_UNROLL for (int t = 0; t < N; ++t) sum[t] = fma(x, load(q + t * q_ld + at), sum[t]);
        }
      };
      int64_t at = 0;
      for (; at + D::step <= d; at += D::step) step(at, D::step);
      if (at < d) step(at, d - at);
      TW_UNROLL for (int t = 0; t < N; ++t) acc[t * kKeys + i] = sum[t];
    }
    float sums[W];
    store(sums, sum_lanes(acc));
    const int keys = int(min64(kKeys, count - j));
    for (int t = 0; t < N; ++t)
      for (int i = 0; i < keys; ++i) scores[t * ld + j + i] = sums[t * kKeys + i];
  }
}

// out[r] += sum over the keys listed in `offsets` of p[r][i] v[i].
template <class T, int N>
void decode_values(const float* p, int64_t ld, const T* v, const int64_t* offsets, int64_t d, int count,
                   float* out, int64_t v_pad) {
  for (int64_t at = 0; at < d; at += 2 * W) {
    const int64_t left = d - at;
    const int n0 = int(min64(W, left)), n1 = int(max64(0, min64(W, left - W)));
    // A d of at most W is read and stored once more instead of past its end.
    const int64_t second = n1 > 0 ? W : 0;
    F acc[N][2];
    TW_UNROLL for (int t = 0; t < N; ++t) {
      acc[t][0] = load(out + t * v_pad + at);
      acc[t][1] = load(out + t * v_pad + at + second);
    }
    const auto step = [&](int i, F x0, F x1) {
      TW_UNROLL for (int t = 0; t < N; ++t) {
        const F weight = set1(p[t * ld + i]);
        acc[t][0] = fma(weight, x0, acc[t][0]);
        acc[t][1] = fma(weight, x1, acc[t][1]);
      }
    };
    if (n1 == W) {
      for (int i = 0; i < count; ++i) {
        const T* row = v + offsets[i] + at;
        step(i, load(row), load(row + W));
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const T* row = v + offsets[i] + at;
        step(i, load(row, n0), load(row + second, second ? n1 : n0));
      }
    }
    TW_UNROLL for (int t = 0; t < N; ++t) {
      store(out + t * v_pad + at, acc[t][0]);
      store(out + t * v_pad + at + second, acc[t][1]);
    }
  }
}

#if defined(__AVX512BF16__)
// decode_scores for 4 rows of C * 32 bf16, all in registers: few instructions a key, so that loads run far
// enough ahead to keep memory busy.
template <int C>
void decode_scores_of_4(const bf16* q, int64_t q_ld, const bf16* k, const int64_t* offsets, int64_t count,
                        float* scores, int64_t ld) {
  __m512i rows[4][C];
  TW_UNROLL for (int t = 0; t < 4; ++t) {
    TW_UNROLL for (int c = 0; c < C; ++c) rows[t][c] = _mm512_loadu_si512(q + t * q_ld + c * 32);
  }
  const __m512i by_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t j = 0; j < count; j += 4) {
    F keys[4];  // a key's four products, each in four parts
    TW_UNROLL for (int i = 0; i < 4; ++i) {
      const bf16* key = k + offsets[min64(j + i, count - 1)];
      F sum[4];
      TW_UNROLL for (int t = 0; t < 4; ++t) sum[t] = zero();
      TW_UNROLL for (int c = 0; c < C; ++c) {
        const __m512i x = _mm512_loadu_si512(key + c * 32);
        TW_UNROLL for (int t = 0; t < 4; ++t) sum[t] = dot_pairs(rows[t][c], x, sum[t]);
      }
      keys[i] = sum_quarters(sum[0], sum[1], sum[2], sum[3]);
    }
    const F sums =
        _mm512_permutexvar_ps(by_row, sum_halves(sum_halves(keys[0], keys[1]), sum_halves(keys[2], keys[3])));
    // Columns beyond count are never looked at.
    _mm_storeu_ps(scores + j, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(scores + ld + j, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(scores + 2 * ld + j, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(scores + 3 * ld + j, _mm512_extractf32x4_ps(sums, 3));
  }
}

// decode_values for bf16 rows, two keys at a time; p is [N][ld / 2] pairs of keys. Interleaving two rows of
// 32 values within lanes of 128 bits gives columns 0-3, 8-11, 16-19, 24-27 and then the others: `out`,
// [N][out_ld], keeps that order until in_order.
template <int N>
void decode_value_pairs(const float* p, int64_t ld, const bf16* v, const int64_t* offsets, int64_t d,
                        int count, float* out, int64_t out_ld) {
  const auto columns = [&](int64_t at, auto wide, auto whole) {
    constexpr int C = decltype(wide)::n;  // times 32 columns: N * 2C accumulators
    const auto read = [&](const bf16* row, int c) {
      if constexpr (decltype(whole)::n) return _mm512_loadu_si512(row + at + c * 32);
      return load_pairs(row + at + c * 32, min64(32, d - at - c * 32));
    };
    F acc[N][2 * C];
    TW_UNROLL for (int t = 0; t < N; ++t) {
      TW_UNROLL for (int c = 0; c < 2 * C; ++c) acc[t][c] = load(out + t * out_ld + at + c * W);
    }
    const auto step = [&](int i, int c, __m512i x, __m512i y) {
      const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
      TW_UNROLL for (int t = 0; t < N; ++t) {
        const __m512i weights = _mm512_castps_si512(set1(p[t * (ld / 2) + i / 2]));
        acc[t][2 * c] = dot_pairs(low, weights, acc[t][2 * c]);
        acc[t][2 * c + 1] = dot_pairs(high, weights, acc[t][2 * c + 1]);
      }
    };
    int i = 0;
    for (; i + 2 <= count; i += 2) {
      const bf16 *x = v + offsets[i], *y = v + offsets[i + 1];
      TW_UNROLL for (int c = 0; c < C; ++c) step(i, c, read(x, c), read(y, c));
    }
    if (i < count) {
      TW_UNROLL for (int c = 0; c < C; ++c) step(i, c, read(v + offsets[i], c), _mm512_setzero_si512());
    }
    TW_UNROLL for (int t = 0; t < N; ++t) {
      TW_UNROLL for (int c = 0; c < 2 * C; ++c) store(out + t * out_ld + at + c * W, acc[t][c]);
    }
  };
  // Whole rows at once, as they lie in memory, even where accumulators spill: passes of 64 columns read half
  // as fast.
  int64_t at = 0;
  for (; at + 128 <= d; at += 128) columns(at, Count<4>{}, Count<1>{});
  if (at + 96 <= d) columns(at, Count<3>{}, Count<1>{}), at += 96;
  if (at + 64 <= d) columns(at, Count<2>{}, Count<1>{}), at += 64;
  if (at + 32 <= d) columns(at, Count<1>{}, Count<1>{}), at += 32;
  if (at < d) columns(at, Count<1>{}, Count<0>{});
}

// Columns of decode_value_pairs in their natural order.
TW_INLINE void in_order(float* out, int64_t columns) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t d = 0; d < columns; d += 32) {
    const F low = load(out + d), high = load(out + d + W);
    store(out + d, _mm512_permutex2var_ps(low, first, high));
    store(out + d + W, _mm512_permutex2var_ps(low, second, high));
  }
}
#endif

// Rows 4, 2, 1 at a time, so that sum_lanes always ends W products.
template <class Fn>
TW_INLINE void in_rows(int64_t rows, Fn&& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(r, Count<4>{});
  if (r + 2 <= rows) f(r, Count<2>{}), r += 2;
  if (r < rows) f(r, Count<1>{});
}

template <class D, class T>
void decode_task(const AttentionArgs& a, int64_t task, float* memory) {
  using Q = typename D::Q;
  const DecodeTask t(a, task);
  const Sequence& q = t.q;
  const int64_t rows = t.rows, h = t.h, lo = t.lo, hi = t.hi;
  const int64_t q_ld = padded32(a.head_dim);
  State s;
  s.ld = kDecodeChunk;
  s.v_pad = padded32(a.v_dim);
  Q* queries = reinterpret_cast<Q*>(memory);
  s.scores = memory + kDecodeRows * q_ld;
  s.probabilities = s.scores + kDecodeRows * kDecodeChunk;
  s.out = s.probabilities + kDecodeRows * kDecodeChunk;
  s.max = s.out + kDecodeRows * s.v_pad;
  s.sum = s.max + kDecodeRows;
  t.start(queries, q_ld, s);

  const T* k = static_cast<const T*>(a.k.data) + h * a.k.head;
  const T* v = static_cast<const T*>(a.v.data) + h * a.v.head;
  const int64_t first = t.begin, count = max64(0, min64(hi, t.end) - first);
  // Scores of keys before lo are never looked at, but for those in lo's own vector.
  const int64_t from = max64(0, lo - first) / W * W;
  if (from < count) {
    int64_t offsets[kDecodeChunk];
    for (int64_t j = from; j < count; ++j) offsets[j] = key_offset(a, a.k, q, first + j);
    in_rows(rows, [&](int64_t r, auto n) {
      float* to = s.scores + r * s.ld + from;
      const Q* x = queries + r * q_ld;
#if defined(__AVX512BF16__)
      if constexpr (D::pairs && n.n == 4) {
        if (a.head_dim == 128)
          return decode_scores_of_4<4>(x, q_ld, k, offsets + from, count - from, to, s.ld);
        if (a.head_dim == 64)
          return decode_scores_of_4<2>(x, q_ld, k, offsets + from, count - from, to, s.ld);
      }
#endif
      decode_scores<D, T, n.n>(x, q_ld, k, offsets + from, a.head_dim, count - from, to, s.ld);
    });
    softmax_rows<Q>(a, s, rows, t.b, h, 0, first, count);
    Q* weights = reinterpret_cast<Q*>(s.probabilities);
    int n_seen = 0;
    if (lo <= first && !is_general(a)) {
      for (int64_t j = 0; j < count; ++j) offsets[j] = key_offset(a, a.v, q, first + j);
      n_seen = int(count);
    } else {
      // Keys that no row attends are not read: they may hold anything.
      for (int64_t j = from; j < count; ++j) {
        if (!is_seen(a, s, rows, lo - first, hi - first, j)) continue;
        for (int64_t r = 0; r < rows; ++r) weights[r * s.ld + n_seen] = weights[r * s.ld + j];
        offsets[n_seen++] = key_offset(a, a.v, q, first + j);
      }
    }
    if (n_seen % 2)  // the second of a pair
      for (int64_t r = 0; r < rows; ++r) weights[r * s.ld + n_seen] = from_float<Q>(0.0f);
    // Some keys at a time, whose rows stay in L1 until all columns of all queries are done.
    const int keys = D::pairs && a.v_dim <= 128 ? 64 : 16;
    for (int i = 0; i < n_seen; i += keys)
      in_rows(rows, [&](int64_t r, auto n) {
        const int some = int(min64(keys, n_seen - i));
        float* out = s.out + r * s.v_pad;
        if constexpr (D::pairs) {
#if defined(__AVX512BF16__)
          decode_value_pairs<n.n>(s.probabilities + (r * s.ld + i) / 2, s.ld, v, offsets + i, a.v_dim, some,
                                  out, s.v_pad);
#endif
        } else {
          decode_values<T, n.n>(s.probabilities + r * s.ld + i, s.ld, v, offsets + i, a.v_dim, some, out,
                                s.v_pad);
        }
      });
#if defined(__AVX512BF16__)
    if constexpr (D::pairs)
      for (int64_t r = 0; r < rows; ++r) in_order(s.out + r * s.v_pad, s.v_pad);
#endif
  }
  t.finish(s);
}

// One row of one KV head: its chunks' partial results, in ascending order.
void merge_task(const AttentionArgs& a, int64_t task, float* acc) {
  const int64_t slot = task / a.rows, r = task % a.rows, rows = a.rows;
  const int64_t b = slot / a.kv_heads;
  if (r >= a.sequences[b].q_count * (a.heads / a.kv_heads)) return;
  const int64_t v_pad = padded16(a.v_dim), size = v_pad + 2;
  const float unit = score_unit(a) * kLog2e;
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
    store(lanes, exp2(set1((p[0] - max) * unit)));
    sum += p[1] * lanes[0];
    for (int64_t d = 0; d < v_pad; d += W)
      store(acc + d, fma(load(p + 2 + d), set1(lanes[0]), load(acc + d)));
  }
  finish_row(a, b, slot % a.kv_heads, r, max, sum, acc);
}

}  // namespace

void TW_KERNEL(attention_decode)(const AttentionArgs& a, int64_t task, void* memory) {
  float* scratch = static_cast<float*>(memory);
#if defined(__AVX512BF16__)
  if (a.k.dtype == Storage::bf16) return decode_task<Paired, bf16>(a, task, scratch);
#endif
  with_storage(a.k.dtype, [&](auto t) { decode_task<Widened, decltype(t)>(a, task, scratch); });
}

void TW_KERNEL(attention_merge)(const AttentionArgs& a, int64_t task, void* memory) {
  merge_task(a, task, static_cast<float*>(memory));
}

}  // namespace tilewright
