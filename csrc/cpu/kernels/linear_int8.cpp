// Quantised linear with int8 activations, for codes that are integers or stand for integers.
//   dot[m][n]  = sum over a run of k of code_w[n][k] * code_x[m][k]      exact, int32
//   acc[m][n]  = fma(float(dot - zero * sum_x), s_w * s_x, acc)          k ascending, one accumulator
//   (minima)     acc = fma(float(dot), s_w * s_x, acc), then fma(min, float(sum_x) * s_x, acc)
// A run is as long as both scales last: 32 k, 16 with groups of 16, and with one scale a row of x up to
// kLongRun. That formula and order hold for every M and every thread count, so an output's bits depend on its
// row of x and its row of w alone.
//
// A tile of MR rows x 32 outputs goes over all of k and decodes codes and scales in registers on its way: per
// 32 k 16 * MR dot instructions and about 6 * MR for the scales. Where decoding takes longer and many rows
// share it (panel_from), kSlab * 32 columns of a block are decoded once to bytes (16 KiB, in L1) and tiles
// pass over them; their sums wait in memory between two slabs. At level amx tiles of 16 or 32 rows take the
// integer products of those many rows, with the same bits, but for runs of 16, which would leave three
// quarters of a tile empty.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"
#if defined(TW_TILES)
#include "cpu/kernels/linear_tiles.h"
#endif

namespace tilewright {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6;  // 12 dot and 12 float accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 2;  // 4 and 4 of 16
#else
constexpr int kRows = 1;
#endif
constexpr int64_t kSlab = kPanelBytes / 1024;  // blocks of 32 k
constexpr int kSideBySide = 2;  // blocks that one row of x reads at a time: two streams are faster than one

// A stretch of a block: blocks [first, last) of 32 k, whose codes start at `codes`.
template <class Scales>
struct Slab {
  const uint8_t* codes;
  int64_t first, last;
  Scales scales;
  Prefetch prefetch;  // a call a block
};

template <int MR, class Scales>
TW_INLINE void start_dots(const LinearArgs& a, const Scales& scales, const int32_t* correction, int64_t kb,
                          int part, int pair, I dot[MR][2]) {
  if (a.w.offset == Offset::none) {
    TW_UNROLL for (int i = 0; i < MR; ++i) dot[i][0] = dot[i][1] = iset1(correction[i * a.runs]);
  } else if (a.w.offset == Offset::zero) {
    const I z0 = scales.zero_point(kb, part, pair_row(pair, 0)),
            z1 = scales.zero_point(kb, part, pair_row(pair, 1));
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      const I c = iset1(correction[i * a.runs]);
      dot[i][0] = imul(z0, c);
      dot[i][1] = imul(z1, c);
    }
  } else {
    TW_UNROLL for (int i = 0; i < MR; ++i) dot[i][0] = dot[i][1] = iset1(0);
  }
}

template <int MR, class Scales>
TW_INLINE void add_scaled(const LinearArgs& a, const Scales& scales, const int32_t* correction,
                          const float* sx, int64_t kb, int part, int pair, const I dot[MR][2], F sum[MR][2]) {
  const int64_t k_blocks = a.w.k_blocks();
  const int r0 = pair_row(pair, 0), r1 = pair_row(pair, 1);
  const F s0 = scales.scale(kb, part, r0), s1 = scales.scale(kb, part, r1);
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    const F s = set1(sx[i * k_blocks + kb]);
    sum[i][0] = fma(to_float(dot[i][0]), mul(s0, s), sum[i][0]);
    sum[i][1] = fma(to_float(dot[i][1]), mul(s1, s), sum[i][1]);
  }
  if (a.w.offset == Offset::min) {
    const F m0 = scales.minimum(kb, part, r0), m1 = scales.minimum(kb, part, r1);
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      const F c = set1(bits_to_float(uint32_t(correction[i * a.runs])));
      sum[i][0] = fma(m0, c, sum[i][0]);
      sum[i][1] = fma(m1, c, sum[i][1]);
    }
  }
}

