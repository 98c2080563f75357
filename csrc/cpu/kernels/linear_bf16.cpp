// Quantised linear with bf16 activations on vdpbf16ps (AVX-512 BF16 only; other levels round x to bf16 and
// use linear_f32).
//   dot[m][n] = sum over 32 k of (code - zero) * bf16(x)     codes are integers, exact in bf16; fp32 sums
//   acc[m][n] = fma(dot, s_w, acc), with minima then fma(min, sum of bf16(x), acc); k ascending
// The weight itself is never rounded. A pair operand takes columns (0, 2) or (1, 3) of each 4, because one
// mask of the packed dwords yields those; prepare_bf16 stores x in that order. As in linear_int8, few rows
// unpack codes in registers and many rows unpack a block once into a panel of 64 * k bytes.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"

namespace tilewright {
namespace {

constexpr int kRows = 6;
constexpr int64_t kUnpackFrom = kRows + 1;

// The 4 columns of a step for 16 rows, as two vectors of bf16 pairs: columns (0, 2) and (1, 3).
struct Pairs {
  __m512i even, odd;
};

struct Decoder {
  __m512i table;  // 16 nibble values as bf16, twice
  __m512 zero;    // subtracted from 8-bit codes
  int bits;

  Decoder(const PackedWeight& w) : bits(w.bits) {
    const int implicit = w.offset == Offset::none ? 1 << (w.bits - 1) : 0;
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = uint16_t(float_to_bits(float((i & 15) - implicit)) >> 16);
    table = _mm512_load_si512(values);
    zero = _mm512_set1_ps(float(implicit));
  }

  TW_INLINE Pairs nibbles(__m512i raw) const {  // of the low nibble of each byte
    const __m512i mask = _mm512_set1_epi32(0x000f000f);
    return {_mm512_permutexvar_epi16(_mm512_and_si512(raw, mask), table),
            _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi32(raw, 8), mask), table)};
  }
  TW_INLINE __m512i pair(__m512i low, __m512i high) const {  // two integers a lane -> bf16 pair
    const __m512i a = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(low), zero));
    const __m512i b = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(high), zero));
    return _mm512_or_si512(_mm512_srli_epi32(a, 16), b);  // the lower half of b is 0: 8 significant bits
  }
  TW_INLINE Pairs bytes(__m512i raw) const {
    return {pair(byte_of<0>(raw), byte_of<2>(raw)), pair(byte_of<1>(raw), byte_of<3>(raw))};
  }
  // Rows 0-15 and 16-31 of step `step` (4 columns) of the block.
  template <int kBits>
  TW_INLINE void step(const uint8_t* codes, int64_t step, Pairs& low, Pairs& high) const {
    if constexpr (kBits == 4) {
      const __m512i raw = _mm512_loadu_si512(codes + step * 64);
      low = nibbles(raw);
      high = nibbles(_mm512_srli_epi32(raw, 4));
    } else {
      low = bytes(_mm512_loadu_si512(codes + step * 128));
      high = bytes(_mm512_loadu_si512(codes + step * 128 + 64));
    }
  }
};

enum class Codes { nibbles, bytes, panel };

TW_INLINE F dot(F acc, __m512i w, const uint16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
}

