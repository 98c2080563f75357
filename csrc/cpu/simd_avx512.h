// AVX-512 F, BW, DQ, VL, VNNI (and BF16 where enabled). Included by simd.h only.
#pragma once

namespace tilewright {
namespace {

constexpr int W = 16;
using F = __m512;
using I = __m512i;

TW_INLINE F set1(float x) { return _mm512_set1_ps(x); }
TW_INLINE F zero() { return _mm512_setzero_ps(); }
TW_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
TW_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
TW_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
TW_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
TW_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
TW_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
// max that gives NaN where a is NaN: vmaxps returns its second operand then.
TW_INLINE F max_propagate(F a, F b) { return _mm512_max_ps(b, a); }
TW_INLINE F min_propagate(F a, F b) { return _mm512_min_ps(b, a); }
TW_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TW_INLINE F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
TW_INLINE F abs(F a) { return _mm512_abs_ps(a); }
TW_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }

TW_INLINE __mmask16 tail_mask(int n) { return __mmask16((1u << n) - 1u); }

TW_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
TW_INLINE F load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
TW_INLINE F load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The first n lanes, 0 <= n <= W; the others are 0 and their memory is not touched.
TW_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(tail_mask(n), p); }
TW_INLINE F load(const bf16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(tail_mask(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
TW_INLINE F load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail_mask(n), p)); }

TW_INLINE __m256i pack_bf16(F x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), lsb);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
TW_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
TW_INLINE void store(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x)); }
TW_INLINE void store(f16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
TW_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, tail_mask(n), x); }
TW_INLINE void store(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, tail_mask(n), pack_bf16(x)); }
TW_INLINE void store(f16* p, F x, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// Horizontal sums in a fixed order.
TW_INLINE float reduce_add(F a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
TW_INLINE float reduce_max(F a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
TW_INLINE bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// Lanes i with first + i < limit keep a, the others become b.
TW_INLINE F keep_below(F a, F b, int64_t first, int64_t limit) {
  const int64_t n = limit - first;
  const __mmask16 m = n >= 16 ? 0xffff : n <= 0 ? 0 : tail_mask(int(n));
  return _mm512_mask_blend_ps(m, b, a);
}
TW_INLINE F select_nonzero(const uint8_t* flags, int n, F a, F b) {  // flags[i] ? a : b; unread lanes b
  const __m128i f = _mm_maskz_loadu_epi8(tail_mask(n), flags);
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(f, f), b, a);
}
TW_INLINE F select_less(F a, F b, F yes, F no) {  // a < b ? yes : no
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
TW_INLINE bool any_not_finite(F a) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ) != 0;
}
// a = x0 y0 x1 y1 ..., b = the W values after it <-> even = x0 x1 ..., odd = y0 y1 ...
TW_INLINE void deinterleave(F a, F b, F& even, F& odd) {
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, e, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(e, _mm512_set1_epi32(1)), b);
}
TW_INLINE void interleave(F even, F odd, F& a, F& b) {
  const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, i, odd);
  b = _mm512_permutex2var_ps(even, _mm512_add_epi32(i, _mm512_set1_epi32(8)), odd);
}
TW_INLINE F lane_index() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// In-register 16 x 16 transpose of fp32.
TW_INLINE void transpose(F r[W]) {
  F t[16];
  TW_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  TW_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  TW_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  TW_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Each lane of 128 bits: the sums of that lane of a, b, c and d.
TW_INLINE F sum_quarters(F a, F b, F c, F d) {
  const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
// Lanes of 128 bits: a's pairs added, then b's.
TW_INLINE F sum_halves(F a, F b) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
// Lane i: the sum of the lanes of r[i], in a fixed order.
TW_INLINE F sum_lanes(const F r[W]) {
  return sum_halves(
      sum_halves(sum_quarters(r[0], r[1], r[2], r[3]), sum_quarters(r[4], r[5], r[6], r[7])),
      sum_halves(sum_quarters(r[8], r[9], r[10], r[11]), sum_quarters(r[12], r[13], r[14], r[15])));
}

// --- integers ---
TW_INLINE I iset1(int32_t x) { return _mm512_set1_epi32(x); }
TW_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
TW_INLINE I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
TW_INLINE I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
template <int n>
TW_INLINE I ishr(I a) {  // zeros shifted in
  return _mm512_srli_epi32(a, n);
}
template <int n>
TW_INLINE I ishl(I a) {
  return _mm512_slli_epi32(a, n);
}
TW_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
TW_INLINE I ior(I a, I b) { return _mm512_or_si512(a, b); }
TW_INLINE F as_float(I a) { return _mm512_castsi512_ps(a); }
TW_INLINE I lane_number() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
TW_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
TW_INLINE I iload(const void* p) { return _mm512_loadu_si512(p); }
TW_INLINE void istore(void* p, I a) { _mm512_storeu_si512(p, a); }
TW_INLINE I load_u8(const uint8_t* p) {  // W bytes, zero-extended
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TW_INLINE I load_s8(const int8_t* p) {  // W bytes, sign-extended
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 16 bytes in every 128 bits, and for each byte of a, 0 to 15, the byte of that number.
using Bytes16 = I;
TW_INLINE Bytes16 load_bytes16(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TW_INLINE I lookup_bytes(Bytes16 table, I a) { return _mm512_shuffle_epi8(table, a); }
// 16 floats, and for each lane of a, 0 to 15, the float of that number.
using Floats16 = __m512;
TW_INLINE Floats16 load_floats16(const float* p) { return _mm512_loadu_ps(p); }
TW_INLINE F lookup(Floats16 table, I a) { return _mm512_permutexvar_ps(a, table); }
// gcc 12 puts a vector that two masks read on the stack, where it meets them as a memory operand.
TW_INLINE I in_register(I a) {
  asm("" : "+v"(a));
  return a;
}
TW_INLINE I low_nibbles(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
TW_INLINE I high_nibbles(I a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
template <int k>
TW_INLINE I byte_of(I a) {  // byte k of each lane, zero-extended
  return _mm512_and_si512(_mm512_srli_epi32(a, 8 * k), _mm512_set1_epi32(255));
}
TW_INLINE void store_s8(int8_t* p, F x) {  // round half to even; |x| <= 127
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

// init + dot(u8 w, s8 x), exact, over the 4 bytes of each lane and up to 8 steps; x is the same for all
// lanes. `init` is given to both start and finish: an accumulator that is not 32 bits wide adds it last.
template <int bits>
struct Dot {
  using Acc = I;
  static TW_INLINE Acc start(I init) { return init; }
  static TW_INLINE Acc step(Acc acc, I w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
  }
  static TW_INLINE I finish(Acc acc, I) { return acc; }
};

}  // namespace
}  // namespace tilewright
