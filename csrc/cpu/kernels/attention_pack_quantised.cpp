// Blocks of a quantised KV cache as operands of attention's products for many rows (attention_prefill.cpp):
// 128 keys and values of a KV head at a time, in the form that attention_pack makes of plain ones. A step of
// codes holds 4 channels of W keys (or 4 keys of W channels), so nothing is transposed.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_pack.h"
#include "cpu/kernels/packed.h"
#include "cpu/quantised_kv.h"

namespace tilewright {
namespace {

// Elements from W numbers each of E::depth consecutive places of the reduction dimension.
template <class E>
TW_INLINE void store_elements(float* out, int64_t ld, const F x[4]) {
  if constexpr (E::depth == 2) {
#if defined(__AVX512BF16__)
    TW_UNROLL for (int i = 0; i < 2; ++i) {
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[2 * i]));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[2 * i + 1]));
      _mm512_storeu_si512(out + i * ld, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#endif
  } else {
    TW_UNROLL for (int i = 0; i < 4; ++i) store(out + i * ld, x[i]);
  }
}

// f(step, first row of a vector, codes of its W rows at the step's 4 places) over a block of 32 rows.
template <class Fn>
TW_INLINE void for_codes(int bits, const uint8_t* codes, int64_t steps, Fn&& f) {
  const auto one = [&](int64_t step, int row, I w) {
    const F x[4] = {to_float(byte_of<0>(w)), to_float(byte_of<1>(w)), to_float(byte_of<2>(w)),
                    to_float(byte_of<3>(w))};
    f(step, row, x);
  };
  for (int64_t step = 0; step < steps; ++step)
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint8_t* at = codes + step * bits * 16 + pair * W * 4;
      const I w = iload(at);
      one(step, pair_row(pair, 0), bits == 8 ? w : low_nibbles(w));
      one(step, pair_row(pair, 1), bits == 8 ? iload(at + 64) : high_nibbles(w));
    }
}

// One number of a packed block whose reduction dimension has index `at`.
template <class E>
TW_INLINE void put(float* out, int64_t ld, int64_t at, int64_t column, bf16 x) {
  float* element = out + at / E::depth * ld + column;
  if constexpr (E::depth == 2)
    reinterpret_cast<bf16*>(element)[at % 2] = x;
  else
    *element = to_float(x);
}

template <class E>
struct QuantisedPack {
  const QuantisedKv& kv;
  const int64_t slot, first, used;  // keys [first, first + used)
  const int64_t coded;              // of these the first ones are codes

  QuantisedPack(const QuantisedKv& cache, int64_t at, int64_t begin, int64_t count)
      : kv(cache),
        slot(at),
        first(begin),
        used(count),
        coded(max64(0, min64(count, cache.quantised - begin))) {}

  // [head_dim / depth][kKeyBlock] elements, zero beyond head_dim; whole blocks of 32 keys, up to `used`.
  void keys(float* out) const {
    const int64_t rows = padded16((kv.head_dim + E::depth - 1) / E::depth),
                  written = kv.k_steps() * 4 / E::depth;
    const int64_t zero_from = coded < used ? 0 : written;
    std::memset(out + zero_from * kKeyBlock, 0, size_t(max64(0, rows - zero_from) * kKeyBlock) * 4);
    for (int64_t j = 0; j < coded; j += 32) {
      const float* token = kv.bits == 8 ? kv.token_scales(kv.k_scales, slot, first + j) : nullptr;
      const bf16* group = kv.bits == 4 ? reinterpret_cast<const bf16*>(kv.k_group(slot, first + j)) : nullptr;
      const int64_t pad = padded16(kv.head_dim);
      for_codes(
          kv.bits, kv.k_block(slot, first + j), kv.k_steps(), [&](int64_t step, int key, const F* codes) {
            F x[4];
            TW_UNROLL for (int i = 0; i < 4; ++i) {
              const int64_t d = step * 4 + i;
              x[i] = kv.bits == 8 ? mul(sub(codes[i], set1(128.0f)), load(token + key))
                                  : fma(codes[i], set1(to_float(group[d])), set1(to_float(group[pad + d])));
            }
            store_elements<E>(out + step * 4 / E::depth * kKeyBlock + j + key, kKeyBlock, x);
          });
    }
    for (int64_t j = coded; j < used; ++j) {
      const bf16* row = reinterpret_cast<const bf16*>(kv.tail_row(kv.k_tail, slot, first + j));
      for (int64_t d = 0; d < kv.head_dim; ++d) put<E>(out, kKeyBlock, d, j, row[d]);
    }
  }

