// The register tile that attention's two products share, and the operand kinds it runs on.
//   C[MR][NV * W] (+)= A[MR][k] * B[k][NV * W]
// A and B are arrays of 4-byte elements: a float, or two consecutive bf16 of the reduction dimension (for
// vdpbf16ps). A's element is broadcast, B's row is loaded: no horizontal sums. A may lie transposed, [k][MR].
// At level amx the bf16 pairs meet in 2 x 2 AMX tiles of 16 rows x 16 columns instead.
#pragma once
#include "cpu/kernels/rows.h"
#include "cpu/simd.h"
#if defined(TW_TILES)
#include "cpu/amx.h"
#endif

namespace tilewright {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 accumulators, 4 operands
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#else
constexpr int kTileRows = 2, kTileVectors = 2;
#endif

struct NoRegisters {};

struct Fp32 {
  static constexpr int depth = 1;   // values of the reduction dimension in an element
  static constexpr int k_step = 1;  // elements of it that are multiplied at once: see multiply
  using Registers = NoRegisters;    // what a task holds while it multiplies
  static TW_INLINE F madd(const float* a, const float* b, F acc) { return fma(set1(*a), load(b), acc); }
};

#if defined(TW_TILES)
struct Bf16Pairs {
  static constexpr int depth = 2, k_step = kTileRowBytes / 4;
  using Registers = TileRegisters;
};
#elif defined(__AVX512BF16__)
struct Bf16Pairs {
  static constexpr int depth = 2, k_step = 1;
  using Registers = NoRegisters;
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
  // Sums of 128 terms, then the sum of those: the error grows with the number of terms in a row of additions.
  constexpr int64_t kTerms = 128;
  for (int64_t first = 0; first < k || first == 0; first += kTerms) {
    const int64_t end = k - first < kTerms ? k : first + kTerms;
    F acc[MR][NV];
    TW_UNROLL for (int i = 0; i < MR; ++i) { TW_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = zero(); }
    for (int64_t p = first; p < end; ++p) {
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        TW_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] =
            E::madd(Transposed ? a + p * lda + i : a + i * lda + p, b + p * ldb + j * W, acc[i][j]);
      }
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      TW_UNROLL for (int j = 0; j < NV; ++j) {
        float* to = c + i * ldc + j * W;
        store(to, accumulate || first > 0 ? add(load(to), acc[i][j]) : acc[i][j]);
      }
    }
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

// Elements that hold `values` of the reduction dimension, for multiply: zero beyond these in A and B.
template <class E>
TW_INLINE int64_t padded_k(int64_t values) {
  constexpr int64_t step = E::depth * E::k_step;
  return (values + step - 1) / step * E::k_step;
}

// C[m][n] (+)= A[m][k] * B[k][n]; n is a multiple of W, k comes from padded_k. Tiles also read A's and C's
// rows up to the next multiple of 16 and write C's: the memory must be there, what it holds reaches no other
// row. Transposed: A is given as [k][m].
template <class E, bool Transposed = false>
void multiply(int64_t m, int64_t n, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k,
              float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kTileVectors * W <= n; j += kTileVectors * W)
    tile_rows<E, Transposed, kTileVectors>(m, a, lda, b + j, ldb, k, c + j, ldc, accumulate);
  for (; j < n; j += W) tile_rows<E, Transposed, 1>(m, a, lda, b + j, ldb, k, c + j, ldc, accumulate);
}

#if defined(TW_TILES)
template <int MR, int NC>
void amx_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c, int64_t ldc,
               bool accumulate) {
  each_tile<MR, NC>([&](auto i, auto j) {
    constexpr int t = i.n * 2 + j.n;
    if (accumulate)
      tile_load<t>(c + i.n * kTileHeight * ldc + j.n * W, ldc * 4);
    else
      tile_zero<t>();
  });
  for (int64_t p = 0; p < k; p += Bf16Pairs::k_step) {
    tile_load<4>(a + p, lda * 4);
    if constexpr (MR > 1) tile_load<5>(a + kTileHeight * lda + p, lda * 4);
    tile_load<6>(b + p * ldb, ldb * 4);
    if constexpr (NC > 1) tile_load<7>(b + p * ldb + W, ldb * 4);
    each_tile<MR, NC>([](auto i, auto j) { tile_dot_bf16<i.n * 2 + j.n, 4 + i.n, 6 + j.n>(); });
  }
  each_tile<MR, NC>(
      [&](auto i, auto j) { tile_store<i.n * 2 + j.n>(c + i.n * kTileHeight * ldc + j.n * W, ldc * 4); });
}

template <>
inline void multiply<Bf16Pairs, false>(int64_t m, int64_t n, const float* a, int64_t lda, const float* b,
                                       int64_t ldb, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const auto columns = [&](int64_t j, auto nc) {
    int64_t i = 0;
    for (; i + kTileHeight < m; i += 2 * kTileHeight)
      amx_tiles<2, nc.n>(a + i * lda, lda, b + j, ldb, k, c + i * ldc + j, ldc, accumulate);
    if (i < m) amx_tiles<1, nc.n>(a + i * lda, lda, b + j, ldb, k, c + i * ldc + j, ldc, accumulate);
  };
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) columns(j, Count<2>{});
  if (j < n) columns(j, Count<1>{});
}
#endif

}  // namespace
}  // namespace tilewright
