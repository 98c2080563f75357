// out = act(gate) * up, element by element, arithmetic in fp32.
//   silu       x / (1 + exp(-x))
//   gelu       x * Phi(x), Phi the normal distribution function
//   gelu_tanh  x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the same as 0.5 x (1 + tanh(u))
// The caller has checked shapes and dtypes. Moves 3 values an element and does 15 to 35 flops on it: bound by
// memory from L3 on. Every element goes through the same operations wherever a range starts, so the bits do
// not depend on how the work is split.
#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

// Phi(-t) = exp(-t^2/2) P(z) / (t + 4) for t >= 0, z = (t - 4) / (t + 4): the quotient is smooth on the whole
// half line and both tails keep their relative precision. P is a least-squares fit, reweighted towards the
// minimax, to erfc evaluated at 40 digits; its relative error on t <= 14.5, where exp has long been 0, is
// 9e-9.
TW_INLINE F normal_tail(F t) {
  const F r = div(set1(1.0f), add(t, set1(4.0f)));
  const F z = fma(set1(-8.0f), r, set1(1.0f));
  F p = set1(-1.319716102e-4f);
  p = fma(p, z, set1(1.793512929e-4f));
  p = fma(p, z, set1(1.569919754e-3f));
  p = fma(p, z, set1(-3.512551310e-3f));
  p = fma(p, z, set1(-7.525268476e-3f));
  p = fma(p, z, set1(6.040383130e-2f));
  p = fma(p, z, set1(-1.865234375e-1f));
  p = fma(p, z, set1(3.871369064e-1f));
  p = fma(p, z, set1(-6.078965664e-1f));
  p = fma(p, z, set1(7.552851439e-1f));
  return mul(exp(mul(mul(t, t), set1(-0.5f))), mul(p, r));
}

template <Activation activation>
TW_INLINE F act(F x) {
  const F one = set1(1.0f);
  if constexpr (activation == Activation::silu) {
    return div(x, add(one, exp(sub(zero(), x))));
  } else if constexpr (activation == Activation::gelu) {
    const F tail = normal_tail(abs(x));
    return mul(x, select_less(x, zero(), tail, sub(one, tail)));
  } else {
    constexpr float k = 1.5957691216057308f;  // 2 sqrt(2/pi)
    const F u2 = mul(x, fma(mul(x, x), set1(k * 0.044715f), set1(k)));
    return div(x, add(one, exp(sub(zero(), u2))));
  }
}

template <class T, Activation activation>
void act_mul_range(const ActMulArgs& a, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t r = begin / a.n, first = begin % a.n;
    const int64_t n = a.n - first < end - begin ? a.n - first : end - begin;
    const T *gate = row<const T>(a.gate, r) + first, *up = row<const T>(a.up, r) + first;
    T* out = row<T>(a.out, r) + first;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, mul(act<activation>(load(gate + i)), load(up + i)));
    if (i < n) {
      const int c = int(n - i);
      store(out + i, mul(act<activation>(load(gate + i, c)), load(up + i, c)), c);
    }
    begin += n;
  }
}

}  // namespace

void TW_KERNEL(act_mul)(const ActMulArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto x) {
    using T = decltype(x);
    if (a.activation == Activation::silu) act_mul_range<T, Activation::silu>(a, begin, end);
    if (a.activation == Activation::gelu) act_mul_range<T, Activation::gelu>(a, begin, end);
    if (a.activation == Activation::gelu_tanh) act_mul_range<T, Activation::gelu_tanh>(a, begin, end);
  });
}

}  // namespace tilewright
