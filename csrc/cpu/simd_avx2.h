// AVX2, FMA and F16C (and AVX-VNNI where enabled). Included by simd.h only.
#pragma once

namespace tilewright {
namespace {

constexpr int W = 8;
using F = __m256;
using I = __m256i;

TW_INLINE F set1(float x) { return _mm256_set1_ps(x); }
TW_INLINE F zero() { return _mm256_setzero_ps(); }
TW_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
TW_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
TW_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
TW_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
TW_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
TW_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
TW_INLINE F max_propagate(F a, F b) { return _mm256_max_ps(b, a); }
TW_INLINE F min_propagate(F a, F b) { return _mm256_min_ps(b, a); }
TW_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TW_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
TW_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
// a * 2^n in two steps, so that n down to -200 reaches 0 through the subnormals; NaN in a stays.
TW_INLINE F scale2(F a, F n) {
  const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const F first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const F second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, first), second);
}

TW_INLINE __m256i tail_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

TW_INLINE F widen(__m128i h, bf16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
TW_INLINE F widen(__m128i h, f16*) { return _mm256_cvtph_ps(h); }
TW_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
TW_INLINE F load(const bf16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), static_cast<bf16*>(nullptr));
}
TW_INLINE F load(const f16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), static_cast<f16*>(nullptr));
}
TW_INLINE F load(const float* p, int n) { return _mm256_maskload_ps(p, tail_mask(n)); }
template <class T>
TW_INLINE F load(const T* p, int n) {
  alignas(16) uint16_t buffer[8] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i].bits;
  return load(reinterpret_cast<const T*>(buffer));
}

TW_INLINE __m128i narrow(F x, bf16*) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  r = _mm256_srli_epi32(r, 16);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  return _mm256_castsi256_si128(r);
}
TW_INLINE __m128i narrow(F x, f16*) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
TW_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
template <class T>
TW_INLINE void store(T* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, static_cast<T*>(nullptr)));
}
TW_INLINE void store(float* p, F x, int n) { _mm256_maskstore_ps(p, tail_mask(n), x); }
template <class T>
TW_INLINE void store(T* p, F x, int n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow(x, static_cast<T*>(nullptr)));
  for (int i = 0; i < n; ++i) p[i].bits = buffer[i];
}

TW_INLINE float reduce_add(F a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
TW_INLINE float reduce_max(F a) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
TW_INLINE bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
TW_INLINE F keep_below(F a, F b, int64_t first, int64_t limit) {
  const int64_t n = limit - first;
  const int m = n >= 8 ? 8 : n <= 0 ? 0 : int(n);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(tail_mask(m)));
}
TW_INLINE F select_nonzero(const uint8_t* flags, int n, F a, F b) {
  uint64_t eight = 0;
  if (n >= 8) {
    std::memcpy(&eight, flags, 8);
  } else {
    for (int i = 0; i < n; ++i) eight |= uint64_t(flags[i]) << (8 * i);
  }
  const __m256i f = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(eight)));
  const __m256i off = _mm256_cmpeq_epi32(f, _mm256_setzero_si256());
  return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(off));
}
TW_INLINE F select_less(F a, F b, F yes, F no) {  // a < b ? yes : no
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
TW_INLINE bool any_not_finite(F a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(abs(a), _mm256_set1_ps(__builtin_inff()), _CMP_NLT_UQ)) != 0;
}
TW_INLINE void deinterleave(F a, F b, F& even, F& odd) {
  const F low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  even = _mm256_shuffle_ps(low, high, 0x88);
  odd = _mm256_shuffle_ps(low, high, 0xdd);
}
TW_INLINE void interleave(F even, F odd, F& a, F& b) {
  const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}
TW_INLINE F lane_index() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

