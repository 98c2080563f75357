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
    const T* key[kKeys];
    TW_UNROLL for (int i = 0; i < kKeys; ++i) key[i] = k + offsets[min64(j + i, count - 1)];
    F acc[N * kKeys];
    TW_UNROLL for (int i = 0; i < N * kKeys; ++i) acc[i] = zero();
    const auto step = [&](int64_t at, int64_t left) {
      if constexpr (D::pairs) {
#if defined(__AVX512BF16__)
        __m512i x[kKeys];
        TW_UNROLL for (int i = 0; i < kKeys; ++i) x[i] = load_pairs(key[i] + at, left);
        TW_UNROLL for (int t = 0; t < N; ++t) {
          const __m512i row = _mm512_loadu_si512(q + t * q_ld + at);
          TW_UNROLL for (int i = 0; i < kKeys; ++i) acc[t * kKeys + i] =
              dot_pairs(x[i], row, acc[t * kKeys + i]);
        }
#endif
      } else {
        F x[kKeys];
        TW_UNROLL for (int i = 0; i < kKeys; ++i) x[i] =
            left >= W ? load(key[i] + at) : load(key[i] + at, int(left));
        TW_UNROLL for (int t = 0; t < N; ++t) {
          const F row = load(q + t * q_ld + at);
          TW_UNROLL for (int i = 0; i < kKeys; ++i) acc[t * kKeys + i] = fma(x[i], row, acc[t * kKeys + i]);
        }
      }
    };
    int64_t at = 0;
    for (; at + D::step <= d; at += D::step) step(at, D::step);
    if (at < d) step(at, d - at);
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
// The same for bf16 rows, two keys at a time; p is [N][ld / 2] pairs of keys, 0 beyond count.
template <int N>
void decode_value_pairs(const float* p, int64_t ld, const bf16* v, const int64_t* offsets, int64_t d,
                        int count, float* out, int64_t v_pad) {
  // Interleaving two rows of 32 values within lanes of 128 bits gives columns 0-3, 8-11, ... and 4-7, 12-15,
  // ...
  const __m512i to_low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i to_high = _mm512_add_epi32(to_low, _mm512_set1_epi32(4));
  const __m512i from_first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i from_last = _mm512_add_epi32(from_first, _mm512_set1_epi32(8));
  constexpr int kWide = 2;  // times 32 columns: N * 4 accumulators
  const auto columns = [&](int64_t at, auto wide) {
    constexpr int C = decltype(wide)::n;
    F acc[N][2 * C];
    TW_UNROLL for (int t = 0; t < N; ++t) {
      TW_UNROLL for (int c = 0; c < C; ++c) {
        const float* o = out + t * v_pad + at + c * 32;
        const int64_t left = v_pad - at - c * 32;
        const F a = left > 0 ? load(o) : zero(), b = left > 16 ? load(o + 16) : zero();
        acc[t][2 * c] = _mm512_permutex2var_ps(a, to_low, b);
        acc[t][2 * c + 1] = _mm512_permutex2var_ps(a, to_high, b);
      }
    }
    for (int i = 0; i < count; i += 2) {
      const bf16* row0 = v + offsets[i] + at;
      const bf16* row1 = i + 1 < count ? v + offsets[i + 1] + at : nullptr;
      TW_UNROLL for (int c = 0; c < C; ++c) {
        const int64_t left = max64(0, d - at - c * 32);
        const __m512i x = load_pairs(row0 + c * 32, left);
        const __m512i y = row1 ? load_pairs(row1 + c * 32, left) : _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
        TW_UNROLL for (int t = 0; t < N; ++t) {
          const __m512i weights = _mm512_castps_si512(set1(p[t * (ld / 2) + i / 2]));
          acc[t][2 * c] = dot_pairs(low, weights, acc[t][2 * c]);
          acc[t][2 * c + 1] = dot_pairs(high, weights, acc[t][2 * c + 1]);
        }
      }
    }
    TW_UNROLL for (int t = 0; t < N; ++t) {
      TW_UNROLL for (int c = 0; c < C; ++c) {
        float* o = out + t * v_pad + at + c * 32;
        const int64_t left = v_pad - at - c * 32;
        if (left > 0) store(o, _mm512_permutex2var_ps(acc[t][2 * c], from_first, acc[t][2 * c + 1]));
        if (left > 16) store(o + 16, _mm512_permutex2var_ps(acc[t][2 * c], from_last, acc[t][2 * c + 1]));
      }
    }
  };
  int64_t at = 0;
  for (; at + kWide * 32 <= d; at += kWide * 32) columns(at, Count<kWide>{});
  for (; at < d; at += 32) columns(at, Count<1>{});
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
  const int64_t q_ld = (a.head_dim + 31) / 32 * 32;
  State s;
  s.ld = kDecodeBlock;
  s.v_pad = padded16(a.v_dim);
  Q* queries = reinterpret_cast<Q*>(memory);
  s.scores = memory + kDecodeRows * q_ld;
  s.probabilities = s.scores + kDecodeRows * kDecodeBlock;
  s.out = s.probabilities + kDecodeRows * kDecodeBlock;
  s.max = s.out + kDecodeRows * s.v_pad;
  s.sum = s.max + kDecodeRows;
  t.start(queries, q_ld, s);

  const T* k = static_cast<const T*>(a.k.data) + h * a.k.head;
  const T* v = static_cast<const T*>(a.v.data) + h * a.v.head;
  for (int64_t first = t.begin; first < min64(hi, t.end); first += kDecodeBlock) {
    if (first + kDecodeBlock <= lo) continue;
    // Scores of keys before lo are never looked at, but for those in lo's own vector.
    const int64_t count = min64(min64(kDecodeBlock, hi - first), t.end - first);
    const int64_t from = max64(0, lo - first) / W * W;
    int64_t offsets[kDecodeBlock];
    for (int64_t j = from; j < count; ++j) offsets[j] = key_offset(a, a.k, q, first + j);
    in_rows(rows, [&](int64_t r, auto n) {
      decode_scores<D, T, n.n>(queries + r * q_ld, q_ld, k, offsets + from, a.head_dim, count - from,
                               s.scores + r * s.ld + from, s.ld);
    });
    softmax_rows<Q>(a, s, rows, t.b, h, 0, first, count);
    // Keys that no row attends are not read: they may hold anything.
    int seen[kDecodeBlock], n_seen = 0;
    for (int64_t j = 0; j < count; ++j)
      if (is_seen(a, s, rows, lo - first, hi - first, j)) seen[n_seen++] = int(j);
    for (int i = 0; i < n_seen; ++i) offsets[i] = key_offset(a, a.v, q, first + seen[i]);
    Q* weights = reinterpret_cast<Q*>(s.probabilities);
    if (n_seen < count || n_seen % 2) {
      for (int64_t r = 0; r < rows; ++r) {
        Q* row = weights + r * s.ld;
        for (int i = 0; i < n_seen; ++i) row[i] = row[seen[i]];
        if (n_seen % 2) row[n_seen] = from_float<Q>(0.0f);  // kDecodeBlock is even
      }
    }
    in_rows(rows, [&](int64_t r, auto n) {
      if constexpr (D::pairs) {
#if defined(__AVX512BF16__)
        decode_value_pairs<n.n>(s.probabilities + r * s.ld / 2, s.ld, v, offsets, a.v_dim, n_seen,
                                s.out + r * s.v_pad, s.v_pad);
#endif
      } else {
        decode_values<T, n.n>(s.probabilities + r * s.ld, s.ld, v, offsets, a.v_dim, n_seen,
                              s.out + r * s.v_pad, s.v_pad);
      }
    });
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