// kSteps steps of one block of 32 k, from `first` on.
template <Read r, int kBits, int MR, int kSteps>
TW_INLINE void add_dots(StepReader<r>& reader, Bytes16 table, const int8_t* x, int64_t x_stride, int first,
                        I dot[MR][2]) {
  using D = Dot<kBits>;
  typename D::Acc acc[MR][2];
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    acc[i][0] = D::start(dot[i][0]);
    acc[i][1] = D::start(dot[i][1]);
  }
  TW_UNROLL for (int s = 0; s < kSteps; ++s) {
    I w0, w1;
    reader.step(first + s, w0, w1);
    if constexpr (r == Read::table) {
      w0 = lookup_bytes(table, w0);
      w1 = lookup_bytes(table, w1);
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      const int8_t* four = x + i * x_stride + (first + s) * 4;
      acc[i][0] = D::step(acc[i][0], w0, four);
      acc[i][1] = D::step(acc[i][1], w1, four);
    }
  }
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    dot[i][0] = D::finish(acc[i][0], dot[i][0]);
    dot[i][1] = D::finish(acc[i][1], dot[i][1]);
  }
}

// How long runs are: half a block of 32 k, one, or several.
enum class Run { half, one, several };

// The same stretch of B blocks. kBits: 4 if no code exceeds 15.
template <Read r, int kBits, int MR, Run length, int B, class Scales>
void tile(const LinearArgs& a, const Slab<Scales> (&slabs)[B], Bytes16 table, int pair, int64_t m,
          F total[B][MR][2]) {
  const int64_t first = slabs[0].first, last = slabs[0].last;
  const int64_t k_blocks = a.w.k_blocks(), x_stride = k_blocks * 32;
  const int8_t* x = a.codes + m * x_stride;
  const float* sx = a.scales + m * k_blocks;
  const int64_t run = length == Run::several ? a.run / 32 : 1;
  const int32_t* correction = a.corrections + m * a.runs + first / run * (length == Run::half ? 2 : 1);
  F sum[B][MR][2];
  Prefetch prefetch[B];
  TW_UNROLL for (int b = 0; b < B; ++b) {
    prefetch[b] = slabs[b].prefetch;
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      sum[b][i][0] = total[b][i][0];
      sum[b][i][1] = total[b][i][1];
    }
  }
  for (int64_t kb = first; kb < last;) {
    I dot[B][MR][2];
    if constexpr (length == Run::half) {
      TW_UNROLL for (int b = 0; b < B; ++b) {
        const auto& [codes, begin, end, scales, unused] = slabs[b];
        prefetch[b].next();
        StepReader<r> reader(codes, kb - first, pair);
        TW_UNROLL for (int part = 0; part < 2; ++part) {
          start_dots<MR>(a, scales, correction + part, kb, part, pair, dot[b]);
          add_dots<r, kBits, MR, 4>(reader, table, x + kb * 32, x_stride, part * 4, dot[b]);
          add_scaled<MR>(a, scales, correction + part, sx, kb, part, pair, dot[b], sum[b]);
        }
      }
      correction += 2;
      ++kb;
    } else {
      const int64_t begin = kb, end = kb + run < last ? kb + run : last;
      TW_UNROLL for (int b = 0; b < B; ++b)
          start_dots<MR>(a, slabs[b].scales, correction, begin, 0, pair, dot[b]);
      do {
        TW_UNROLL for (int b = 0; b < B; ++b) {
          prefetch[b].next();
          StepReader<r> reader(slabs[b].codes, kb - first, pair);
          add_dots<r, kBits, MR, 8>(reader, table, x + kb * 32, x_stride, 0, dot[b]);
        }
        ++kb;
      } while (length == Run::several && kb < end);
      TW_UNROLL for (int b = 0; b < B; ++b)
          add_scaled<MR>(a, slabs[b].scales, correction, sx, begin, 0, pair, dot[b], sum[b]);
      ++correction;
    }
  }
  TW_UNROLL for (int b = 0; b < B; ++b) {
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      total[b][i][0] = sum[b][i][0];
      total[b][i][1] = sum[b][i][1];
    }
  }
}

