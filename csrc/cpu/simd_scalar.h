// Plain C++, for any x86-64 (the compiler may use SSE2). Included by simd.h only.
#pragma once

namespace tilewright {
namespace {

constexpr int W = 8;
struct F {
  float v[W];
};
struct I {
  int32_t v[W];
};

#define TW_LANES for (int i = 0; i < W; ++i)

TW_INLINE F set1(float x) {
  F r;
  TW_LANES r.v[i] = x;
  return r;
}
TW_INLINE F zero() { return set1(0.0f); }
TW_INLINE F add(F a, F b) {
  TW_LANES a.v[i] += b.v[i];
  return a;
}
TW_INLINE F sub(F a, F b) {
  TW_LANES a.v[i] -= b.v[i];
  return a;
}
TW_INLINE F mul(F a, F b) {
  TW_LANES a.v[i] *= b.v[i];
  return a;
}
TW_INLINE F div(F a, F b) {
  TW_LANES a.v[i] /= b.v[i];
  return a;
}
// Two roundings: the C library's fmaf is a call, and on a CPU without FMA a slow one.
TW_INLINE F fma(F a, F b, F c) {
  TW_LANES c.v[i] += a.v[i] * b.v[i];
  return c;
}
TW_INLINE F max(F a, F b) {
  TW_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
TW_INLINE F max_propagate(F a, F b) {
  TW_LANES a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
  return a;
}
TW_INLINE F min_propagate(F a, F b) {
  TW_LANES a.v[i] = b.v[i] < a.v[i] ? b.v[i] : a.v[i];
  return a;
}
TW_INLINE F round_even(F a) {  // |a| < 2^22: adding 1.5 * 2^23 leaves the integer in the mantissa
  TW_LANES a.v[i] = (a.v[i] + 12582912.0f) - 12582912.0f;
  return a;
}
TW_INLINE F abs(F a) {
  TW_LANES a.v[i] = __builtin_fabsf(a.v[i]);
  return a;
}
TW_INLINE F sqrt(F a) {
  TW_LANES a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
TW_INLINE F scale2(F a, F n) {
  TW_LANES {
    const int e = n.v[i] == n.v[i] ? int(n.v[i]) : 0, half = e >> 1;
    a.v[i] *= bits_to_float(uint32_t(half + 127) << 23);
    a.v[i] *= bits_to_float(uint32_t(e - half + 127) << 23);
  }
  return a;
}

template <class T>
TW_INLINE F load(const T* p) {
  F r;
  TW_LANES r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
TW_INLINE F load(const T* p, int n) {
  F r = zero();
  for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
TW_INLINE void store(T* p, F x) {
  TW_LANES p[i] = from_float<T>(x.v[i]);
}
template <class T>
TW_INLINE void store(T* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(x.v[i]);
}

TW_INLINE float reduce_add(F a) {
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return a.v[0];
}
TW_INLINE float reduce_max(F a) {
  float m = a.v[0];
  TW_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}
TW_INLINE bool any_nan(F a) {
  bool r = false;
  TW_LANES r |= a.v[i] != a.v[i];
  return r;
}
TW_INLINE F keep_below(F a, F b, int64_t first, int64_t limit) {
  TW_LANES a.v[i] = first + i < limit ? a.v[i] : b.v[i];
  return a;
}
TW_INLINE F select_nonzero(const uint8_t* flags, int n, F a, F b) {
  for (int i = 0; i < n; ++i) b.v[i] = flags[i] ? a.v[i] : b.v[i];
  return b;
}
TW_INLINE F select_less(F a, F b, F yes, F no) {  // a < b ? yes : no
  TW_LANES no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return no;
}
TW_INLINE bool any_not_finite(F a) {
  bool r = false;
  TW_LANES r |= !(__builtin_fabsf(a.v[i]) < __builtin_inff());
  return r;
}
TW_INLINE void deinterleave(F a, F b, F& even, F& odd) {
  for (int i = 0; i < W / 2; ++i) {
    even.v[i] = a.v[2 * i], odd.v[i] = a.v[2 * i + 1];
    even.v[W / 2 + i] = b.v[2 * i], odd.v[W / 2 + i] = b.v[2 * i + 1];
  }
}
TW_INLINE void interleave(F even, F odd, F& a, F& b) {
  for (int i = 0; i < W / 2; ++i) {
    a.v[2 * i] = even.v[i], a.v[2 * i + 1] = odd.v[i];
    b.v[2 * i] = even.v[W / 2 + i], b.v[2 * i + 1] = odd.v[W / 2 + i];
  }
}
TW_INLINE F lane_index() {
  F r;
  TW_LANES r.v[i] = float(i);
  return r;
}
TW_INLINE void transpose(F r[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = i + 1; j < W; ++j) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

TW_INLINE F sum_lanes(const F r[W]) {  // lane i: the sum of the lanes of r[i]
  F sums;
  TW_LANES sums.v[i] = reduce_add(r[i]);
  return sums;
}

// --- integers ---
TW_INLINE I iset1(int32_t x) {
  I r;
  TW_LANES r.v[i] = x;
  return r;
}
TW_INLINE I iadd(I a, I b) {
  TW_LANES a.v[i] = int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i]));
  return a;
}
TW_INLINE I imul(I a, I b) {
  TW_LANES a.v[i] = int32_t(uint32_t(a.v[i]) * uint32_t(b.v[i]));
  return a;
}
TW_INLINE I ixor(I a, I b) {
  TW_LANES a.v[i] ^= b.v[i];
  return a;
}
template <int n>
TW_INLINE I ishr(I a) {
  TW_LANES a.v[i] = int32_t(uint32_t(a.v[i]) >> n);
  return a;
}
template <int n>
TW_INLINE I ishl(I a) {
  TW_LANES a.v[i] = int32_t(uint32_t(a.v[i]) << n);
  return a;
}
TW_INLINE I iand(I a, I b) {
  TW_LANES a.v[i] &= b.v[i];
  return a;
}
TW_INLINE I ior(I a, I b) {
  TW_LANES a.v[i] |= b.v[i];
  return a;
}
TW_INLINE F as_float(I a) {
  F r;
  TW_LANES r.v[i] = bits_to_float(uint32_t(a.v[i]));
  return r;
}
TW_INLINE I lane_number() {
  I r;
  TW_LANES r.v[i] = i;
  return r;
}
TW_INLINE F to_float(I a) {
  F r;
  TW_LANES r.v[i] = float(a.v[i]);
  return r;
}
TW_INLINE I iload(const void* p) {
  I r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
TW_INLINE void istore(void* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
TW_INLINE I load_u8(const uint8_t* p) {
  I r;
  TW_LANES r.v[i] = p[i];
  return r;
}
TW_INLINE I load_s8(const int8_t* p) {
  I r;
  TW_LANES r.v[i] = p[i];
  return r;
}
using Bytes16 = const uint8_t*;
TW_INLINE Bytes16 load_bytes16(const uint8_t* p) { return p; }
TW_INLINE I lookup_bytes(Bytes16 table, I a) {
  TW_LANES {
    const uint32_t u = uint32_t(a.v[i]);
    a.v[i] = int32_t(table[u & 15] | uint32_t(table[(u >> 8) & 15]) << 8 |
                     uint32_t(table[(u >> 16) & 15]) << 16 | uint32_t(table[(u >> 24) & 15]) << 24);
  }
  return a;
}
using Floats16 = const float*;
TW_INLINE Floats16 load_floats16(const float* p) { return p; }
TW_INLINE F lookup(Floats16 table, I a) {
  F r;
  TW_LANES r.v[i] = table[a.v[i] & 15];
  return r;
}
TW_INLINE I in_register(I a) { return a; }
TW_INLINE I low_nibbles(I a) {
  TW_LANES a.v[i] &= 0x0f0f0f0f;
  return a;
}
TW_INLINE I high_nibbles(I a) {
  TW_LANES a.v[i] = int32_t((uint32_t(a.v[i]) >> 4) & 0x0f0f0f0fu);
  return a;
}
template <int k>
TW_INLINE I byte_of(I a) {
  TW_LANES a.v[i] = int32_t((uint32_t(a.v[i]) >> (8 * k)) & 255u);
  return a;
}
TW_INLINE void store_s8(int8_t* p, F x) {
  x = round_even(x);
  TW_LANES p[i] = int8_t(x.v[i]);
}

template <int bits>
struct Dot {
  using Acc = I;
  static TW_INLINE Acc start(I init) { return init; }
  static TW_INLINE Acc step(Acc acc, I w, const int8_t* x) {
    TW_LANES {
      const uint32_t u = uint32_t(w.v[i]);
      acc.v[i] += int(u & 255) * x[0] + int((u >> 8) & 255) * x[1] + int((u >> 16) & 255) * x[2] +
                  int(u >> 24) * x[3];
    }
    return acc;
  }
  static TW_INLINE I finish(Acc acc, I) { return acc; }
};

#undef TW_LANES

}  // namespace
}  // namespace tilewright
