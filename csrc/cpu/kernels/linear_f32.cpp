// Quantised linear with fp32 arithmetic: activations fp32, or rounded to bf16 beforehand.
//   dot[m][n] = sum over 32 k of code * x          codes as floats; 8-bit ones with the zero point subtracted
//   dot       = dot - zero * sum(x)                4-bit codes; at most 15, so little is lost to cancellation
//   acc[m][n] = fma(dot, s_w, acc), with minima then fma(min, sum(x), acc); k ascending
// The order is the same for every M. Few rows decode codes in registers, 4 instructions for W weights; from
// kPanelFrom rows on, kPanelBlocks * 32 columns are decoded once into a panel (16 KiB, in L1) that all row
// tiles use.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"

namespace tilewright {
namespace {

constexpr int kPanelBlocks = 4;  // of 32 columns
#if defined(__AVX512F__)
constexpr int kRows = 6;  // 12 dot and 12 total accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 3;  // 6 and 6 of 16
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kPanelFrom = kRows + 1;

enum class Codes { nibbles, bytes, panel };

// Column k of 4 for the pair's low and high rows.
template <Codes kind, int k>
TW_INLINE void column(I low, I high, const F zeros[2], F out[2]) {
  if constexpr (kind == Codes::nibbles) {
    out[0] = to_float(byte_of<k>(low));
    out[1] = to_float(byte_of<k>(high));
  } else {
    out[0] = sub(to_float(byte_of<k>(low)), zeros[0]);
    out[1] = sub(to_float(byte_of<k>(high)), zeros[1]);
  }
}

// The 4 columns of a step: codes -> out[k][half].
template <Codes kind>
TW_INLINE void decode_step(const uint8_t* codes, int64_t step, int pair, const F zeros[2], F out[4][2]) {
  I low, high;
  if constexpr (kind == Codes::nibbles) {
    const I raw = iload(codes + step * 64 + pair * W * 4);
    low = low_nibbles(raw);
    high = high_nibbles(raw);
  } else {
    low = iload(codes + step * 128 + pair * W * 4);
    high = iload(codes + step * 128 + 64 + pair * W * 4);
  }
  column<kind, 0>(low, high, zeros, out[0]);
  column<kind, 1>(low, high, zeros, out[1]);
  column<kind, 2>(low, high, zeros, out[2]);
  column<kind, 3>(low, high, zeros, out[3]);
}

// The zero points of a pair of vectors, as floats: implicit, or per row; 0 with minima.
TW_INLINE void zero_points(const Block& b, const PackedWeight& w, int64_t group, int pair, F out[2]) {
  TW_UNROLL for (int half = 0; half < 2; ++half) {
    if (w.offset == Offset::zero)
      out[half] = to_float(b.zero_point(group, pair_row(pair, half)));
    else
      out[half] = set1(w.offset == Offset::none ? float(1 << (w.bits - 1)) : 0.0f);
  }
}

// Adds columns [first * 32, last * 32) of x times the block to totals, [MR][32].
template <Codes kind, int MR>
void tile(const LinearArgs& a, const Block& b, const float* panel, int64_t m, int64_t first, int64_t last,
          float* totals) {
  const int64_t k_blocks = a.w.k_blocks();
  const float* x = static_cast<const float*>(a.x) + m * k_blocks * 32;
  const float* sums = a.sums + m * k_blocks;
  const bool correct = a.w.bits == 4 && a.w.offset != Offset::min;
  for (int pair = 0; pair < kPairs; ++pair) {
    const int r0 = pair_row(pair, 0), r1 = pair_row(pair, 1);
    F total[MR][2];
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      total[i][0] = load(totals + i * 32 + r0);
      total[i][1] = load(totals + i * 32 + r1);
    }
    for (int64_t kb = first; kb < last; ++kb) {
      const int64_t group = kb / b.blocks_per_group;
      F zeros[2];
      zero_points(b, a.w, group, pair, zeros);
      F dot[MR][2];
      TW_UNROLL for (int i = 0; i < MR; ++i) dot[i][0] = dot[i][1] = zero();
      for (int64_t step = 0; step < 8; ++step) {
        F w[4][2];
        if constexpr (kind == Codes::panel) {
          const float* p = panel + ((kb - first) * 8 + step) * 128;
          TW_UNROLL for (int k = 0; k < 4; ++k) {
            w[k][0] = load(p + k * 32 + r0);
            w[k][1] = load(p + k * 32 + r1);
          }
        } else {
          decode_step<kind>(b.codes, kb * 8 + step, pair, zeros, w);
        }
        TW_UNROLL for (int k = 0; k < 4; ++k) {
          TW_UNROLL for (int i = 0; i < MR; ++i) {
            const F v = set1(x[(i * k_blocks + kb) * 32 + step * 4 + k]);
            dot[i][0] = fma(v, w[k][0], dot[i][0]);
            dot[i][1] = fma(v, w[k][1], dot[i][1]);
          }
        }
      }
      const F s0 = b.scale(group, r0), s1 = b.scale(group, r1);
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        if (correct) {
          const F minus_sum = set1(-sums[i * k_blocks + kb]);
          dot[i][0] = fma(zeros[0], minus_sum, dot[i][0]);
          dot[i][1] = fma(zeros[1], minus_sum, dot[i][1]);
        }
        total[i][0] = fma(dot[i][0], s0, total[i][0]);
        total[i][1] = fma(dot[i][1], s1, total[i][1]);
      }
      if (a.w.offset == Offset::min) {
        const F m0 = b.minimum(group, r0), m1 = b.minimum(group, r1);
        TW_UNROLL for (int i = 0; i < MR; ++i) {
          const F s = set1(sums[i * k_blocks + kb]);
          total[i][0] = fma(m0, s, total[i][0]);
          total[i][1] = fma(m1, s, total[i][1]);
        }
      }
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      store(totals + i * 32 + r0, total[i][0]);
      store(totals + i * 32 + r1, total[i][1]);
    }
  }
}