// B blocks from `block` on: all of k in one go, codes decoded in registers.
template <Read r, int kMost, Run length, int B>
void in_registers(const LinearArgs& a, int64_t block, int64_t begin, int64_t end) {
  const ByteTable values(a.w);
  const Bytes16 table = load_bytes16(values.bytes);
  Slab<StoredScales> slabs[B];
  for (int i = 0; i < B; ++i) {
    const Block b(a.w, block + i);
    slabs[i] = {b.codes, 0, a.w.k_blocks(), {b}, {}};
  }
  in_even_tiles<kMost>(begin, end, [&](int64_t m, auto rows) {
    // The last tile fetches the next blocks meanwhile. One row is too quick for all of their codes; planes of
    // bits take longer and are fetched a page ahead (bench/NOTES.md). `a` may be a part of a weight that goes
    // on.
    constexpr bool kPlanes = r == Read::five || r == Read::six, kAhead = B > 1 && kPlanes;
    for (int i = 0; i < B; ++i) {
      slabs[i].prefetch = {};
      if (m + rows.n == end)
        slabs[i].prefetch = {slabs[i].codes + (kAhead ? int64_t(Prefetch::kPage) : B * a.w.block_bytes()),
                             code_block_bytes(r), B > 1 && !kPlanes};
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      F acc[B][rows.n][2];
      for (int b = 0; b < B; ++b)
        for (int i = 0; i < rows.n; ++i) acc[b][i][0] = acc[b][i][1] = zero();
      tile<r, r == Read::nibbles ? 4 : 8, rows.n, length>(a, slabs, table, pair, m, acc);
      for (int b = 0; b < B; ++b)
        for (int i = 0; i < rows.n; ++i) {
          store_outputs(a, block + b, pair_row(pair, 0), m + i, acc[b][i][0]);
          store_outputs(a, block + b, pair_row(pair, 1), m + i, acc[b][i][1]);
        }
    }
  });
}

template <Read r>
void unpack(const PackedWeight& w, const uint8_t* codes, int64_t first, int64_t last, uint8_t* out) {
  const ByteTable values(w);
  const Bytes16 table = load_bytes16(values.bytes);
  for (int64_t kb = first; kb < last; ++kb, out += 1024)
    for (int pair = 0; pair < kPairs; ++pair) {
      StepReader<r> reader(codes, kb, pair);
      TW_UNROLL for (int step = 0; step < 8; ++step) {
        I low, high;
        reader.step(step, low, high);
        if constexpr (r == Read::table) {
          low = lookup_bytes(table, low);
          high = lookup_bytes(table, high);
        }
        istore(out + step * 128 + pair * W * 4, low);
        istore(out + step * 128 + 64 + pair * W * 4, high);
      }
    }
}

template <int kBits, Run length>
void all_rows(const LinearArgs& a, const Slab<PanelScales>& slab, int64_t begin, int64_t end, float* totals) {
  in_even_tiles<kRows>(0, end - begin, [&](int64_t m, auto rows) {
    for (int pair = 0; pair < kPairs; ++pair) {
      float* at = totals + m * 32;
      const int r0 = pair_row(pair, 0), r1 = pair_row(pair, 1);
      F acc[1][rows.n][2];
      TW_UNROLL for (int i = 0; i < rows.n; ++i) {
        acc[0][i][0] = load(at + i * 32 + r0);
        acc[0][i][1] = load(at + i * 32 + r1);
      }
      Slab<PanelScales> now[1] = {slab};
      if (m > 0 || pair > 0) now[0].prefetch = {};  // once is enough
      tile<Read::bytes, kBits, rows.n, length>(a, now, Bytes16{}, pair, begin + m, acc);
      TW_UNROLL for (int i = 0; i < rows.n; ++i) {
        store(at + i * 32 + r0, acc[0][i][0]);
        store(at + i * 32 + r1, acc[0][i][1]);
      }
    }
  });
}

