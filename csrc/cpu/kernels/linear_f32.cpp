// Quantised linear with fp32 arithmetic: activations fp32, or rounded to bf16 beforehand.
//   dot[m][n] = sum over 32 k, or 16 with groups of 16, of value * x
//               values: of tables, e4m3 and bf16; codes less their zero point; 4-bit codes as they are, and
//               then
//   dot       = dot - zero * sum(x)                at most 15, so little is lost to cancellation
//   acc[m][n] = fma(dot, s_w, acc), with minima then fma(min, sum(x), acc); k ascending
// The order is the same for every M. Few rows decode codes in registers, 4 instructions for W weights; from
// kPanelFrom rows on, kPanelBlocks * 32 columns are decoded once into a panel (16 KiB, in L1) that all row
// tiles use.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"

namespace tilewright {
namespace {

constexpr int kPanelBlocks = kPanelBytes / 4096;  // of 32 columns
#if defined(__AVX512F__)
constexpr int kRows = 6;  // 12 dot and 12 total accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 3;  // 6 and 6 of 16
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kPanelFrom = kRows + 1;

// The values of 4 columns of a pair of vectors.
template <Read r>
struct Decoder {
  ValueTable values;
  Floats16 table;

  explicit Decoder(const PackedWeight& w) : values(w), table(load_floats16(values.values)) {}
  Decoder(const Decoder&) = delete;  // table may point to values

