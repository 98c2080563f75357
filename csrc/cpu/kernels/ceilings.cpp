// What one thread of this machine can do at most, as a level's instructions allow: the denominators of the
// benches' percentages.
//   fp32   independent multiply-adds            bf16   dot products of bf16 pairs (without them: fp32's loop)
//   int8   u8 x s8 dot products, as the integer kernels make them (on AVX2 in 16-bit halves)
//   read   sums of a buffer's bytes
// The arithmetic loops touch no memory, so only the issue rate of their unit limits them; `keep` hides values
// from the compiler, which would otherwise hoist what repeats. Operands are chosen so that nothing overflows
// or becomes denormal, however long a loop runs.
#include "cpu/simd.h"
//
#include "cpu/kernels.h"

namespace tilewright {
namespace {

constexpr int kAccumulators = 12;  // vdpbf16ps has the longest queue: 6 cycles, 2 a cycle
constexpr int kStreams = 4;  // a Zen 4 core reads 10% to 15% more from four places at once than from one

// F, or what plain C++ has at most: SSE's registers, where gcc would keep an F in memory.
#if defined(__AVX2__)
using Floats = F;
TW_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return fma(a, b, c); }
#else
typedef float Floats __attribute__((vector_size(16)));
TW_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

template <class T>
TW_INLINE void keep(T& x) {
#if defined(__AVX512F__)
  __asm__ volatile("" : "+v"(x));
#elif defined(__AVX2__)
  __asm__ volatile("" : "+x"(x));
#else
  __asm__ volatile("" : "+m"(x));
#endif
}

template <class T, class Step>
TW_INLINE void repeat(int64_t iterations, T start, Step&& step) {
  T acc[kAccumulators];
  TW_UNROLL for (int i = 0; i < kAccumulators; ++i) {
    acc[i] = start;
    keep(acc[i]);
  }
  for (int64_t n = 0; n < iterations; ++n) TW_UNROLL for (int i = 0; i < kAccumulators; ++i) step(acc[i]);
  TW_UNROLL for (int i = 0; i < kAccumulators; ++i) keep(acc[i]);
}

}  // namespace

void TW_KERNEL(ceiling_fp32)(int64_t iterations, double& operations) {
  Floats a = Floats{} + 0.5f, b = a, one = Floats{} + 1.0f;  // x = x/2 + 1/2 stays at 1
  keep(a);
  keep(b);
  repeat(iterations, one, [&](Floats& x) { x = multiply_add(x, a, b); });
  operations = double(iterations) * kAccumulators * (sizeof(Floats) / 4) * 2;
}

void TW_KERNEL(ceiling_bf16)(int64_t iterations, double& operations) {
#if defined(__AVX512BF16__)
  I a = iset1(0x3f803f80), b = iset1(int32_t(0xbf803f80u));  // 1 * 1 + 1 * -1
  keep(a);
  keep(b);
  repeat(iterations, zero(), [&](F& x) { x = _mm512_dpbf16_ps(x, (__m512bh)a, (__m512bh)b); });
  operations = double(iterations) * kAccumulators * W * 4;
#else
  TW_KERNEL(ceiling_fp32)(iterations, operations);
#endif
}

void TW_KERNEL(ceiling_int8)(int64_t iterations, double& operations) {
  I w = iset1(0x01010101);
  const int8_t x[4] = {1, -1, 1, -1};
  keep(w);
  repeat(iterations, Dot<8>::start(iset1(0)), [&](Dot<8>::Acc& acc) {
#if !defined(__AVX512F__) && !defined(__AVXVNNI__)
    keep(w);  // one instruction elsewhere; here several, of which equal ones would be shared
#endif
    acc = Dot<8>::step(acc, w, x);
  });
  operations = double(iterations) * kAccumulators * W * 8;
}

// bytes: a multiple of 1024.
void TW_KERNEL(ceiling_read)(const uint8_t* data, int64_t bytes, int64_t passes) {
  constexpr int64_t kVector = 4 * W;
  const int64_t part = bytes / kStreams;
  I acc[kStreams];
  TW_UNROLL for (int s = 0; s < kStreams; ++s) acc[s] = iset1(0);
  for (int64_t pass = 0; pass < passes; ++pass)
    for (int64_t at = 0; at < part; at += 2 * kVector) TW_UNROLL for (int s = 0; s < kStreams; ++s) {
        const uint8_t* p = data + s * part + at;
        acc[s] = iadd(iadd(acc[s], iload(p)), iload(p + kVector));
      }
  TW_UNROLL for (int s = 0; s < kStreams; ++s) keep(acc[s]);
}

}  // namespace tilewright
