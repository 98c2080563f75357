// The vector types that kernels are written in. A kernel source is compiled once per ISA level (see
// CMakeLists.txt); this header picks the widest types that the compiler flags of that level allow.
//
// Everything is in an anonymous namespace and no STL header is included: a shared inline compiled with
// AVX-512 could win at link time and crash an older CPU. CI checks the objects for weak symbols.
//
//   F   W floats                         I   W int32, lane by lane beside F
//   bf16, f16                            storage types; arithmetic is fp32
//   Dot<4|8>                             exact u8 x s8 dot products of 4 consecutive k per lane
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#if defined(__AMX_BF16__) || defined(TILEWRIGHT_EMULATE_AMX)
#define TW_TILES
#define TW_LEVEL amx
#elif defined(__AVX512BF16__)
#define TW_LEVEL avx512bf16
#else
#define TW_LEVEL avx512
#endif
#elif defined(__AVXVNNI__)
#define TW_LEVEL avxvnni
#elif defined(__AVX2__)
#define TW_LEVEL avx2
#else
#define TW_LEVEL scalar
#endif
#define TW_CONCAT_(a, b) a##_##b
#define TW_CONCAT(a, b) TW_CONCAT_(a, b)
// The exported name of a kernel: <op>_<isa>.
#define TW_KERNEL(op) TW_CONCAT(op, TW_LEVEL)

#define TW_INLINE inline __attribute__((always_inline))
#if defined(__AVX2__)
#define TW_UNROLL _Pragma("GCC unroll 32")
#else  // nothing to keep in registers, and minutes of compilation to save
#define TW_UNROLL
#endif

namespace tilewright {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

TW_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
TW_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

// Scalar conversions; f32 -> bf16 rounds half to even and keeps NaN a (quiet) NaN, as torch does.
TW_INLINE float to_float(float x) { return x; }
TW_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
TW_INLINE bf16 to_bf16(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

#if defined(__F16C__)
TW_INLINE float to_float(f16 x) { return _cvtsh_ss(x.bits); }
TW_INLINE f16 to_f16(float x) { return {uint16_t(_cvtss_sh(x, 0))}; }
#else
TW_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, e = (x.bits >> 10) & 31, m = x.bits & 0x3ff;
  if (e == 0) {  // zero and subnormals: m * 2^-24, exact in fp32
    const float f = float(m) * 5.9604644775390625e-8f;
    return bits_to_float(float_to_bits(f) | sign);
  }
  if (e == 31) return bits_to_float(sign | 0x7f800000u | (m << 13) | (m ? 0x400000u : 0));
  return bits_to_float(sign | ((e + 112) << 23) | (m << 13));
}
TW_INLINE f16 to_f16(float x) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {uint16_t(sign | 0x7e00 | ((a >> 13) & 0x3ff))};
  if (a >= 0x47800000u) return {uint16_t(sign | 0x7c00)};  // 65536 and more; 65520..65535 round up below
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal grid
    const float shifted = bits_to_float(a) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13))};
}
#endif

template <class T>
TW_INLINE T from_float(float x);
template <>
TW_INLINE float from_float<float>(float x) {
  return x;
}
template <>
TW_INLINE bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}
template <>
TW_INLINE f16 from_float<f16>(float x) {
  return to_f16(x);
}

}  // namespace
}  // namespace tilewright

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_scalar.h"
#endif

namespace tilewright {
namespace {

// exp(x) with a relative error below 4e-7: 2^n * p(r), r in [-ln2/2, ln2/2], p the minimax polynomial of
// Cephes' expf. Below -104 it gives 0, from 89 on inf, NaN stays NaN.
TW_INLINE F exp(F x) {
  const F clamped = min_propagate(max_propagate(x, set1(-104.0f)), set1(89.0f));
  const F n = round_even(mul(clamped, set1(1.44269504088896341f)));
  F r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale2(p, n);
}

// 2^x with a relative error below 3e-7 for x <= 0; 0 for -inf, NaN stays NaN.
TW_INLINE F exp2(F x) {
  const F clamped = max_propagate(x, set1(-160.0f));
  const F n = round_even(clamped), r = sub(clamped, n);
  F p = set1(1.535336188319500e-4f);
  p = fma(p, r, set1(1.339887440266574e-3f));
  p = fma(p, r, set1(9.618437357674640e-3f));
  p = fma(p, r, set1(5.550332471162809e-2f));
  p = fma(p, r, set1(2.402264791363012e-1f));
  p = fma(p, r, set1(6.931472028550421e-1f));
  p = fma(p, r, set1(1.0f));
  return scale2(p, n);
}

// fp8 e4m3 ("fn": no infinities, NaN is 0x7f and 0xff), a byte a lane.
TW_INLINE F e4m3_to_float(I a) {
  const F normal = as_float(iadd(ishl<20>(iand(a, iset1(0x7f))), iset1(120 << 23)));
  const F small = sub(add(normal, normal), set1(0x1p-6f));  // exponent 0 means m 2^-9, not 2^-7 (1 + m / 8)
  const F magnitude = select_less(normal, set1(0x1p-6f), small, normal);
  const F sign = as_float(ior(ishl<24>(iand(a, iset1(0x80))), iset1(0x3f800000)));  // 1 or -1
  return mul(sign, select_less(magnitude, set1(464.0f), magnitude, set1(bits_to_float(0x7fc00000u))));
}

}  // namespace
}  // namespace tilewright