  // [kKeyBlock / depth][padded head_dim] elements, zero beyond `used`. Returns whether one is NaN or
  // infinite.
  bool values(float* out) const {
    const int64_t pad = padded16(kv.head_dim);
    bool bad = false;
    for (int64_t tile = 0; tile < kKeyBlock; tile += 64) {
      float* to = out + tile / E::depth * pad;
      if (tile >= coded) {
        std::memset(to, 0, size_t(64 / E::depth * pad) * 4);
        continue;
      }
      for (int64_t block = 0; block < kv.v_blocks(); ++block) {
        float scales[64] = {}, minima[64] = {};
        for (int64_t j = 0; j < min64(64, coded - tile); ++j) {
          if (kv.bits == 8) {
            scales[j] = kv.token_scales(kv.v_scales, slot, first + tile)[j];
          } else {
            const bf16* group = reinterpret_cast<const bf16*>(kv.v_group(slot, first + tile, block * 32));
            scales[j] = to_float(group[j]);
            minima[j] = to_float(group[64 + j]);
          }
        }
        for_codes(kv.bits, kv.v_block(slot, first + tile, block), 16,
                  [&](int64_t step, int row, const F* codes) {
                    const int64_t channel = block * 32 + row;
                    if (channel >= pad) return;
                    F x[4];
                    TW_UNROLL for (int i = 0; i < 4; ++i) {
                      const F scale = set1(scales[step * 4 + i]);
                      x[i] = kv.bits == 8 ? mul(sub(codes[i], set1(128.0f)), scale)
                                          : fma(codes[i], scale, set1(minima[step * 4 + i]));
                      bad |= any_not_finite(x[i]);
                    }
                    store_elements<E>(to + step * 4 / E::depth * pad + channel, pad, x);
                  });
      }
    }
    for (int64_t j = coded; j < used; ++j) {
      const bf16* row = reinterpret_cast<const bf16*>(kv.tail_row(kv.v_tail, slot, first + j));
      for (int64_t d = 0; d < kv.head_dim; ++d) {
        bad |= !(__builtin_fabsf(to_float(row[d])) < __builtin_inff());
        put<E>(out, pad, j, d, row[d]);
      }
    }
    return bad;
  }
};

}  // namespace

void TW_KERNEL(attention_pack_quantised)(const AttentionArgs& a, int64_t index, void*) {
  const AttentionTask task = a.tasks[index];
  const Sequence& q = a.sequences[task.sequence];
  const int64_t first = q.k_begin + task.block * kKeyBlock, count = min64(kKeyBlock, q.k_end - first);
  const int64_t lo = visible_keys(a, q, 0).begin, hi = visible_keys(a, q, q.q_count - 1).end;
  const int64_t used = min64(count, hi - first), at = packed_index(a, q, task.head, task.block);
  if (used <= 0 || first + kKeyBlock <= lo) return;
  with_operands(a.k.dtype, [&](auto e, auto) {
    const QuantisedPack<decltype(e)> pack(*a.kv, q.k_batch * a.kv_heads + task.head, first, used);
    pack.keys(static_cast<float*>(a.packed_k) + at * packed_block_elements(a.head_dim));
    a.v_not_finite[at] = pack.values(static_cast<float*>(a.packed_v) + at * packed_block_elements(a.v_dim));
  });
}

}  // namespace tilewright
