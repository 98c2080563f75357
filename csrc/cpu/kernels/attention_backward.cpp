// Gradient of attention. With P the forward's weights (exp(score - lse)) and D their dropout:
//   dV = (P D)^T dO      dP = (dO V^T) D      dS = P (dP - delta), delta = sum(dO * out) - grad of the lse
//   dQ = dS' K           dK = dS'^T Q         dS' = dS * d score / d (q k^T)
// (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).
//
// A task is a KV head and every `splits`-th block of keys: it walks over the rows that see each block, keeps
// dK and dV of the block in fp32, and adds to its own fp32 dQ; the splits' dQ are added in order at the end.
// Five products a block, nothing shared between tasks: no atomics, and results that depend on shapes only.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_pack.h"

namespace tilewright {
namespace {

using Grad = AttentionGradArgs;

// One block of kGradRows folded rows. As [row][d] for products that broadcast rows, and interleaved for those
// that sum over rows; for floats both are the same memory.
template <class E>
struct RowBlock {
  float *q, *q_sum, *grad, *grad_sum;
  int64_t q_ld, grad_ld;  // of q and grad, in elements

  RowBlock(const Grad& g, int64_t index) {
    const int64_t q_pad = padded16(g.a.head_dim), v_pad = padded16(g.a.v_dim);
    q = g.rows + index * grad_rows_elements(q_pad, v_pad);
    grad = q + kGradRows * q_pad;
    q_ld = q_pad / E::depth, grad_ld = v_pad / E::depth;
    q_sum = E::depth == 1 ? q : q + kGradRows * q_ld;
    grad_sum = E::depth == 1 ? grad : grad + kGradRows * grad_ld;
  }
};
TW_INLINE int64_t row_block_index(const Grad& g, const Sequence& s, int64_t head, int64_t block) {
  return s.first_rows * g.a.kv_heads + head * s.row_blocks + block;
}

struct KeyBlock {
  float *k, *k_sum, *v;  // k and v transposed, and k interleaved

  KeyBlock(const Grad& g, int64_t index) {
    const int64_t q_pad = padded16(g.a.head_dim), v_pad = padded16(g.a.v_dim);
    k = g.keys + index * grad_keys_elements(q_pad, v_pad);
    k_sum = k + kKeyBlock * q_pad;
    v = k_sum + kKeyBlock * q_pad;
  }
};

// Where lse, delta and the like keep a row.
TW_INLINE int64_t statistic(const AttentionArgs& a, const Sequence& s, int64_t kv_head, int64_t row) {
  const int64_t group = a.heads / a.kv_heads, head = kv_head * group + row % group;
  return (s.q_batch * a.heads + head) * a.lse_rows + s.q_first + row / group;
}

template <class P, class T>
TW_INLINE void copy_row(const T* from, int64_t d, int64_t padded, P* to) {
  for (int64_t i = 0; i < padded; i += W) {
    const int64_t left = d - i;
    store(to + i, left >= W ? load(from + i) : load(from + i, left > 0 ? int(left) : 0));
  }
}

// q and grad_out as operands, and delta.
template <class E, class P>
void rows_task(const Grad& g, AttentionTask task) {
  const AttentionArgs& a = g.a;
  const Sequence& s = a.sequences[task.sequence];
  const int64_t group = a.heads / a.kv_heads, first = task.block * kGradRows;
  const int64_t rows = min64(kGradRows, s.q_count * group - first);
  const int64_t q_pad = padded16(a.head_dim), v_pad = padded16(a.v_dim);
  const RowBlock<E> block(g, row_block_index(g, s, task.head, task.block));
  int64_t q_offsets[kGradRows], grad_offsets[kGradRows];
  with_storage(a.q.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = 0; r < rows; ++r) {
      q_offsets[r] = r * q_pad, grad_offsets[r] = r * v_pad;
      copy_row(at<const T>(a, a.q, s, task.head, first + r), a.head_dim, q_pad,
               reinterpret_cast<P*>(block.q) + r * q_pad);
      const T* grad = at<const T>(a, g.grad_out, s, task.head, first + r);
      const T* out = at<const T>(a, a.out, s, task.head, first + r);
      copy_row(grad, a.v_dim, v_pad, reinterpret_cast<P*>(block.grad) + r * v_pad);
      F sum = zero();
      for (int64_t d = 0; d < a.v_dim; d += W) {
        const int n = int(min64(W, a.v_dim - d));
        sum =
            n == W ? fma(load(grad + d), load(out + d), sum) : fma(load(grad + d, n), load(out + d, n), sum);
      }
      const int64_t i = statistic(a, s, task.head, first + r);
      g.delta[i] = reduce_add(sum) - (g.grad_lse && a.lse[i] != kMinusInf ? g.grad_lse[i] : 0.0f);
    }
  });
  if constexpr (E::depth == 2) {
    pack_interleaved<E>(reinterpret_cast<const P*>(block.q), q_offsets, q_pad, q_pad, rows, block.q_sum,
                        kGradRows);
    pack_interleaved<E>(reinterpret_cast<const P*>(block.grad), grad_offsets, v_pad, v_pad, rows,
                        block.grad_sum, kGradRows);
  }
}

