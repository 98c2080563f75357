// K, V and other rows as operands of attention's products. Included after cpu/simd.h.
#pragma once
#include "cpu/kernels/attention_rows.h"

namespace tilewright {
namespace {

// Packed blocks of a sequence stand together, head by head.
TW_INLINE int64_t packed_index(const AttentionArgs& a, const Sequence& q, int64_t head, int64_t block) {
  return q.first_block * a.kv_heads + head * q.blocks + block;
}

// [d / depth][kKeyBlock] elements of `count` rows, zero beyond: for products that sum over d.
template <class E, class T>
void pack_transposed(const T* k, const int64_t* offsets, int64_t d, int64_t count, float* out) {
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

// [block / depth][v_pad] elements of `count` rows, zero beyond: for products that sum over rows. Returns
// whether a value is NaN or infinite.
template <class E, class T>
bool pack_interleaved(const T* v, const int64_t* offsets, int64_t d, int64_t v_pad, int64_t count, float* out,
                      int64_t block = kKeyBlock) {
  bool bad = false;
  const auto value = [&](int64_t key, int64_t at) {
    const int64_t left = key < count ? d - at : 0;
    const T* p = left > 0 ? v + offsets[key] + at : v;
    return left >= W ? load(p) : load(p, left > 0 ? int(left) : 0);
  };
  for (int64_t key = 0; key < block; key += E::depth)
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

}  // namespace
}  // namespace tilewright
