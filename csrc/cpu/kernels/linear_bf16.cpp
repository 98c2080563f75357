// Linear with bf16 activations on vdpbf16ps (AVX-512 BF16 only; other levels round x to bf16 and use
// linear_f32).
//   dot[m][n] = sum over 32 k, or 16 with groups of 16, of (code - zero) * bf16(x)      fp32 sums
//   acc[m][n] = fma(dot, s_w, acc), with minima then fma(min, sum of bf16(x), acc); k ascending
// Integer codes, e4m3 and dense bf16 are exact in bf16; only the values of nf4 and fp4 are rounded to it. A
// pair operand takes columns (0, 2) or (1, 3) of each 4, because one mask of the packed dwords yields those;
// prepare_bf16 stores x in that order. Dense weights have no scales, so one accumulator takes all of k. As in
// linear_int8, a tile goes over all of k and decodes codes in registers, or, where that takes long and many
// rows share it (panel_from), slabs of a block are decoded into a panel.
// At level amx tiles of 16 or 32 rows take the products of many rows, but for groups of 16.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"
#if defined(TW_TILES)
#include "cpu/kernels/linear_tiles.h"
#endif

namespace tilewright {
namespace {

constexpr int kRows = 6;                       // 12 dot and 12 float accumulators of 32 registers
constexpr int64_t kSlab = kPanelBytes / 2048;  // blocks of 32 k

// The 4 columns of a step for 16 rows, as two vectors of bf16 pairs: columns (0, 2) and (1, 3).
struct Pairs {
  __m512i even, odd;
};

// The codes of one step of a block as bf16 pairs.
template <Read r>
struct Decoder {
  __m512i table;  // 16 values as bf16, twice
  __m512 zero;    // subtracted from codes of more than 4 bits

  explicit Decoder(const PackedWeight& w) {
    const int implicit = w.offset == Offset::none ? 1 << (w.bits() - 1) : 0;
    const ValueTable values(w);
    alignas(64) uint16_t rounded[32];
    for (int i = 0; i < 32; ++i)
      rounded[i] = to_bf16(r == Read::table ? values.values[i & 15] : float((i & 15) - implicit)).bits;
    table = _mm512_load_si512(rounded);
    zero = _mm512_set1_ps(float(implicit));
  }

  TW_INLINE Pairs nibbles(__m512i low) const {  // of the low nibble of each byte
    const __m512i mask = _mm512_set1_epi32(0x000f000f);
    return {_mm512_permutexvar_epi16(_mm512_and_si512(low, mask), table),
            _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi32(low, 8), mask), table)};
  }
  TW_INLINE __m512 value(__m512i byte) const {
    if constexpr (r == Read::e4m3) return e4m3_to_float(byte);
    return _mm512_sub_ps(_mm512_cvtepi32_ps(byte), zero);
  }
  TW_INLINE __m512i pair(__m512i low, __m512i high) const {  // exact: at most 8 significant bits
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(value(low)), 16),
                           _mm512_castps_si512(value(high)));
  }
  TW_INLINE Pairs operator()(__m512i codes) const {
    if constexpr (r == Read::nibbles || r == Read::table)
      return nibbles(codes);
    else
      return {pair(byte_of<0>(codes), byte_of<2>(codes)), pair(byte_of<1>(codes), byte_of<3>(codes))};
  }
};

// 32 k of a panel: (even, odd) of each step for rows 0 to 15, then for 16 to 31; 64 bytes each, so that a
// tile takes 32 k at once.
struct PanelSteps {
  const uint8_t* at;
  TW_INLINE PanelSteps(const uint8_t* panel, int64_t kb) : at(panel + kb * 2048) {}
  TW_INLINE void step(int step, Pairs& low, Pairs& high) {
    const uint8_t* p = at + step * 128;
    low = {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)};
    high = {_mm512_loadu_si512(p + 1024), _mm512_loadu_si512(p + 1088)};
  }
};
template <Read r>
struct DecodedSteps {
  StepReader<r> reader;
  const Decoder<r>& decode;
  TW_INLINE void step(int step, Pairs& low, Pairs& high) {
    I a, b;
    reader.step(step, a, b);
    low = decode(a);
    high = decode(b);
  }
};

TW_INLINE F dot(F acc, __m512i w, const uint16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
}