template <class E, class T>
void pack_task(const Grad& g, AttentionTask task) {
  const AttentionArgs& a = g.a;
  const Sequence& s = a.sequences[task.sequence];
  const int64_t first = s.k_begin + task.block * kKeyBlock;
  // Keys that no query can see stay unread: they may hold anything.
  const int64_t hi = visible_keys(a, s, s.q_count - 1).end, count = min64(kKeyBlock, hi - first);
  if (count <= 0) return;
  const int64_t index = packed_index(a, s, task.head, task.block), q_pad = padded16(a.head_dim);
  const KeyBlock block(g, index);
  int64_t offsets[kKeyBlock];
  const T* k = static_cast<const T*>(a.k.data) + task.head * a.k.head;
  for (int64_t j = 0; j < count; ++j) offsets[j] = key_offset(a, a.k, s, first + j);
  pack_transposed<E>(k, offsets, a.head_dim, count, block.k);
  g.k_not_finite[index] = pack_interleaved<E>(k, offsets, a.head_dim, q_pad, count, block.k_sum);
  for (int64_t j = 0; j < count; ++j) offsets[j] = key_offset(a, a.v, s, first + j);
  pack_transposed<E>(static_cast<const T*>(a.v.data) + task.head * a.v.head, offsets, a.v_dim, count,
                     block.v);
}

// A copy of an interleaved K block in which keys that none of the rows attends are zero: they may hold
// anything, and 0 * NaN must not reach dQ.
template <class E, class P>
const float* seen_keys(const Grad& g, const Sequence& s, int64_t b, int64_t kv_head, int64_t first_row,
                       int64_t rows, int64_t first, const float* k, float* copy) {
  const AttentionArgs& a = g.a;
  const int64_t group = a.heads / a.kv_heads, q_pad = padded16(a.head_dim);
  bool seen[kKeyBlock] = {};
  for (int64_t r = first_row; r < first_row + rows; ++r) {
    const Keys see = visible_keys(a, s, r / group);
    const ScoreRow line(a, s, b, kv_head * group + r % group, r / group);
    for (int64_t j = max64(0, see.begin - first); j < min64(kKeyBlock, see.end - first); ++j) {
      float scores[W];
      F slant;
      store(scores, line.scores(zero(), first + j, 1, slant));
      seen[j] |= scores[0] != kMinusInf;
    }
  }
  std::memcpy(copy, k, size_t(kKeyBlock / E::depth * q_pad) * 4);
  for (int64_t j = 0; j < kKeyBlock; ++j) {
    char* row = reinterpret_cast<char*>(copy + j / E::depth * q_pad) + (j % E::depth) * sizeof(P);
    for (int64_t d = 0; d < q_pad && !seen[j]; ++d) std::memset(row + d * 4, 0, sizeof(P));
  }
  return copy;
}