  template <int k>
  TW_INLINE F value(I codes, F zero) const {
    const I code = byte_of<k>(codes);
    if constexpr (r == Read::nibbles) return to_float(code);
    if constexpr (r == Read::table) return lookup(table, code);
    if constexpr (r == Read::e4m3) return e4m3_to_float(code);
    return sub(to_float(code), zero);
  }
  TW_INLINE void operator()(I low, I high, const F zeros[2], F out[4][2]) const {
    out[0][0] = value<0>(low, zeros[0]);
    out[1][0] = value<1>(low, zeros[0]);
    out[2][0] = value<2>(low, zeros[0]);
    out[3][0] = value<3>(low, zeros[0]);
    out[0][1] = value<0>(high, zeros[1]);
    out[1][1] = value<1>(high, zeros[1]);
    out[2][1] = value<2>(high, zeros[1]);
    out[3][1] = value<3>(high, zeros[1]);
  }
};

// Where the weights of block kb come from, step after step.
template <Read r>
struct DecodedSteps {
  StepReader<r> reader;
  const Decoder<r>& decode;
  TW_INLINE void step(int step, const F zeros[2], F out[4][2]) {
    I low, high;
    reader.step(step, low, high);
    decode(low, high, zeros, out);
  }
};
struct DenseSteps {
  const uint8_t* at;
  TW_INLINE void step(int step, const F*, F out[4][2]) {
    TW_UNROLL for (int half = 0; half < 2; ++half) {
      const I even = iload(at + half * 1024 + step * 128), odd = iload(at + half * 1024 + step * 128 + 64);
      const I upper = iset1(int32_t(0xffff0000u));
      out[0][half] = as_float(ishl<16>(even));
      out[1][half] = as_float(ishl<16>(odd));
      out[2][half] = as_float(iand(even, upper));
      out[3][half] = as_float(iand(odd, upper));
    }
  }
};
struct PanelSteps {
  const float* at;
  int pair;
  TW_INLINE void step(int step, const F*, F out[4][2]) {
    TW_UNROLL for (int k = 0; k < 4; ++k) {
      out[k][0] = load(at + step * 128 + k * 32 + pair_row(pair, 0));
      out[k][1] = load(at + step * 128 + k * 32 + pair_row(pair, 1));
    }
  }
};

// The zero points of a pair of vectors, as floats: implicit, or per row; 0 with minima.
template <class Scales>
TW_INLINE void zero_points(const Scales& scales, const PackedWeight& w, int64_t kb, int part, int pair,
                           F out[2]) {
  TW_UNROLL for (int half = 0; half < 2; ++half) {
    if (w.offset == Offset::zero)
      out[half] = to_float(scales.zero_point(kb, part, pair_row(pair, half)));
    else
      out[half] = set1(w.offset == Offset::none ? float(1 << (w.bits() - 1)) : 0.0f);
  }
}

// Adds columns [first * 32, last * 32) of x times the block to totals, [MR][32].
template <int MR, class Scales, class StepsOf>
void tile(const LinearArgs& a, const Scales& scales, const StepsOf& steps_of, int64_t m, int64_t first,
          int64_t last, float* totals) {
  const int64_t k_blocks = a.w.k_blocks();
  const float* x = static_cast<const float*>(a.x) + m * k_blocks * 32;
  const int parts = int(a.w.parts());
  const float* sums = a.sums + m * k_blocks * parts;
  const bool correct = a.w.codes == Codes::int4 && a.w.offset != Offset::min;
  for (int pair = 0; pair < kPairs; ++pair) {
    const int r0 = pair_row(pair, 0), r1 = pair_row(pair, 1);
    F total[MR][2];
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      total[i][0] = load(totals + i * 32 + r0);
      total[i][1] = load(totals + i * 32 + r1);
    }
    for (int64_t kb = first; kb < last; ++kb) {
      auto steps = steps_of(kb, pair);
      for (int part = 0; part < parts; ++part) {
        F zeros[2];
        zero_points(scales, a.w, kb, part, pair, zeros);
        F dot[MR][2];
        TW_UNROLL for (int i = 0; i < MR; ++i) dot[i][0] = dot[i][1] = zero();
        for (int step = part * 8 / parts; step < (part + 1) * 8 / parts; ++step) {
          F w[4][2];
          steps.step(step, zeros, w);
          TW_UNROLL for (int k = 0; k < 4; ++k) {
            TW_UNROLL for (int i = 0; i < MR; ++i) {
              const F v = set1(x[(i * k_blocks + kb) * 32 + step * 4 + k]);
              dot[i][0] = fma(v, w[k][0], dot[i][0]);
              dot[i][1] = fma(v, w[k][1], dot[i][1]);
            }
          }
        }
        const F s0 = scales.scale(kb, part, r0), s1 = scales.scale(kb, part, r1);
        const auto sum_of = [&](int i) { return sums[(i * k_blocks + kb) * parts + part]; };
        TW_UNROLL for (int i = 0; i < MR; ++i) {
          if (correct) {
            const F minus_sum = set1(-sum_of(i));
            dot[i][0] = fma(zeros[0], minus_sum, dot[i][0]);
            dot[i][1] = fma(zeros[1], minus_sum, dot[i][1]);
          }
          total[i][0] = fma(dot[i][0], s0, total[i][0]);
          total[i][1] = fma(dot[i][1], s1, total[i][1]);
        }
        if (a.w.offset == Offset::min) {
          const F m0 = scales.minimum(kb, part, r0), m1 = scales.minimum(kb, part, r1);
          TW_UNROLL for (int i = 0; i < MR; ++i) {
            const F s = set1(sum_of(i));
            total[i][0] = fma(m0, s, total[i][0]);
            total[i][1] = fma(m1, s, total[i][1]);
          }
        }
      }
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      store(totals + i * 32 + r0, total[i][0]);
      store(totals + i * 32 + r1, total[i][1]);
    }
  }
}

// Calls f with a function (kb, pair) -> steps for the weight's codes.
template <class Fn>
void with_steps(const LinearArgs& a, const Block& b, Fn&& f) {
  with_read<true>(a.w, [&](auto as) {
    if constexpr (as.read == Read::bf16) {
      f([&](int64_t kb, int pair) { return DenseSteps{b.codes + kb * 2048 + pair * W * 4}; }, as);
    } else {
      const Decoder<as.read> decode(a.w);
      f([&](int64_t kb,
            int pair) { return DecodedSteps<as.read>{StepReader<as.read>(b.codes, kb, pair), decode}; },
        as);
    }
  });
}

template <class StepsOf>
void fill_panel(const LinearArgs& a, const PanelScales& scales, const StepsOf& steps_of, int64_t first,
                int64_t last, float* panel) {
  for (int64_t kb = first; kb < last; ++kb)
    for (int pair = 0; pair < kPairs; ++pair) {
      auto steps = steps_of(kb, pair);
      F zeros[2] = {zero(), zero()};
      for (int step = 0; step < 8; ++step) {
        if (step % (8 / scales.parts) == 0)
          zero_points(scales, a.w, kb, step * scales.parts / 8, pair, zeros);
        F w[4][2];
        steps.step(step, zeros, w);
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
      float* out = static_cast<float*>(a.out) + r * a.row_blocks * 32;
      for (int64_t kb = 0; kb < a.k_blocks; ++kb, out += 32) {
        F sum = zero();
        for (int i = 0; i < 32; i += W) {
          if (i == a.run) {
            a.sums[(r * a.row_blocks + kb) * 2] = reduce_add(sum);
            sum = zero();
          }
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
        a.sums[((r * a.row_blocks + kb) * 32 + 31) / a.run] = reduce_add(sum);
      }
    }
  });
}

void TW_KERNEL(linear_f32)(const LinearArgs& a, int64_t block, int64_t m_begin, int64_t m_end, void* panel) {
  const Block b(a.w, block);
  const int64_t k_blocks = a.w.k_blocks(), m_count = m_end - m_begin;
  float* weights = static_cast<float*>(panel);
  float* totals = weights + (kPanelBytes + kPanelScaleBytes) / 4;
  for (int64_t i = 0; i < m_count * 32; i += W) store(totals + i, zero());
  with_steps(a, b, [&](const auto& steps_of, auto as) {
    constexpr bool kPlain = as.read == Read::nibbles || as.read == Read::bytes;  // worth a tile of their own
    if (m_count == 1) return tile<1>(a, StoredScales{b}, steps_of, m_begin, 0, k_blocks, totals);
    if constexpr (kPlain)
      if (m_count < kPanelFrom)
        return in_tiles<kRows>(0, m_count, [&](int64_t m, auto rows) {
          tile<rows.n>(a, StoredScales{b}, steps_of, m_begin + m, 0, k_blocks, totals + m * 32);
        });
    for (int64_t kb = 0; kb < k_blocks; kb += kPanelBlocks) {
      const int64_t last = kb + kPanelBlocks < k_blocks ? kb + kPanelBlocks : k_blocks;
      const PanelScales scales(b, a.w.offset, kb, last, static_cast<uint8_t*>(panel));
      fill_panel(a, scales, steps_of, kb, last, weights);
      const auto panel_of = [&](int64_t i, int pair) { return PanelSteps{weights + (i - kb) * 1024, pair}; };
      in_tiles<kRows>(0, m_count, [&](int64_t m, auto rows) {
        tile<rows.n>(a, scales, panel_of, m_begin + m, kb, last, totals + m * 32);
      });
    }
  });
  for (int64_t m = 0; m < m_count; ++m)
    for (int r = 0; r < 32; r += W) store_outputs(a, block, r, m_begin + m, load(totals + m * 32 + r));
}

}  // namespace tilewright
