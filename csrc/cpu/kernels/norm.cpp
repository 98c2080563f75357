// RMS norm and layer norm over the last dimension, with an optional fused residual add.
//   s = x + residual (rounded to the storage dtype, as the unfused ops would)
//   y = (s - mean) * rsqrt(var + eps) * weight + bias; RMS norm has mean = 0, no bias
// The caller has checked shapes and dtypes. Moves 2 to 4 values an element and does about 5 flops on each,
// so it is bound by the cache it reads from; a row is read twice (three times when centred), from L1.
// Sums run in four fixed accumulators: the result depends on n alone.
#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

template <class Fn>
TW_INLINE float sum_over(int64_t n, Fn&& at) {
  F a0 = zero(), a1 = zero(), a2 = zero(), a3 = zero();
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a0 = add(a0, at(i, W));
    a1 = add(a1, at(i + W, W));
    a2 = add(a2, at(i + 2 * W, W));
    a3 = add(a3, at(i + 3 * W, W));
  }
  for (; i + W <= n; i += W) a0 = add(a0, at(i, W));
  if (i < n) a1 = add(a1, at(i, int(n - i)));
  return reduce_add(add(add(a0, a1), add(a2, a3)));
}

template <class T>
TW_INLINE F load_part(const T* p, int count) {
  return count == W ? load(p) : load(p, count);
}
template <class T>
TW_INLINE void store_part(T* p, F x, int count) {
  if (count == W)
    store(p, x);
  else
    store(p, x, count);
}

template <class T, class TWeight>
void norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const TWeight*>(a.weight);
  const auto* bias = static_cast<const TWeight*>(a.bias);
  const int64_t n = a.n;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row<const T>(a.x, r);
    if (a.residual.base) {
      const T* residual = row<const T>(a.residual, r);
      T* sum = row<T>(a.sum, r);
      for (int64_t i = 0; i < n; i += W) {
        const int c = n - i < W ? int(n - i) : W;
        store_part(sum + i, add(load_part(x + i, c), load_part(residual + i, c)), c);
      }
      x = sum;
    }
    float mean = 0.0f;
    if (a.centred) mean = sum_over(n, [&](int64_t i, int c) { return load_part(x + i, c); }) / float(n);
    const F m = set1(mean);
    const float squares = sum_over(n, [&](int64_t i, int c) {
      F v = sub(load_part(x + i, c), m);
      if (c < W) v = keep_below(v, zero(), 0, c);
      return mul(v, v);
    });
    const F scale = set1(1.0f / __builtin_sqrtf(squares / float(n) + a.eps));
    T* out = row<T>(a.out, r);
    for (int64_t i = 0; i < n; i += W) {
      const int c = n - i < W ? int(n - i) : W;
      F y = mul(sub(load_part(x + i, c), m), scale);
      if (weight) y = mul(y, load_part(weight + i, c));
      if (bias) y = add(y, load_part(bias + i, c));
      store_part(out + i, y, c);
    }
  }
}

}  // namespace

void TW_KERNEL(norm)(const NormArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto x) {
    with_storage(a.weight_dtype, [&](auto w) { norm_rows<decltype(x), decltype(w)>(a, begin, end); });
  });
}

}  // namespace tilewright
