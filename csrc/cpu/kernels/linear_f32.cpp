// Quantised linear with fp32 arithmetic: activations fp32, or rounded to bf16 beforehand.
//   w = scale * (code - zero) or scale * code + min, in fp32; out = sum_k x * w
// A block's weights are dequantised kPanel columns at a time into [k][32] floats (16 KiB, in L1) and an MR x
// 32 register tile passes over them. Each stretch of kPanel columns sums in registers from zero and is then
// added to the output's total: shorter chains of roundings, and the same order for every M.
#include "cpu/simd.h"
//
#include "cpu/kernels/packed.h"

namespace tilewright {
namespace {

constexpr int kPanelBlocks = 4;  // of 32 columns
constexpr int kPanel = kPanelBlocks * 32;
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif

template <int k>
TW_INLINE void dequantise_step(const Block& b, const PackedWeight& w, int64_t group, int pair, I low, I high,
                               float* out) {
  const I codes[2] = {byte_of<k>(low), byte_of<k>(high)};
  TW_UNROLL for (int half = 0; half < 2; ++half) {
    const int r = pair_row(pair, half);
    const F s = b.scale(group, r);
    F v;
    if (w.offset == Offset::min)
      v = fma(s, to_float(codes[half]), b.minimum(group, r));
    else if (w.offset == Offset::zero)
      v = mul(s, sub(to_float(codes[half]), to_float(b.zero_point(group, r))));
    else
      v = mul(s, sub(to_float(codes[half]), set1(float(1 << (w.bits - 1)))));
    store(out + k * 32 + r, v);
  }
}

// Columns [kb*32, kb*32 + 32) of the block as [32 k][32 rows] floats.
void dequantise(const Block& b, const PackedWeight& w, int64_t kb, float* out) {
  const int64_t group = kb / b.blocks_per_group;
  for (int step = 0; step < 8; ++step, out += 128)
    for (int pair = 0; pair < kPairs; ++pair) {
      I low, high;
      if (w.bits == 4) {
        const I raw = iload(b.codes + (kb * 8 + step) * 64 + pair * W * 4);
        low = low_nibbles(raw);
        high = high_nibbles(raw);
      } else {
        low = iload(b.codes + (kb * 8 + step) * 128 + pair * W * 4);
        high = iload(b.codes + (kb * 8 + step) * 128 + 64 + pair * W * 4);
      }
      dequantise_step<0>(b, w, group, pair, low, high, out);
      dequantise_step<1>(b, w, group, pair, low, high, out);
      dequantise_step<2>(b, w, group, pair, low, high, out);
      dequantise_step<3>(b, w, group, pair, low, high, out);
    }
}

template <int MR>
void tile(const float* x, int64_t x_stride, const float* panel, int64_t k, float* totals) {
  for (int pair = 0; pair < kPairs; ++pair) {
    const int r0 = pair_row(pair, 0), r1 = pair_row(pair, 1);
    F acc[MR][2];
    TW_UNROLL for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = zero();
    for (int64_t j = 0; j < k; ++j) {
      const F w0 = load(panel + j * 32 + r0), w1 = load(panel + j * 32 + r1);
      TW_UNROLL for (int i = 0; i < MR; ++i) {
        const F v = set1(x[i * x_stride + j]);
        acc[i][0] = fma(v, w0, acc[i][0]);
        acc[i][1] = fma(v, w1, acc[i][1]);
      }
    }
    TW_UNROLL for (int i = 0; i < MR; ++i) {
      store(totals + i * 32 + r0, add(load(totals + i * 32 + r0), acc[i][0]));
      store(totals + i * 32 + r1, add(load(totals + i * 32 + r1), acc[i][1]));
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
      for (int64_t i = 0; i < a.k_blocks * 32; i += W) {
        const int64_t left = a.k - i;
        store(out + i, left >= W ? load(x + i) : load(x + i, left > 0 ? int(left) : 0));
      }
      if (a.round_bf16)
        for (int64_t i = 0; i < a.k; ++i) out[i] = to_float(to_bf16(out[i]));
    }
  });
}

void TW_KERNEL(linear_f32)(const LinearArgs& a, int64_t block, int64_t m_begin, int64_t m_end, void* panel) {
  const Block b(a.w, block);
  const int64_t k_blocks = a.w.k_blocks(), stride = k_blocks * 32, m_count = m_end - m_begin;
  float* weights = static_cast<float*>(panel);
  float* totals = weights + kPanel * 32;
  std::memset(totals, 0, size_t(m_count) * 32 * sizeof(float));
  for (int64_t kb = 0; kb < k_blocks; kb += kPanelBlocks) {
    const int64_t blocks = k_blocks - kb < kPanelBlocks ? k_blocks - kb : kPanelBlocks;
    for (int64_t i = 0; i < blocks; ++i) dequantise(b, a.w, kb + i, weights + i * 1024);
    const int64_t first = kb * 32, k = (a.w.k - first < blocks * 32 ? a.w.k - first : blocks * 32);
    const float* x = static_cast<const float*>(a.x) + m_begin * stride + first;
    in_tiles<kRows>(0, m_count, [&](int64_t m, auto rows) {
      tile<rows.n>(x + m * stride, stride, weights, k, totals + m * 32);
    });
  }
  for (int64_t m = 0; m < m_count; ++m)
    for (int r = 0; r < 32; r += W) store_outputs(a, block, r, m_begin + m, load(totals + m * 32 + r));
}

}  // namespace tilewright
