// The register tile that attention's two products share, and the operand kinds it runs on.
//   C[MR][NV * W] (+)= A[MR][k] * B[k][NV * W]
// A and B are arrays of 4-byte elements: a float, or two consecutive bf16 of the reduction dimension (for
// vdpbf16ps). A's element is broadcast, B's row is loaded: no horizontal sums. A may lie transposed, [k][MR].
#pragma once
#include "cpu/simd.h"

namespace tilewright {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 accumulators, 4 operands
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#else
constexpr int kTileRows = 2, kTileVectors = 2;
#endif

struct Fp32 {
  static constexpr int depth = 1;  // values of the reduction dimension in an element
  static TW_INLINE F madd(const float* a, const float* b, F acc) { return fma(set1(*a), load(b), acc); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  static constexpr int depth = 2;
  static TW_INLINE F madd(const float* a, const float* b, F acc) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(b), (__m512bh)_mm512_set1_epi32(pair));
  }
};
#endif

template <class E, bool Transposed, int MR, int NV>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c, int64_t ldc,
          bool accumulate) {
  F acc[MR][NV];
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    TW_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load(c + i * ldc + j * W) : zero();
  }
  for (int64_t p = 0; p < k; ++p) {
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      TW_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] =
          E::madd(Transposed ? a + p * lda + i : a + i * lda + p, b + p * ldb + j * W, acc[i][j]);
    }
  }
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    TW_UNROLL for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
  }
}

template <class E, bool Transposed, int NV>
void tile_rows(int64_t m, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c,
               int64_t ldc, bool accumulate) {
  const int64_t step = Transposed ? 1 : lda;
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    tile<E, Transposed, kTileRows, NV>(a + i * step, lda, b, ldb, k, c + i * ldc, ldc, accumulate);
  for (; i + 2 <= m; i += 2)
    tile<E, Transposed, 2, NV>(a + i * step, lda, b, ldb, k, c + i * ldc, ldc, accumulate);
  if (i < m) tile<E, Transposed, 1, NV>(a + i * step, lda, b, ldb, k, c + i * ldc, ldc, accumulate);
}

// C[m][n] (+)= A[m][k] * B[k][n]; n is a multiple of W. Transposed: A is given as [k][m].
template <class E, bool Transposed = false>
void multiply(int64_t m, int64_t n, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k,
              float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kTileVectors * W <= n; j += kTileVectors * W)
    tile_rows<E, Transposed, kTileVectors>(m, a, lda, b + j, ldb, k, c + j, ldc, accumulate);
  for (; j < n; j += W) tile_rows<E, Transposed, 1>(m, a, lda, b + j, ldb, k, c + j, ldc, accumulate);
}

}  // namespace
}  // namespace tilewright