// sums: of x over the columns of acc, rows `stride` apart.
template <int MR, class Scales>
TW_INLINE void add_scaled(Offset offset, const Scales& scales, const float* sums, int64_t stride, int64_t kb,
                          int part, F acc[MR][2], F sum[MR][2]) {
  const F s0 = scales.scale(kb, part, 0), s1 = scales.scale(kb, part, 16);
  if (offset == Offset::zero) {
    const F z0 = to_float(scales.zero_point(kb, part, 0)), z1 = to_float(scales.zero_point(kb, part, 16));
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      const F minus_sum = set1(-sums[i * stride]);
      acc[i][0] = fma(z0, minus_sum, acc[i][0]);
      acc[i][1] = fma(z1, minus_sum, acc[i][1]);
    }
  }
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    sum[i][0] = fma(acc[i][0], s0, sum[i][0]);
    sum[i][1] = fma(acc[i][1], s1, sum[i][1]);
  }
  if (offset == Offset::min) {
    const F m0 = scales.minimum(kb, part, 0), m1 = scales.minimum(kb, part, 16);
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      const F s = set1(sums[i * stride]);
      sum[i][0] = fma(m0, s, sum[i][0]);
      sum[i][1] = fma(m1, s, sum[i][1]);
    }
  }
}

// Blocks [first, last) of 32 k; steps_of(kb) reads one. kSteps: 8, or 4 with groups of 16.
template <bool kDense, int MR, int kSteps, class Scales, class StepsOf>
void tile(const LinearArgs& a, const Scales& scales, const StepsOf& steps_of, Prefetch prefetch, int64_t m,
          int64_t first, int64_t last, F total[][2]) {
  constexpr int kParts = 8 / kSteps;
  const int64_t k_blocks = a.w.k_blocks();
  const auto* x = static_cast<const uint16_t*>(a.x) + m * k_blocks * 32;
  const float* sums = a.sums + m * k_blocks * kParts;
  F sum[MR][2];
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    sum[i][0] = total[i][0];
    sum[i][1] = total[i][1];
  }
  for (int64_t kb = first; kb < last; ++kb) {
    prefetch.next();
    auto steps = steps_of(kb);
    TW_UNROLL for (int part = 0; part < kParts; ++part) {
      F acc[MR][2];
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        acc[i][0] = kDense ? sum[i][0] : zero();
        acc[i][1] = kDense ? sum[i][1] : zero();
      }
      TW_UNROLL for (int s = 0; s < kSteps; ++s) {
        const int step = part * kSteps + s;
        Pairs low, high;
        steps.step(step, low, high);
        TW_UNROLL for (int i = 0; i < MR; ++i) {
          const uint16_t* four = x + (i * k_blocks + kb) * 32 + step * 4;
          acc[i][0] = dot(dot(acc[i][0], low.even, four), low.odd, four + 2);
          acc[i][1] = dot(dot(acc[i][1], high.even, four), high.odd, four + 2);
        }
      }
      if constexpr (kDense) {
        TW_UNROLL for (int i = 0; i < MR; ++i) {
          sum[i][0] = acc[i][0];
          sum[i][1] = acc[i][1];
        }
        continue;
      }
      add_scaled<MR>(a.w.offset, scales, sums + kb * kParts + part, k_blocks * kParts, kb, part, acc, sum);
    }
  }
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    total[i][0] = sum[i][0];
    total[i][1] = sum[i][1];
  }
}

// Block `block`: all of k in one go.
template <bool kDense, int kSteps, class StepsOf>
void in_registers(const LinearArgs& a, const Block& b, const StepsOf& steps_of, int64_t block, int64_t begin,
                  int64_t end) {
  const int bytes = a.w.bits() * 128;  // of 32 k
  in_even_tiles<kRows>(begin, end, [&](int64_t m, auto rows) {
    // The last tile fetches the next block meanwhile (bench/NOTES.md); `a` may be a part of a weight that
    // goes on.
    const Prefetch prefetch{b.codes + a.w.block_bytes(), m + rows.n == end ? bytes : 0};
    F acc[rows.n][2];
    for (int i = 0; i < rows.n; ++i) acc[i][0] = acc[i][1] = zero();
    tile<kDense, rows.n, kSteps>(a, StoredScales{b}, steps_of, prefetch, m, 0, a.w.k_blocks(), acc);
    for (int i = 0; i < rows.n; ++i) {
      store_outputs(a, block, 0, m + i, acc[i][0]);
      store_outputs(a, block, 16, m + i, acc[i][1]);
    }
  });
}