// In-register 8 x 8 transpose of fp32.
TW_INLINE void transpose(F r[W]) {
  F t[8];
  TW_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  TW_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  TW_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  TW_UNROLL for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Lane i: the sum of the lanes of r[i], in a fixed order.
TW_INLINE F sum_lanes(const F r[W]) {
  const F a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const F b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// --- integers ---
TW_INLINE I iset1(int32_t x) { return _mm256_set1_epi32(x); }
TW_INLINE I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
TW_INLINE I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
TW_INLINE I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
template <int n>
TW_INLINE I ishr(I a) {  // zeros shifted in
  return _mm256_srli_epi32(a, n);
}
template <int n>
TW_INLINE I ishl(I a) {
  return _mm256_slli_epi32(a, n);
}
TW_INLINE I iand(I a, I b) { return _mm256_and_si256(a, b); }
TW_INLINE I ior(I a, I b) { return _mm256_or_si256(a, b); }
TW_INLINE F as_float(I a) { return _mm256_castsi256_ps(a); }
TW_INLINE I lane_number() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
TW_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
TW_INLINE I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TW_INLINE void istore(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
TW_INLINE I load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
TW_INLINE I load_s8(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
using Bytes16 = I;
TW_INLINE Bytes16 load_bytes16(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TW_INLINE I lookup_bytes(Bytes16 table, I a) { return _mm256_shuffle_epi8(table, a); }
struct Floats16 {
  __m256 low, high;
};
TW_INLINE Floats16 load_floats16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TW_INLINE F lookup(Floats16 table, I a) {  // bit 3 as the sign that blendv looks at
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, a), _mm256_permutevar8x32_ps(table.high, a),
                          _mm256_castsi256_ps(_mm256_slli_epi32(a, 28)));
}
TW_INLINE I in_register(I a) { return a; }
TW_INLINE I low_nibbles(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
TW_INLINE I high_nibbles(I a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
template <int k>
TW_INLINE I byte_of(I a) {
  return _mm256_and_si256(_mm256_srli_epi32(a, 8 * k), _mm256_set1_epi32(255));
}
TW_INLINE void store_s8(int8_t* p, F x) {
  const __m256i i = _mm256_cvtps_epi32(x);
  const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(w, w));
}

TW_INLINE I broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

#if defined(__AVXVNNI__)
template <int bits>
struct Dot {
  using Acc = I;
  static TW_INLINE Acc start(I init) { return init; }
  static TW_INLINE Acc step(Acc acc, I w, const int8_t* x) {
    return _mm256_dpbusd_avx_epi32(acc, w, broadcast4(x));
  }
  static TW_INLINE I finish(Acc acc, I) { return acc; }
};
#else
template <int bits>
struct Dot;

// u8 x s8 pairs may reach 2 * 255 * 128 and saturate vpmaddubsw, so the weights are split into even and odd
// bytes and multiplied as 16-bit integers.
template <>
struct Dot<8> {
  using Acc = I;
  static TW_INLINE Acc start(I init) { return init; }
  static TW_INLINE Acc step(Acc acc, I w, const int8_t* x) {
    const I v = broadcast4(x);
    const I x_even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), x_odd = _mm256_srai_epi16(v, 8);
    const I w_even = _mm256_and_si256(w, _mm256_set1_epi16(255)), w_odd = _mm256_srli_epi16(w, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w_even, x_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w_odd, x_odd));
  }
  static TW_INLINE I finish(Acc acc, I) { return acc; }
};

// u4 x s8: a step adds at most 2 * 15 * 127 = 3810 to a 16-bit lane, and a block of 32 k has 8 steps: 30480.
template <>
struct Dot<4> {
  using Acc = I;
  static TW_INLINE Acc start(I) { return _mm256_setzero_si256(); }
  static TW_INLINE Acc step(Acc acc, I w, const int8_t* x) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, broadcast4(x)));
  }
  static TW_INLINE I finish(Acc acc, I init) {
    return _mm256_add_epi32(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)), init);
  }
};
#endif

}  // namespace
}  // namespace tilewright
