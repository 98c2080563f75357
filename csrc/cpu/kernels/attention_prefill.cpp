// Attention forward for many rows. K and V are packed once per KV head (K transposed) for the register tile;
// a task is kQueryRows rows against every key block that one of them can see: 4 * rows * keys * head_dim
// flops.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_rows.h"

namespace tilewright {
namespace {

// Packed blocks of a sequence stand together, head by head.
TW_INLINE int64_t packed_index(const AttentionArgs& a, const Sequence& q, int64_t head, int64_t block) {
  return q.first_block * a.kv_heads + head * q.blocks + block;
}

// [d / depth][kKeyBlock] elements of keys [first, first + count), zero elsewhere.
template <class E, class T>
void pack_k(const T* k, const int64_t* offsets, int64_t d, int64_t count, float* out) {
  const int64_t depth = E::depth, elements = padded_k<E>(d);
  for (int64_t key = 0; key < kKeyBlock; key += W) {
    for (int64_t e = 0; e < elements; e += W) {
      F block[W];
      for (int i = 0; i < W; ++i) {
        const int64_t left = key + i < count ? d - e * depth : 0;
        const T* p = left > 0 ? k + offsets[key + i] + e * depth : k;
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
bool pack_v(const T* v, const int64_t* offsets, int64_t d, int64_t v_pad, int64_t count, float* out) {
  bool bad = false;
  const auto value = [&](int64_t key, int64_t at) {
    const int64_t left = key < count ? d - at : 0;
    const T* p = left > 0 ? v + offsets[key] + at : v;
    return left >= W ? load(p) : load(p, left > 0 ? int(left) : 0);
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
void pack_task(const AttentionArgs& a, AttentionTask task) {
  const Sequence& q = a.sequences[task.sequence];
  const int64_t first = q.k_begin + task.block * kKeyBlock, count = min64(kKeyBlock, q.k_end - first);
  // Keys that no query can see stay unread: they may hold anything.
  const int64_t lo = visible_keys(a, q, 0).begin, hi = visible_keys(a, q, q.q_count - 1).end;
  const int64_t used = min64(count, hi - first), index = packed_index(a, q, task.head, task.block);
  if (used <= 0 || first + kKeyBlock <= lo) return;
  int64_t offsets[kKeyBlock];
  for (int64_t j = 0; j < used; ++j) offsets[j] = key_offset(a, a.k, q, first + j);
  pack_k<E>(static_cast<const T*>(a.k.data) + task.head * a.k.head, offsets, a.head_dim, used,
            static_cast<float*>(a.packed_k) + index * packed_block_elements(a.head_dim));
  for (int64_t j = 0; j < used; ++j) offsets[j] = key_offset(a, a.v, q, first + j);
  a.v_not_finite[index] =
      pack_v<E>(static_cast<const T*>(a.v.data) + task.head * a.v.head, offsets, a.v_dim, padded16(a.v_dim),
                used, static_cast<float*>(a.packed_v) + index * packed_block_elements(a.v_dim));
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

static_assert(kQueryRows % 16 == 0 && kKeyBlock % 32 == 0);  // whole tiles: see multiply

template <class E, class P>
void prefill_task(const AttentionArgs& a, AttentionTask task, float* memory) {
  const int64_t group = a.heads / a.kv_heads, b = task.sequence, h = task.head;
  const Sequence& sequence = a.sequences[b];
  const int64_t first_row = task.block * kQueryRows;
  const int64_t rows = min64(kQueryRows, sequence.q_count * group - first_row);
  const int64_t depth = E::depth, q_elements = padded_k<E>(a.head_dim), q_ld = padded16(a.head_dim);
  [[maybe_unused]] const typename E::Registers registers{};

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
      const auto* from = at<const decltype(t)>(a, a.q, sequence, h, first_row + r);
      P* to = reinterpret_cast<P*>(q + r * q_ld);
      for (int64_t d = 0; d < q_elements * depth; d += W) {
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

  const int64_t lo = visible_keys(a, sequence, first_row / group).begin;
  const int64_t hi = visible_keys(a, sequence, (first_row + rows - 1) / group).end;
  const int64_t begin = sequence.k_begin;
  for (int64_t block = (lo - begin) / kKeyBlock; begin + block * kKeyBlock < hi; ++block) {
    const int64_t first = begin + block * kKeyBlock, index = packed_index(a, sequence, h, block);
    const float* k = static_cast<const float*>(a.packed_k) + index * packed_block_elements(a.head_dim);
    const float* v = static_cast<const float*>(a.packed_v) + index * packed_block_elements(a.v_dim);
    // On the diagonal only the keys that some row sees are multiplied.
    const int64_t count = min64(kKeyBlock, hi - first), width = (count + W - 1) / W * W;
    multiply<E>(rows, width, q, q_ld, k, kKeyBlock, q_elements, s.scores, kKeyBlock, false);
    softmax_rows<P>(a, s, rows, b, h, first_row, first, count);
    if (a.v_not_finite[index]) v = without_unseen<E, P>(a, s, rows, lo - first, hi - first, v, v_copy);
    multiply<E>(rows, s.v_pad, s.probabilities, kKeyBlock / depth, v, s.v_pad, padded_k<E>(width), s.out,
                s.v_pad, true);
  }
  for (int64_t r = 0; r < rows; ++r)
    finish_row(a, b, h, first_row + r, s.max[r], s.sum[r], s.out + r * s.v_pad);
}

}  // namespace

void TW_KERNEL(attention_pack)(const AttentionArgs& a, int64_t task, void*) {
  with_operands(a.k.dtype, [&](auto e, auto) {
    using E = decltype(e);
    if constexpr (E::depth == 2)
      pack_task<E, bf16>(a, a.tasks[task]);
    else
      with_storage(a.k.dtype, [&](auto t) { pack_task<E, decltype(t)>(a, a.tasks[task]); });
  });
}

void TW_KERNEL(attention_prefill)(const AttentionArgs& a, int64_t task, void* memory) {
  with_operands(a.k.dtype, [&](auto e, auto p) {
    prefill_task<decltype(e), decltype(p)>(a, a.tasks[task], static_cast<float*>(memory));
  });
}

}  // namespace tilewright