template <int kSteps>
void all_rows(const LinearArgs& a, const PanelScales& scales, const uint8_t* panel, Prefetch next,
              int64_t first, int64_t last, int64_t begin, int64_t end, float* totals) {
  const auto steps_of = [=](int64_t kb) { return PanelSteps(panel, kb - first); };
  in_even_tiles<kRows>(0, end - begin, [&](int64_t m, auto rows) {
    float* at = totals + m * 32;
    F acc[rows.n][2];
    TW_UNROLL for (int i = 0; i < rows.n; ++i) {
      acc[i][0] = load(at + i * 32);
      acc[i][1] = load(at + i * 32 + 16);
    }
    tile<false, rows.n, kSteps>(a, scales, steps_of, m == 0 ? next : Prefetch{}, begin + m, first, last, acc);
    TW_UNROLL for (int i = 0; i < rows.n; ++i) {
      store(at + i * 32, acc[i][0]);
      store(at + i * 32 + 16, acc[i][1]);
    }
  });
}

#if defined(TW_TILES)
template <bool kDense>
void all_rows_in_tiles(const LinearArgs& a, const PanelScales& scales, const uint8_t* panel, Prefetch next,
                       int64_t first, int64_t last, int64_t begin, int64_t end, float* totals) {
  const int64_t k_blocks = a.w.k_blocks();
  for (int64_t kb = first; kb < last; ++kb) next.next();
  in_tiled_rows(end - begin, 64, [&](int64_t m, int rows, auto tiles) {
    constexpr int MR = tiles.n;
    const auto* x = static_cast<const uint16_t*>(a.x) + (begin + m) * k_blocks * 32;
    const float* sums = a.sums + (begin + m) * k_blocks;
    float* total = totals + m * 32;
    alignas(64) float dots[kTiledRows * 32];
    if constexpr (kDense) tiles_load<MR>(total);
    for (int64_t kb = first; kb < last; ++kb) {
      if constexpr (!kDense) tiles_zero<MR>();
      const uint8_t* codes = panel + (kb - first) * 2048;
      operands_load<MR>(x + kb * 32, k_blocks * 64, codes, codes + 1024, 64);
      each_tile<MR, 2>([](auto i, auto j) { tile_dot_bf16<i.n * 2 + j.n, 4 + i.n, 6 + j.n>(); });
      if constexpr (kDense) continue;
      tiles_store<MR>(dots);
      in_tiles<8>(0, rows, [&](int64_t r, auto n) {
        F acc[n.n][2], sum[n.n][2];
        TW_UNROLL for (int i = 0; i < n.n; ++i) {
          TW_UNROLL for (int half = 0; half < 2; ++half) {
            acc[i][half] = load(dots + (r + i) * 32 + half * 16);
            sum[i][half] = load(total + (r + i) * 32 + half * 16);
          }
        }
        add_scaled<n.n>(a.w.offset, scales, sums + r * k_blocks + kb, k_blocks, kb, 0, acc, sum);
        TW_UNROLL for (int i = 0; i < n.n; ++i) {
          TW_UNROLL for (int half = 0; half < 2; ++half)
              store(total + (r + i) * 32 + half * 16, sum[i][half]);
        }
      });
    }
    if constexpr (kDense) tiles_store<MR>(total);
  });
}
#endif

template <Read r>
void unpack(const uint8_t* codes, const Decoder<r>& decode, int64_t first, int64_t last, uint8_t* out) {
  for (int64_t kb = first; kb < last; ++kb, out += 2048) {
    DecodedSteps<r> steps{StepReader<r>(codes, kb, 0), decode};
    TW_UNROLL for (int step = 0; step < 8; ++step) {
      Pairs low, high;
      steps.step(step, low, high);
      uint8_t* p = out + step * 128;
      istore(p, low.even);
      istore(p + 64, low.odd);
      istore(p + 1024, high.even);
      istore(p + 1088, high.odd);
    }
  }
}

// From how many rows on decoding a block once is worth its way through L1 (bench/NOTES.md).
template <Read r, int kSteps>
constexpr int64_t panel_from() {
#if defined(TW_TILES)
  if (kSteps == 8) return kRows + 1;
#endif
  return r == Read::nibbles || r == Read::table || r == Read::bf16 ? INT64_MAX
         : r == Read::bytes                                        ? 2 * kRows + 1
                                                                   : kRows + 1;
}