template <Codes kind, int MR>
void tile(const LinearArgs& a, const Block& b, const Decoder& decode, const void* codes, int64_t m,
          F total[][2]) {
  const int64_t k_blocks = a.w.k_blocks();
  const auto* x = static_cast<const uint16_t*>(a.x) + m * k_blocks * 32;
  const float* sums = a.sums + m * k_blocks;
  const Offset offset = a.w.offset;
  F sum[MR][2];
  TW_UNROLL for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = zero();
  int64_t group = 0;
  int left_in_group = b.blocks_per_group;
  for (int64_t kb = 0; kb < k_blocks; ++kb) {
    F acc[MR][2];
    TW_UNROLL for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = zero();
    TW_UNROLL for (int step = 0; step < 8; ++step) {
      Pairs low, high;
      if constexpr (kind == Codes::panel) {
        const auto* p = static_cast<const __m512i*>(codes) + (kb * 8 + step) * 4;
        low = {_mm512_load_si512(p), _mm512_load_si512(p + 1)};
        high = {_mm512_load_si512(p + 2), _mm512_load_si512(p + 3)};
      } else {
        decode.step<kind == Codes::nibbles ? 4 : 8>(static_cast<const uint8_t*>(codes), kb * 8 + step, low,
                                                    high);
      }
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const uint16_t* four = x + (i * k_blocks + kb) * 32 + step * 4;
        acc[i][0] = dot(dot(acc[i][0], low.even, four), low.odd, four + 2);
        acc[i][1] = dot(dot(acc[i][1], high.even, four), high.odd, four + 2);
      }
    }
    const F s0 = b.scale(group, 0), s1 = b.scale(group, 16);
    if (offset == Offset::zero) {
      const F z0 = to_float(b.zero_point(group, 0)), z1 = to_float(b.zero_point(group, 16));
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const F minus_sum = set1(-sums[i * k_blocks + kb]);
        acc[i][0] = fma(z0, minus_sum, acc[i][0]);
        acc[i][1] = fma(z1, minus_sum, acc[i][1]);
      }
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      sum[i][0] = fma(acc[i][0], s0, sum[i][0]);
      sum[i][1] = fma(acc[i][1], s1, sum[i][1]);
    }
    if (offset == Offset::min) {
      const F m0 = b.minimum(group, 0), m1 = b.minimum(group, 16);
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const F s = set1(sums[i * k_blocks + kb]);
        sum[i][0] = fma(m0, s, sum[i][0]);
        sum[i][1] = fma(m1, s, sum[i][1]);
      }
    }
    if (--left_in_group == 0) {
      ++group;
      left_in_group = b.blocks_per_group;
    }
  }
  TW_UNROLL for (int i = 0; i < MR; ++i) {
    total[i][0] = sum[i][0];
    total[i][1] = sum[i][1];
  }
}

template <Codes kind>
void all_rows(const LinearArgs& a, const Block& b, const Decoder& decode, const void* codes, int64_t block,
              int64_t begin, int64_t end) {
  in_tiles<kRows>(begin, end, [&](int64_t m, auto rows) {
    F acc[rows.n][2];
    tile<kind, rows.n>(a, b, decode, codes, m, acc);
    for (int i = 0; i < rows.n; ++i) {
      store_outputs(a, block, 0, m + i, acc[i][0]);
      store_outputs(a, block, 16, m + i, acc[i][1]);
    }
  });
}

}  // namespace

void TW_KERNEL(prepare_bf16)(const PrepareArgs& a, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<const T>(a.x, r);
      auto* out = static_cast<uint16_t*>(a.out) + r * a.k_blocks * 32;
      for (int64_t kb = 0; kb < a.k_blocks; ++kb, out += 32) {
        alignas(64) bf16 rounded[32];
        F sum = zero();
        for (int i = 0; i < 32; i += W) {
          const int64_t left = a.k - kb * 32 - i;
          const T* from = x + kb * 32 + i;
          store(rounded + i, left >= W ? load(from) : load(from, left > 0 ? int(left) : 0));
          sum = add(sum, load(rounded + i));
        }
        for (int i = 0; i < 32; i += 4) {
          out[i] = rounded[i].bits;
          out[i + 1] = rounded[i + 2].bits;
          out[i + 2] = rounded[i + 1].bits;
          out[i + 3] = rounded[i + 3].bits;
        }
        a.sums[r * a.k_blocks + kb] = reduce_add(sum);
      }
    }
  });
}

void TW_KERNEL(linear_bf16)(const LinearArgs& a, int64_t block, int64_t m_begin, int64_t m_end, void* panel) {
  const Block b(a.w, block);
  const Decoder decode(a.w);
  if (m_end - m_begin < kUnpackFrom) {
    if (a.w.bits == 4)
      all_rows<Codes::nibbles>(a, b, decode, b.codes, block, m_begin, m_end);
    else
      all_rows<Codes::bytes>(a, b, decode, b.codes, block, m_begin, m_end);
    return;
  }
  auto* out = static_cast<__m512i*>(panel);
  for (int64_t step = 0; step < a.w.k_blocks() * 8; ++step, out += 4) {
    Pairs low, high;
    if (a.w.bits == 4)
      decode.step<4>(b.codes, step, low, high);
    else
      decode.step<8>(b.codes, step, low, high);
    _mm512_store_si512(out, low.even);
    _mm512_store_si512(out + 1, low.odd);
    _mm512_store_si512(out + 2, high.even);
    _mm512_store_si512(out + 3, high.odd);
  }
  all_rows<Codes::panel>(a, b, decode, panel, block, m_begin, m_end);
}

}  // namespace tilewright