template <Codes kind>
void fill_panel(const LinearArgs& a, const Block& b, int64_t first, int64_t last, float* panel) {
  for (int64_t kb = first; kb < last; ++kb)
    for (int pair = 0; pair < kPairs; ++pair) {
      F zeros[2];
      zero_points(b, a.w, kb / b.blocks_per_group, pair, zeros);
      for (int64_t step = 0; step < 8; ++step) {
        F w[4][2];
        decode_step<kind>(b.codes, kb * 8 + step, pair, zeros, w);
        float* p = panel + ((kb - first) * 8 + step) * 128;
        TW_UNROLL for (int k = 0; k < 4; ++k) {
          store(p + k * 32 + pair_row(pair, 0), w[k][0]);
          store(p + k * 32 + pair_row(pair, 1), w[k][1]);
        }
      }
    }
}

}  // namespace

void TW_KERNEL(prepare_f32)(const PrepareArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<const T>(a.x, r);
      float* out = static_cast<float*>(a.out) + r * a.k_blocks * 32;
      for (int64_t kb = 0; kb < a.k_blocks; ++kb, out += 32) {
        F sum = zero();
        for (int i = 0; i < 32; i += W) {
          const int64_t left = a.k - kb * 32 - i;
          const T* from = x + kb * 32 + i;
          F v = left >= W ? load(from) : load(from, left > 0 ? int(left) : 0);
          if (a.round_bf16) {
            bf16 rounded[W];
            store(rounded, v);
            v = load(rounded);
          }
          store(out + i, v);
          sum = add(sum, v);
        }
        a.sums[r * a.k_blocks + kb] = reduce_add(sum);
      }
    }
  });
}

void TW_KERNEL(linear_f32)(const LinearArgs& a, int64_t block, int64_t m_begin, int64_t m_end, void* panel) {
  const Block b(a.w, block);
  const int64_t k_blocks = a.w.k_blocks(), m_count = m_end - m_begin;
  float* weights = static_cast<float*>(panel);
  float* totals = weights + kPanelBlocks * 1024;
  std::memset(totals, 0, size_t(m_count) * 32 * sizeof(float));
  if (m_count < kPanelFrom) {
    in_tiles<kRows>(0, m_count, [&](int64_t m, auto rows) {
      if (a.w.bits == 4)
        tile<Codes::nibbles, rows.n>(a, b, nullptr, m_begin + m, 0, k_blocks, totals + m * 32);
      else
        tile<Codes::bytes, rows.n>(a, b, nullptr, m_begin + m, 0, k_blocks, totals + m * 32);
    });
  } else {
    for (int64_t kb = 0; kb < k_blocks; kb += kPanelBlocks) {
      const int64_t last = k_blocks - kb < kPanelBlocks ? k_blocks : kb + kPanelBlocks;
      if (a.w.bits == 4)
        fill_panel<Codes::nibbles>(a, b, kb, last, weights);
      else
        fill_panel<Codes::bytes>(a, b, kb, last, weights);
      in_tiles<kRows>(0, m_count, [&](int64_t m, auto rows) {
        tile<Codes::panel, rows.n>(a, b, weights, m_begin + m, kb, last, totals + m * 32);
      });
    }
  }
  for (int64_t m = 0; m < m_count; ++m)
    for (int r = 0; r < 32; r += W) store_outputs(a, block, r, m_begin + m, load(totals + m * 32 + r));
}

}  // namespace tilewright