template <Read r, int kSteps>
void many_rows(const LinearArgs& a, const Block& b, int64_t block, int64_t m_begin, int64_t m_end,
               uint8_t* panel) {
  const int64_t m_count = m_end - m_begin, k_blocks = a.w.k_blocks();
  auto* totals = reinterpret_cast<float*>(panel + kPanelBytes + kPanelScaleBytes);
  for (int64_t i = 0; i < m_count * 32; i += W) store(totals + i, zero());
  for (int64_t first = 0; first < k_blocks; first += kSlab) {
    const int64_t last = first + kSlab < k_blocks ? first + kSlab : k_blocks;
    const PanelScales scales(b, a.w.offset, first, last, panel);
    constexpr bool kDense = r == Read::bf16;  // a panel as it is
    constexpr int kBytes = code_block_bytes(r);
    const uint8_t* decoded = kDense ? b.codes + first * kBytes : panel;
    if constexpr (!kDense) unpack<r>(b.codes, Decoder<r>(a.w), first, last, panel);
    const Prefetch next{b.codes + last * kBytes, last < k_blocks ? kBytes : 0};
#if defined(TW_TILES)
    if constexpr (kSteps == 8) {
      all_rows_in_tiles<kDense>(a, scales, decoded, next, first, last, m_begin, m_end, totals);
      continue;
    }
#endif
    if constexpr (!kDense) all_rows<kSteps>(a, scales, decoded, next, first, last, m_begin, m_end, totals);
  }
  for (int64_t m = 0; m < m_count; ++m)
    for (int i = 0; i < 32; i += W) store_outputs(a, block, i, m_begin + m, load(totals + m * 32 + i));
}

template <Read r, int kSteps>
void run(const LinearArgs& a, int64_t block, int64_t begin, int64_t end, uint8_t* panel) {
  const Block b(a.w, block);
  constexpr int64_t kPanelFrom = panel_from<r, kSteps>();
  if constexpr (kPanelFrom != INT64_MAX)
    if (end - begin >= kPanelFrom) return many_rows<r, kSteps>(a, b, block, begin, end, panel);
  if constexpr (r == Read::bf16) {
    const auto steps_of = [&](int64_t kb) { return PanelSteps(b.codes, kb); };
    in_registers<true, kSteps>(a, b, steps_of, block, begin, end);
  } else {
    const Decoder<r> decode(a.w);
    const auto steps_of = [&](int64_t kb) { return DecodedSteps<r>{StepReader<r>(b.codes, kb, 0), decode}; };
    in_registers<false, kSteps>(a, b, steps_of, block, begin, end);
  }
}

}  // namespace

#if !defined(TW_TILES)
void TW_KERNEL(prepare_bf16)(const PrepareArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<const T>(a.x, r);
      auto* out = static_cast<uint16_t*>(a.out) + r * a.row_blocks * 32;
      for (int64_t kb = 0; kb < a.k_blocks; ++kb, out += 32) {
        alignas(64) bf16 rounded[32];
        for (int i = 0; i < 32; i += W) {
          const int64_t left = a.k - kb * 32 - i;
          const T* from = x + kb * 32 + i;
          store(rounded + i, left >= W ? load(from) : load(from, left > 0 ? int(left) : 0));
        }
        for (int i = 0; i < 32; i += 4) {
          out[i] = rounded[i].bits;
          out[i + 1] = rounded[i + 2].bits;
          out[i + 2] = rounded[i + 1].bits;
          out[i + 3] = rounded[i + 3].bits;
        }
        const F first = load(rounded), second = load(rounded + W);
        if (a.run == 16) {
          a.sums[(r * a.row_blocks + kb) * 2] = reduce_add(first);
          a.sums[(r * a.row_blocks + kb) * 2 + 1] = reduce_add(second);
        } else {
          a.sums[r * a.row_blocks + kb] = reduce_add(add(first, second));
        }
      }
    }
  });
}
#endif

void TW_KERNEL(linear_bf16)(const LinearArgs& a, int64_t begin, int64_t end, int64_t m_begin, int64_t m_end,
                            void* panel) {
  with_read<true>(a.w, [&](auto as) {
    auto* bytes = static_cast<uint8_t*>(panel);
    for (int64_t block = begin; block < end; ++block)
      if (a.w.group == 16)
        run<as.read, 4>(a, block, m_begin, m_end, bytes);
      else
        run<as.read, 8>(a, block, m_begin, m_end, bytes);
  });
}

}  // namespace tilewright
