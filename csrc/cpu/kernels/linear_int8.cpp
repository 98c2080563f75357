// Quantised linear with int8 activations.
//   dot[m][n]  = sum over 32 k of code_w[n][k] * code_x[m][k]            exact, int32
//   acc[m][n]  = fma(float(dot - zero * sum_x), s_w * s_x, acc)          k ascending, one accumulator
//   (minima)     acc = fma(float(dot), s_w * s_x, acc), then fma(min, float(sum_x) * s_x, acc)
// That formula and order hold for every M and every thread count, so an output's bits depend on its row of x
// and its row of w alone.
//
// M = 1 reads k*n*bits/8 bytes once and is bound by memory: codes are unpacked in registers. From kUnpackFrom
// rows on, a block's nibbles are unpacked once to bytes (32 * k, in L2) and an MR x 32 register tile passes
// over them: per 32 k, 16 * MR dot instructions and about 6 * MR for the scales.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"

namespace tilewright {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6;  // 12 dot and 12 float accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 2;  // 4 and 4 of 16
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kUnpackFrom = kRows + 1;

enum class Codes { nibbles, unpacked_nibbles, bytes };

template <Codes kind, int MR>
void tile(const LinearArgs& a, const Block& b, const uint8_t* codes, int pair, int64_t m, F acc[][2]) {
  using D = Dot<kind == Codes::bytes ? 8 : 4>;
  const int64_t k_blocks = a.w.k_blocks();
  const int8_t* x = a.codes + m * k_blocks * 32;
  const float* sx = a.scales + m * k_blocks;
  const int32_t* correction = a.corrections + m * k_blocks;
  const Offset offset = a.w.offset;
  F sum[MR][2];
  TW_UNROLL for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = zero();
  int64_t group = 0;
  int left_in_group = b.blocks_per_group;
  for (int64_t kb = 0; kb < k_blocks; ++kb) {
    typename D::Acc dot[MR][2];
    I start[MR][2];
    if (offset == Offset::none) {
      TW_UNROLL for (int i = 0; i < MR; ++i) start[i][0] = start[i][1] = iset1(correction[i * k_blocks + kb]);
    } else if (offset == Offset::zero) {
      const I z0 = b.zero_point(group, pair_row(pair, 0)), z1 = b.zero_point(group, pair_row(pair, 1));
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const I c = iset1(correction[i * k_blocks + kb]);
        start[i][0] = imul(z0, c);
        start[i][1] = imul(z1, c);
      }
    } else {
      TW_UNROLL for (int i = 0; i < MR; ++i) start[i][0] = start[i][1] = iset1(0);
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      dot[i][0] = D::start(start[i][0]);
      dot[i][1] = D::start(start[i][1]);
    }
    TW_UNROLL for (int step = 0; step < 8; ++step) {
      I w0, w1;
      if constexpr (kind == Codes::nibbles) {
        const I raw = iload(codes + (kb * 8 + step) * 64 + pair * W * 4);
        w0 = low_nibbles(raw);
        w1 = high_nibbles(raw);
      } else {
        w0 = iload(codes + (kb * 8 + step) * 128 + pair * W * 4);
        w1 = iload(codes + (kb * 8 + step) * 128 + 64 + pair * W * 4);
      }
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const int8_t* four = x + (i * k_blocks + kb) * 32 + step * 4;
        dot[i][0] = D::step(dot[i][0], w0, four);
        dot[i][1] = D::step(dot[i][1], w1, four);
      }
    }
    const F s0 = b.scale(group, pair_row(pair, 0)), s1 = b.scale(group, pair_row(pair, 1));
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      const F s = set1(sx[i * k_blocks + kb]);
      sum[i][0] = fma(to_float(D::finish(dot[i][0], start[i][0])), mul(s0, s), sum[i][0]);
      sum[i][1] = fma(to_float(D::finish(dot[i][1], start[i][1])), mul(s1, s), sum[i][1]);
    }
    if (offset == Offset::min) {
      const F m0 = b.minimum(group, pair_row(pair, 0)), m1 = b.minimum(group, pair_row(pair, 1));
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const F c = set1(bits_to_float(uint32_t(correction[i * k_blocks + kb])));
        sum[i][0] = fma(m0, c, sum[i][0]);
        sum[i][1] = fma(m1, c, sum[i][1]);
      }
    }
    if (--left_in_group == 0) {
      ++group;
      left_in_group = b.blocks_per_group;
    }
  }
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    acc[i][0] = sum[i][0];
    acc[i][1] = sum[i][1];
  }
}