// One row: scores -> P D, grads -> dS', over the keys [from, width) of the block; outside [lo, hi) they are
// 0.
template <bool General>
TW_INLINE void score_row(const Grad& g, const Sequence& s, int64_t b, int64_t kv_head, int64_t row,
                         int64_t split, int64_t first, int64_t from, int64_t width, float* scores,
                         float* grads) {
  const AttentionArgs& a = g.a;
  const int64_t group = a.heads / a.kv_heads, query = row / group, head = kv_head * group + row % group;
  const Keys see = visible_keys(a, s, query);
  const int64_t lo = see.begin - first, hi = see.end - first, place = statistic(a, s, kv_head, row);
  const float lse = a.lse[place];
  if (lo >= width || hi <= from || lo >= hi || lse == kMinusInf) {
    for (int64_t j = from; j < width; j += W) {
      store(grads + j, zero());
      store(scores + j, zero());
    }
    return;
  }
  const ScoreRow line(a, s, b, head, query);
  const DropoutRow dropout = a.keep < 1.0f ? dropout_row(a.seed, b, head, query) : DropoutRow{};
  const F shift = set1(-lse), minus_inf = set1(kMinusInf), unit = set1(score_unit(a)), scale = set1(a.scale);
  const F grown = set1(a.keep > 0 ? 1.0f / a.keep : 0.0f);
  struct Weights {
    F p, dropped, grad, slant;
    F attended;  // finite scores: what is masked may have a NaN for its gradient
  };
  F total = set1(1.0f);
  const bool alone = lo >= 0 && hi <= kKeyBlock;  // all keys that the row sees are in this block
  const auto weights = [&](int64_t j) {
    Weights w;
    w.slant = set1(1.0f);
    F x = load(scores + j);
    if constexpr (General) x = line.scores(x, first + j, int(min64(W, s.k_end - first - j)), w.slant);
    if (j < lo) x = keep_below(minus_inf, x, j, lo);
    if (j + W > hi) x = keep_below(x, minus_inf, j, hi);
    w.p = exp(fma(x, unit, shift));
    if (alone) w.p = div(w.p, total);
    w.dropped = w.p;
    w.grad = load(grads + j);
    if (a.keep < 1.0f) {
      const int64_t key = first - s.k_begin + j;
      w.dropped = mul(drop(dropout, a.keep, key, w.p), grown);
      w.grad = mul(drop(dropout, a.keep, key, w.grad), grown);
    }
    w.attended = x;
    return w;
  };
  const auto or_zero = [](const Weights& w, F y) {
    return select_less(w.attended, set1(-3.4028234663852886e38f), zero(), y);
  };
  if (alone) {
    // The softmax anew and delta from it, not from lse and `out`: their rounding counts where few keys are
    // attended.
    F sum = zero();
    for (int64_t j = from; j < width; j += W) sum = add(sum, weights(j).p);
    float sink[W] = {};
    if (a.sinks) store(sink, exp(set1(a.sinks[head] - lse)));
    total = set1(reduce_add(sum) + sink[0]);
    sum = zero();
    for (int64_t j = from; j < width; j += W) {
      const Weights w = weights(j);
      sum = add(sum, or_zero(w, mul(w.p, w.grad)));
    }
    g.delta[place] = reduce_add(sum) - (g.grad_lse ? g.grad_lse[place] : 0.0f);
  }
  const F delta = set1(g.delta[place]);
  F slope_sum = zero();
  for (int64_t j = from; j < width; j += W) {
    const Weights w = weights(j);
    const F ds = or_zero(w, mul(w.p, sub(w.grad, delta)));
    store(scores + j, w.dropped);
    if constexpr (General) {
      if (g.grad_bias) {
        float* sum = g.grad_bias + b * g.bias_batch + head * g.bias_head + query * g.bias_row;
        const int n = int(min64(W, s.k_end - first - j));
        if (g.bias_key == 1) {
          float* to = sum + first + j;
          n == W ? store(to, add(load(to), ds)) : store(to, add(load(to, n), ds), n);
        } else {
          *sum += reduce_add(ds);
        }
      }
      if (g.slopes)
        slope_sum = fma(ds, abs(add(set1(float(first + j - line.diagonal)), lane_index())), slope_sum);
    }
    // Where K is masked, softcap's slant may be NaN too.
    store(grads + j, or_zero(w, mul(mul(ds, w.slant), scale)));
  }
  if constexpr (General) {
    if (g.slopes) g.slopes[split * g.lse_size + place] += reduce_add(slope_sum);
  }
}