#if defined(TW_TILES)
// Blocks [first, last) of a slab in runs of `run`, whose products are made `step` = 1 or 2 blocks at a time.
template <int MR, Run length>
TW_INLINE void tiled_runs(const LinearArgs& a, const Slab<PanelScales>& slab, int64_t first, int64_t last,
                          int64_t run, int64_t step, int64_t m, int rows, float* totals) {
  const int64_t k_blocks = a.w.k_blocks(), x_stride = k_blocks * 32;
  const PanelScales& scales = slab.scales;
  const int8_t* x = a.codes + m * x_stride;
  const float* sx = a.scales + m * k_blocks;
  const int32_t* correction = a.corrections + m * a.runs + first / run;
  alignas(64) int32_t dots[kTiledRows * 32];
  for (int64_t kb = first; kb < last; kb += run, ++correction) {
    tiles_zero<MR>();
    for (int64_t at = kb; at < kb + run && at < last; at += step) {
      const uint8_t* codes = slab.codes + (at - slab.first) * 1024;
      operands_load<MR>(x + at * 32, x_stride, codes, codes + 64, 128);
      each_tile<MR, 2>([](auto i, auto j) { tile_dot_s8u8<i.n * 2 + j.n, 4 + i.n, 6 + j.n>(); });
    }
    tiles_store<MR>(dots);
    in_tiles<8>(0, rows, [&](int64_t r, auto n) {
      I dot[n.n][2];
      F sum[n.n][2];
      start_dots<n.n>(a, scales, correction + r * a.runs, kb, 0, 0, dot);
      TW_UNROLL for (int i = 0; i < n.n; ++i) {
        TW_UNROLL for (int half = 0; half < 2; ++half) {
          dot[i][half] = iadd(dot[i][half], iload(dots + (r + i) * 32 + half * 16));
          sum[i][half] = load(totals + (r + i) * 32 + half * 16);
        }
      }
      add_scaled<n.n>(a, scales, correction + r * a.runs, sx + r * k_blocks, kb, 0, 0, dot, sum);
      TW_UNROLL for (int i = 0; i < n.n; ++i) {
        TW_UNROLL for (int half = 0; half < 2; ++half) store(totals + (r + i) * 32 + half * 16, sum[i][half]);
      }
    });
  }
}

template <Run length>
void all_rows_in_tiles(const LinearArgs& a, const Slab<PanelScales>& slab, int64_t begin, int64_t end,
                       float* totals) {
  const int64_t run = length == Run::several ? a.run / 32 : 1, blocks = slab.last - slab.first;
  Prefetch prefetch = slab.prefetch;
  for (int64_t kb = 0; kb < blocks; ++kb) prefetch.next();
  // Two blocks fill a tile. An odd run, and the last one of a row, may not read a block too many.
  const int64_t full = run % 2 ? 0 : blocks % 2 ? blocks / run * run : blocks;
  const auto part = [&](int64_t first, int64_t last, int step) {
    if (first == last) return;
    in_tiled_rows(end - begin, step * 32, [&](int64_t m, int rows, auto tiles) {
      tiled_runs<tiles.n, length>(a, slab, slab.first + first, slab.first + last, run, step, begin + m, rows,
                                  totals + m * 32);
    });
  };
  part(0, full, 2);
  part(full, blocks, 1);
}
#endif

// Only the 16-bit sums of AVX2 gain from codes of 4 bits; elsewhere a panel is a panel.
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr int kPanelBits = 4;
#else
constexpr int kPanelBits = 8;
#endif

template <Read r, Run length>
void many_rows(const LinearArgs& a, int64_t block, int64_t m_begin, int64_t m_end, uint8_t* panel) {
  const Block b(a.w, block);
  const int64_t m_count = m_end - m_begin, k_blocks = a.w.k_blocks();
  auto* totals = reinterpret_cast<float*>(panel + kPanelBytes + kPanelScaleBytes);
  for (int64_t i = 0; i < m_count * 32; i += W) store(totals + i, zero());
  const int64_t run_blocks = length == Run::several ? a.run / 32 : 1,
                slab_blocks = kSlab / run_blocks * run_blocks;
  for (int64_t first = 0; first < k_blocks; first += slab_blocks) {
    const int64_t last = first + slab_blocks < k_blocks ? first + slab_blocks : k_blocks;
    const uint8_t* codes = r == Read::bytes ? b.codes + first * 1024 : panel;
    if constexpr (r != Read::bytes) unpack<r>(a.w, b.codes, first, last, panel);
    const PanelScales scales(b, a.w.offset, first, last, panel);
    Prefetch next{b.codes + last * code_block_bytes(r), code_block_bytes(r)};
    if (last == k_blocks) next = {};
    const Slab<PanelScales> slab{codes, first, last, scales, next};
#if defined(TW_TILES)
    if constexpr (length != Run::half) {
      all_rows_in_tiles<length>(a, slab, m_begin, m_end, totals);
      continue;
    }
#endif
    all_rows<r == Read::nibbles ? kPanelBits : 8, length>(a, slab, m_begin, m_end, totals);
  }
  for (int64_t m = 0; m < m_count; ++m)
    for (int i = 0; i < 32; i += W) store_outputs(a, block, i, m_begin + m, load(totals + m * 32 + i));
}