template <Codes kind>
void all_rows(const LinearArgs& a, const Block& b, const uint8_t* codes, int64_t block, int64_t begin,
              int64_t end) {
  in_tiles<kRows>(begin, end, [&](int64_t m, auto rows) {
    for (int pair = 0; pair < kPairs; ++pair) {
      F acc[rows.n][2];
      tile<kind, rows.n>(a, b, codes, pair, m, acc);
      for (int i = 0; i < rows.n; ++i) {
        store_outputs(a, block, pair_row(pair, 0), m + i, acc[i][0]);
        store_outputs(a, block, pair_row(pair, 1), m + i, acc[i][1]);
      }
    }
  });
}

template <class T>
void quantise(const QuantiseArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row<const T>(a.x, r);
    int8_t* codes = a.codes + r * a.k_blocks * 32;
    float token_scale = 0.0f;
    // Two passes where one scale serves the row; the body of a block is the same.
    const auto amax_of = [&](int64_t kb, F v[32 / W]) {
      F m = zero();
      bool nan = false;
      TW_UNROLL for (int i = 0; i < 32 / W; ++i) {
        const int64_t at = kb * 32 + i * W, left = a.k - at;
        v[i] = left >= W ? load(x + at) : load(x + at, left > 0 ? int(left) : 0);
        m = max(m, abs(v[i]));
        nan |= any_nan(v[i]);
      }
      const float top = reduce_max(m);
      return nan || top > 3.4028234663852886e38f ? bits_to_float(0x7fc00000u) : top;
    };
    if (a.per_token) {
      float top = 0.0f;
      for (int64_t kb = 0; kb < a.k_blocks; ++kb) {
        F v[32 / W];
        const float t = amax_of(kb, v);
        top = t > top || t != t ? t : top;
        if (t != t) break;
      }
      token_scale = top / 127.0f;
    }
    for (int64_t kb = 0; kb < a.k_blocks; ++kb) {
      F v[32 / W];
      const float top = amax_of(kb, v);
      const float scale = a.per_token ? token_scale : top / 127.0f;
      int8_t* c = codes + kb * 32;
      if (!(scale > 0.0f)) {  // all zero, or NaN: the scale alone says which
        std::memset(c, 0, 32);
      } else {
        const F s = set1(scale);
        // The clamp acts only where scale is subnormal and |x| / scale rounds past 127.
        TW_UNROLL for (int i = 0; i < 32 / W; ++i)
            store_s8(c + i * W, max_propagate(min_propagate(div(v[i], s), set1(127.0f)), set1(-127.0f)));
      }
      int32_t sum = 0;
      for (int i = 0; i < 32; ++i) sum += c[i];
      a.scales[r * a.k_blocks + kb] = scale;
      a.corrections[r * a.k_blocks + kb] = a.offset == Offset::none ? -a.zero * sum
                                           : a.offset == Offset::zero
                                               ? -sum
                                               : int32_t(float_to_bits(float(sum) * scale));
    }
  }
}

}  // namespace

void TW_KERNEL(quantise_rows)(const QuantiseArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto t) { quantise<decltype(t)>(a, begin, end); });
}

void TW_KERNEL(linear_int8)(const LinearArgs& a, int64_t block, int64_t m_begin, int64_t m_end, void* panel) {
  const Block b(a.w, block);
  if (a.w.bits == 8) return all_rows<Codes::bytes>(a, b, b.codes, block, m_begin, m_end);
  if (m_end - m_begin < kUnpackFrom) return all_rows<Codes::nibbles>(a, b, b.codes, block, m_begin, m_end);
  auto* bytes = static_cast<uint8_t*>(panel);
  unpack_nibbles(b.codes, a.w.k_blocks(), bytes);
  all_rows<Codes::unpacked_nibbles>(a, b, bytes, block, m_begin, m_end);
}

}  // namespace tilewright