#if defined(__AVX512BF16__)
TW_INLINE __m512i as_bf16(F x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
// [rows][n] floats -> [rows / 2][n] pairs of rows.
TW_INLINE void interleave_rows(const float* x, int64_t ld, int64_t rows, int64_t from, int64_t to,
                               float* out) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t j = from; j < to; j += W) {
      const __m512i low = as_bf16(load(x + r * ld + j));
      const __m512i high = r + 1 < rows ? as_bf16(load(x + (r + 1) * ld + j)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + r / 2 * ld + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
#endif

template <class E, class P>
void keys_task(const Grad& g, AttentionTask task, float* memory) {
  const AttentionArgs& a = g.a;
  const int64_t b = task.sequence, h = task.head, split = task.block;
  const Sequence& s = a.sequences[b];
  const int64_t group = a.heads / a.kv_heads, total = s.q_count * group;
  const int64_t q_pad = padded16(a.head_dim), v_pad = padded16(a.v_dim), depth = E::depth;
  float* scores = memory;
  float* grads = scores + kGradRows * kKeyBlock;
  float* weights_sum = grads + kGradRows * kKeyBlock;  // P D interleaved
  float* grads_sum = weights_sum + kGradRows * kKeyBlock / 2;
  float* grads_rows = grads_sum + kGradRows * kKeyBlock / 2;  // dS' as rows of elements
  float* grad_k = grads_rows + kGradRows * kKeyBlock;
  float* grad_v = grad_k + kKeyBlock * q_pad;
  float* k_copy = grad_v + kKeyBlock * v_pad;
  const bool general = is_general(a);

  float* partial_q =
      g.partial_q + (split * g.total_row_blocks + row_block_index(g, s, h, 0)) * kGradRows * q_pad;
  std::memset(partial_q, 0, size_t(s.row_blocks * kGradRows * q_pad) * 4);

  for (int64_t block = split; block < s.blocks; block += g.splits) {
    const int64_t first = s.k_begin + block * kKeyBlock, index = packed_index(a, s, h, block);
    const KeyBlock keys(g, index);
    std::memset(grad_k, 0, size_t(kKeyBlock * (q_pad + v_pad)) * 4);
    for (int64_t i = 0; i < s.row_blocks; ++i) {
      const int64_t first_row = i * kGradRows, rows = min64(kGradRows, total - first_row);
      const int64_t lo = visible_keys(a, s, first_row / group).begin - first;
      const int64_t hi = visible_keys(a, s, (first_row + rows - 1) / group).end - first;
      const int64_t from = max64(0, lo) / W * W, width = (min64(kKeyBlock, hi) + W - 1) / W * W;
      if (from >= width) continue;
      const RowBlock<E> row(g, row_block_index(g, s, h, i));
      const int64_t n = width - from;
      multiply<E>(rows, n, row.q, row.q_ld, keys.k + from, kKeyBlock, (a.head_dim + depth - 1) / depth,
                  scores + from, kKeyBlock, false);
      multiply<E>(rows, n, row.grad, row.grad_ld, keys.v + from, kKeyBlock, (a.v_dim + depth - 1) / depth,
                  grads + from, kKeyBlock, false);
      const float* k = keys.k_sum;
      if (g.k_not_finite[index]) k = seen_keys<E, P>(g, s, b, h, first_row, rows, first, k, k_copy);
      for (int64_t r = 0; r < rows; ++r) {
        if (general)
          score_row<true>(g, s, b, h, first_row + r, split, first, from, width, scores + r * kKeyBlock,
                          grads + r * kKeyBlock);
        else
          score_row<false>(g, s, b, h, first_row + r, split, first, from, width, scores + r * kKeyBlock,
                           grads + r * kKeyBlock);
      }
      const float *p = scores, *ds = grads, *ds_rows = grads;
      int64_t ds_ld = kKeyBlock;
#if defined(__AVX512BF16__)
      if constexpr (E::depth == 2) {
        interleave_rows(scores, kKeyBlock, rows, from, width, weights_sum);
        interleave_rows(grads, kKeyBlock, rows, from, width, grads_sum);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = from; j < width; j += W)
            store_operand(reinterpret_cast<P*>(grads_rows) + r * kKeyBlock + j,
                          load(grads + r * kKeyBlock + j));
        p = weights_sum, ds = grads_sum, ds_rows = grads_rows, ds_ld = kKeyBlock / 2;
      }
#endif
      const int64_t sum = (rows + depth - 1) / depth;
      multiply<E, true>(n, v_pad, p + from, kKeyBlock, row.grad_sum, v_pad, sum, grad_v + from * v_pad, v_pad,
                        true);
      multiply<E, true>(n, q_pad, ds + from, kKeyBlock, row.q_sum, q_pad, sum, grad_k + from * q_pad, q_pad,
                        true);
      multiply<E>(rows, q_pad, ds_rows + from / depth, ds_ld, k + from / depth * q_pad, q_pad, n / depth,
                  partial_q + first_row * q_pad, q_pad, true);
    }
    const int64_t count = min64(kKeyBlock, s.k_end - first);
    with_storage(a.k.dtype, [&](auto t) {
      using T = decltype(t);
      const auto put = [&](const AttentionTensor& to, const float* from, int64_t d, int64_t ld) {
        for (int64_t j = 0; j < count; ++j) {
          T* row = static_cast<T*>(to.data) + s.k_batch * to.batch + h * to.head + (first + j) * to.row;
          for (int64_t i = 0; i < d; i += W) {
            const int64_t left = d - i;
            left >= W ? store(row + i, load(from + j * ld + i))
                      : store(row + i, load(from + j * ld + i), int(left));
          }
        }
      };
      put(g.grad_k, grad_k, a.head_dim, q_pad);
      put(g.grad_v, grad_v, a.v_dim, v_pad);
    });
  }
}

// dQ: the splits' sums, in order.
void q_task(const Grad& g, AttentionTask task) {
  const AttentionArgs& a = g.a;
  const Sequence& s = a.sequences[task.sequence];
  const int64_t group = a.heads / a.kv_heads, first = task.block * kGradRows, q_pad = padded16(a.head_dim);
  const int64_t rows = min64(kGradRows, s.q_count * group - first);
  const int64_t stride = g.total_row_blocks * kGradRows * q_pad;
  const float* from = g.partial_q + row_block_index(g, s, task.head, task.block) * kGradRows * q_pad;
  with_storage(a.q.dtype, [&](auto t) {
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = at<decltype(t)>(a, g.grad_q, s, task.head, first + r);
      for (int64_t d = 0; d < a.head_dim; d += W) {
        F sum = load(from + r * q_pad + d);
        for (int64_t split = 1; split < g.splits; ++split)
          sum = add(sum, load(from + split * stride + r * q_pad + d));
        const int64_t left = a.head_dim - d;
        left >= W ? store(to + d, sum) : store(to + d, sum, int(left));
      }
    }
  });
}

}  // namespace

void TW_KERNEL(attention_grad_rows)(const AttentionGradArgs& g, int64_t task, void*) {
  with_operands(g.a.k.dtype,
                [&](auto e, auto p) { rows_task<decltype(e), decltype(p)>(g, g.a.tasks[task]); });
}

void TW_KERNEL(attention_grad_pack)(const AttentionGradArgs& g, int64_t task, void*) {
  with_operands(g.a.k.dtype, [&](auto e, auto) {
    using E = decltype(e);
    if constexpr (E::depth == 2)
      pack_task<E, bf16>(g, g.a.tasks[task]);
    else
      with_storage(g.a.k.dtype, [&](auto t) { pack_task<E, decltype(t)>(g, g.a.tasks[task]); });
  });
}

void TW_KERNEL(attention_grad_keys)(const AttentionGradArgs& g, int64_t task, void* memory) {
  with_operands(g.a.k.dtype, [&](auto e, auto p) {
    keys_task<decltype(e), decltype(p)>(g, g.a.tasks[task], static_cast<float*>(memory));
  });
}

void TW_KERNEL(attention_grad_q)(const AttentionGradArgs& g, int64_t task, void*) {
  q_task(g, g.a.tasks[task]);
}

}  // namespace tilewright
