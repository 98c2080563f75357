// Rotary position embedding of q and k, (batch, heads, seq, head_dim), by tables cos and sin.
//   half split:   y[i] = x[i] c - x[i+d/2] s,  y[i+d/2] = x[i+d/2] c + x[i] s
//   interleaved:  the same on the pairs (x[2i], x[2i+1]);  d = rotary_dim, channels from d on are copied
// The caller has checked shapes, dtypes and positions. Each product and each sum is rounded by itself, so
// that float32 results equal those of q * cos + rotate_half(q) * sin bit for bit. Moves every value once in
// and once out with 3 flops on it: bound by memory. Tokens go in blocks, heads outside, so that a block's
// table rows stay in L1 while the rows of one head stream. Works in place: a pair is read before it is
// written.
#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

constexpr int64_t kTokens = 16;  // table rows in flight: 16 x 2 x 64 floats are 8 KiB

struct Pair {
  F a, b;
};

TW_INLINE Pair rotate(Pair x, F c, F s) {
  return {sub(mul(x.a, c), mul(x.b, s)), add(mul(x.b, c), mul(x.a, s))};
}

template <class T>
TW_INLINE void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const Pair r = rotate({load(x + i), load(x + half + i)}, load(cos + i), load(sin + i));
    store(y + i, r.a);
    store(y + half + i, r.b);
  }
  if (i < half) {
    const int n = int(half - i);
    const Pair r = rotate({load(x + i, n), load(x + half + i, n)}, load(cos + i, n), load(sin + i, n));
    store(y + i, r.a, n);
    store(y + half + i, r.b, n);
  }
}

template <class T>
TW_INLINE void rotate_pairs(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  Pair p;
  for (; i + W <= half; i += W) {
    deinterleave(load(x + 2 * i), load(x + 2 * i + W), p.a, p.b);
    const Pair r = rotate(p, load(cos + i), load(sin + i));
    interleave(r.a, r.b, p.a, p.b);
    store(y + 2 * i, p.a);
    store(y + 2 * i + W, p.b);
  }
  if (i < half) {
    const int n = int(half - i), low = 2 * n < W ? 2 * n : W, high = 2 * n - low;
    deinterleave(load(x + 2 * i, low), load(x + 2 * i + low, high), p.a, p.b);
    const Pair r = rotate(p, load(cos + i, n), load(sin + i, n));
    interleave(r.a, r.b, p.a, p.b);
    store(y + 2 * i, p.a, low);
    store(y + 2 * i + low, p.b, high);
  }
}

template <class T>
void rope_tokens(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.rotary_dim / 2, rest = a.head_dim - a.rotary_dim;
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t last = first + kTokens < end ? first + kTokens : end;
    for (int which = 0; which < 2; ++which) {
      const HeadRows &in = a.in[which], &out = a.out[which];
      for (int64_t h = 0; h < in.heads; ++h) {
        for (int64_t token = first; token < last; ++token) {
          const int64_t b = token / a.seq, t = token % a.seq;
          const int64_t p =
              a.positions ? a.positions[b * a.positions_batch_stride + t * a.positions_seq_stride] : t;
          const float *cos = a.cos + p * a.cos_stride, *sin = a.sin + p * a.sin_stride;
          const T* x =
              static_cast<const T*>(in.base) + b * in.batch_stride + h * in.head_stride + t * in.seq_stride;
          T* y = static_cast<T*>(out.base) + b * out.batch_stride + h * out.head_stride + t * out.seq_stride;
          if (a.interleaved)
            rotate_pairs(x, y, cos, sin, half);
          else
            rotate_halves(x, y, cos, sin, half);
          if (rest > 0 && x != y)
            std::memcpy(y + a.rotary_dim, x + a.rotary_dim, static_cast<size_t>(rest) * sizeof(T));
        }
      }
    }
  }
}

}  // namespace

void TW_KERNEL(rope)(const RopeArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto x) { rope_tokens<decltype(x)>(a, begin, end); });
}

}  // namespace tilewright