// From how many rows on codes and scales that are decoded once are worth their way through L1
// (bench/NOTES.md).
template <Read r, Run length>
int64_t panel_from([[maybe_unused]] const PackedWeight& w) {
  [[maybe_unused]] constexpr int64_t kNever = INT64_MAX;
#if defined(TW_TILES)
  if (length != Run::half) return kRows + 1;
#endif
#if defined(__AVX512F__)
  return w.scale == Scale::two_level ? 25 : kNever;
#elif defined(__AVX2__)
  return r == Read::nibbles && w.scale != Scale::two_level ? kNever : 7;
#else
  return 2;
#endif
}

template <Read r, Run length>
void run(const LinearArgs& a, int64_t begin, int64_t end, int64_t m_begin, int64_t m_end, uint8_t* panel) {
  const int64_t m_count = m_end - m_begin, from = panel_from<r, length>(a.w);
  for (int64_t block = begin; block < end;) {
    if (m_count == 1 && block + kSideBySide <= end) {
      in_registers<r, 1, length, kSideBySide>(a, block, m_begin, m_end);
      block += kSideBySide;
    } else if (m_count < from) {
      in_registers<r, kRows, length, 1>(a, block++, m_begin, m_end);
    } else {
      many_rows<r, length>(a, block++, m_begin, m_end, panel);
    }
  }
}

#if !defined(TW_TILES)
template <class T>
void quantise(const QuantiseArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row<const T>(a.x, r);
    int8_t* codes = a.codes + r * a.row_blocks * 32;
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
    const auto correct = [&](int64_t at, int32_t sum, float scale) {
      a.corrections[r * a.runs + at] = a.offset == Offset::none ? -a.zero * sum
                                       : a.offset == Offset::zero
                                           ? -sum
                                           : int32_t(float_to_bits(float(sum) * scale));
    };
    int32_t sum = 0;
    for (int64_t kb = 0; kb < a.k_blocks; ++kb) {
      F v[32 / W];
      const float top = amax_of(kb, v);
      const float scale = a.per_token ? token_scale : top / 127.0f;
      int8_t* c = codes + kb * 32;
      F sums[32 / W];         // of codes, which are integers: exact
      if (!(scale > 0.0f)) {  // all zero, or NaN: the scale alone says which
        std::memset(c, 0, 32);
        TW_UNROLL for (int i = 0; i < 32 / W; ++i) sums[i] = zero();
      } else {
        const F s = set1(scale);
        // The clamp acts only where scale is subnormal and |x| / scale rounds past 127.
        TW_UNROLL for (int i = 0; i < 32 / W; ++i) {
          sums[i] = round_even(max_propagate(min_propagate(div(v[i], s), set1(127.0f)), set1(-127.0f)));
          store_s8(c + i * W, sums[i]);
        }
      }
      a.scales[r * a.row_blocks + kb] = scale;
      // Of 16 columns each.
      F low = sums[0], high = sums[16 / W];
      TW_UNROLL for (int i = 1; i < 16 / W; ++i) {
        low = add(low, sums[i]);
        high = add(high, sums[16 / W + i]);
      }
      if (a.run == 16) {
        correct(kb * 2, int32_t(reduce_add(low)), scale);
        correct(kb * 2 + 1, int32_t(reduce_add(high)), scale);
        continue;
      }
      sum += int32_t(reduce_add(add(low, high)));
      if ((kb + 1) % (a.run / 32) == 0 || kb + 1 == a.k_blocks) {
        correct(kb / (a.run / 32), sum, scale);
        sum = 0;
      }
    }
  }
}
#endif

}  // namespace

#if !defined(TW_TILES)
void TW_KERNEL(quantise_rows)(const QuantiseArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto t) { quantise<decltype(t)>(a, begin, end); });
}
#endif

void TW_KERNEL(linear_int8)(const LinearArgs& a, int64_t begin, int64_t end, int64_t m_begin, int64_t m_end,
                            void* panel) {
  with_read<false>(a.w, [&](auto as) {
    auto* bytes = static_cast<uint8_t*>(panel);
    if (a.run == 16)
      run<as.read, Run::half>(a, begin, end, m_begin, m_end, bytes);
    else if (a.run == 32)
      run<as.read, Run::one>(a, begin, end, m_begin, m_end, bytes);
    else
      run<as.read, Run::several>(a, begin, end, m_begin, m_end, bytes);
  });
}

}  // namespace tilewright
