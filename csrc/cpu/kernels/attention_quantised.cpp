// Attention to a quantised KV cache (cpu/quantised_kv.h) for few rows, in integers: the codes are never
// turned into numbers. Queries and weights become fixed point, 16 bits for bf16 queries and 23 for wider
// ones, as digits of 8 bits that meet the codes in exact u8 x s8 dot products:
//   8 bits   score = key scale * step * (digits . codes); weight of a value = probability * its scale
//   4 bits   per group of tokens, score = step * (digits of q * scale . codes) + q . minima; values likewise
//   per
//            group of channels. Tokens of the bf16 tail are widened to float.
// A task reads its codes and scales once (about half, or a third, of bf16's bytes); the dot products bind it.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_decode.h"
#include "cpu/kernels/packed.h"
#include "cpu/quantised_kv.h"

namespace tilewright {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 4;  // 16 or 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 2;  // 8 or 12 of 16
#else
constexpr int kRows = 1;
#endif

// The largest fixed-point number of P digits. With three it is below 2^22, where round_even ends at every
// level.
template <int P>
constexpr float kTop = P == 2 ? 127.0f * 256 : 63.0f * 65536;

// Rows in fixed point: x = step * sum over p of 256^(P - 1 - p) * digits[row][p], off by at most step / 2.
template <int bits, int P>
struct Digits {
  int8_t* digits;  // [rows][P][ld]
  int64_t ld;
  float step[kDecodeRows];
  int32_t start[kDecodeRows][P];  // what takes the 8-bit codes' offset of 128 out of a dot product

  TW_INLINE const int8_t* row(int64_t r) const { return digits + r * P * ld; }

  // Row r becomes x[0, n), n a multiple of W. A NaN or infinity gives a step of NaN.
  TW_INLINE void set(int64_t r, const float* x, int64_t n) {
    F most = zero(), bad = zero();
    for (int64_t i = 0; i < n; i += W) {
      const F v = load(x + i);
      most = max(most, abs(v));
      bad = add(bad, sub(v, v));
    }
    int8_t* out = digits + r * P * ld;
    const float top = reduce_max(most);
    step[r] = any_nan(bad) ? __builtin_nanf("") : top * (1.0f / kTop<P>);
    TW_UNROLL for (int p = 0; p < P; ++p) start[r][p] = 0;
    if (!(step[r] >= 1.17549435e-38f)) {  // nothing there, or no number of normal size
      if (step[r] == step[r]) step[r] = 0.0f;
      std::memset(out, 0, size_t(P * ld));
      return;
    }
    const F inverse = set1(kTop<P> / top);
    F sums[P];
    TW_UNROLL for (int p = 0; p < P; ++p) sums[p] = zero();
    for (int64_t i = 0; i < n; i += W) {
      F rest = round_even(mul(load(x + i), inverse));
      TW_UNROLL for (int p = P - 1; p > 0; --p) {
        // Never halfway between two integers, so that the digit is in [-128, 127].
        const F high = round_even(fma(rest, set1(1.0f / 256), set1(0.5f / 256)));
        const F digit = fma(high, set1(-256.0f), rest);
        store_s8(out + p * ld + i, digit);
        sums[p] = add(sums[p], digit);
        rest = high;
      }
      store_s8(out + i, rest);
      sums[0] = add(sums[0], rest);
    }
    if constexpr (bits == 8) {
      TW_UNROLL for (int p = 0; p < P; ++p) start[r][p] = -128 * int32_t(reduce_add(sums[p]));
    }
  }
};

// Asks for the head of each page of [at, at + bytes).
TW_INLINE void prefetch_heads(const uint8_t* at, int64_t bytes) {
  Prefetch heads{at, int(Prefetch::kHead), true};
  for (int64_t i = 0; i < bytes; i += heads.bytes) heads.next();
}

// out[i][h] = digits of rows [r, r + N) . rows pair_row(pair, h) of a block of codes. With 4 bits the same
// place `ahead` bytes further on is fetched meanwhile (bench/NOTES.md: with 8 that costs more than it saves).
template <int bits, int P, int N>
TW_INLINE void dot_block(const Digits<bits, P>& x, int64_t r, const uint8_t* codes, int64_t steps, int pair,
                         [[maybe_unused]] int64_t ahead, F out[N][2]) {
  using D = Dot<8>;
  constexpr int64_t kStep = bits * 16;
  typename D::Acc acc[N][P][2];
  TW_UNROLL for (int i = 0; i < N; ++i) {
    TW_UNROLL for (int p = 0; p < P; ++p) acc[i][p][0] = acc[i][p][1] = D::start(iset1(x.start[r + i][p]));
  }
  const int8_t* rows = x.row(r);
  const int64_t ld = x.ld;
  codes += pair * W * 4;
  const auto step = [&](int64_t s) {
    const uint8_t* at = codes + s * kStep;
    I low, high;
    if constexpr (bits == 8) {
      low = iload(at);
      high = iload(at + 64);
    } else {
      __builtin_prefetch(at + ahead);
      const I both = in_register(iload(at));
      low = low_nibbles(both);
      high = high_nibbles(both);
    }
    TW_UNROLL for (int i = 0; i < N; ++i) {
      TW_UNROLL for (int p = 0; p < P; ++p) {
        const int8_t* four = rows + (i * P + p) * ld + s * 4;
        acc[i][p][0] = D::step(acc[i][p][0], low, four);
        acc[i][p][1] = D::step(acc[i][p][1], high, four);
      }
    }
  };
  // Four at a time: gcc copies accumulators from one turn of a loop to the next.
  for (; steps >= 4; steps -= 4, codes += 4 * kStep, rows += 16) {
    TW_UNROLL for (int s = 0; s < 4; ++s) step(s);
  }
  for (int64_t s = 0; s < steps; ++s) step(s);
  TW_UNROLL for (int i = 0; i < N; ++i) {
    TW_UNROLL for (int h = 0; h < 2; ++h) {
      F sum = to_float(acc[i][0][h]);
      TW_UNROLL for (int p = 1; p < P; ++p) sum = fma(sum, set1(256.0f), to_float(acc[i][p][h]));
      out[i][h] = sum;
    }
  }
}

// f(row, half's first row in the block, step * dot product), for all rows and a whole block.
template <int bits, int P, class Fn>
TW_INLINE void for_block(const Digits<bits, P>& x, int64_t rows, const uint8_t* codes, int64_t steps,
                         int64_t ahead, Fn&& f) {
  in_tiles<kRows>(0, rows, [&](int64_t r, auto n) {
    for (int pair = 0; pair < kPairs; ++pair) {
      F dot[n.n][2];
      dot_block<bits, P, n.n>(x, r, codes, steps, pair, ahead, dot);
      TW_UNROLL for (int i = 0; i < n.n; ++i) {
        TW_UNROLL for (int h = 0; h < 2; ++h)
            f(r + i, pair_row(pair, h), mul(dot[i][h], set1(x.step[r + i])));
      }
    }
  });
}

template <int bits, int P>
struct QuantisedDecode {
  const AttentionArgs& a;
  const QuantisedKv& kv;
  const DecodeTask t;
  const int64_t slot, pad;
  State s;
  float *queries, *row;
  Digits<bits, P> query, weight;
  // 4 bits: a row's product with the minima of the keys, for the group whose scales are in `query`, and of
  // the values.
  float key_constant[kDecodeRows], value_constant[kDecodeRows];
  int64_t query_group = -1;

  QuantisedDecode(const AttentionArgs& args, int64_t task, float* memory)
      : a(args),
        kv(*args.kv),
        t(args, task),
        slot(t.q.k_batch * kv.kv_heads + t.h),
        pad(padded16(kv.head_dim)) {
    s.ld = kDecodeChunk;
    s.v_pad = pad;
    queries = memory;
    s.scores = queries + kDecodeRows * pad;
    s.probabilities = s.scores + kDecodeRows * kDecodeChunk;
    s.out = s.probabilities + kDecodeRows * kDecodeChunk;
    s.max = s.out + kDecodeRows * pad;
    s.sum = s.max + kDecodeRows;
    row = s.sum + kDecodeRows;
    query.digits = reinterpret_cast<int8_t*>(row + max64(pad, kTileKeys));
    query.ld = pad;
    weight.digits = query.digits + kDecodeRows * P * pad;
    weight.ld = kTileKeys;
  }

  // The queries times a group's scales, and their products with its minima.
  void scale_queries(int64_t token) {
    if (query_group == token / kv.group) return;
    query_group = token / kv.group;
    const bf16* scales = reinterpret_cast<const bf16*>(kv.k_group(slot, token));
    for (int64_t r = 0; r < t.rows; ++r) {
      F sum = zero();
      for (int64_t d = 0; d < pad; d += W) {
        const F x = load(queries + r * pad + d);
        store(row + d, mul(x, load(scales + d)));
        sum = fma(x, load(scales + pad + d), sum);
      }
      query.set(r, row, pad);
      key_constant[r] = reduce_add(sum);
    }
  }

  // Scores of keys [from, coded) of the chunk, from the beginning to the end of a block of 32.
  void coded_scores(int64_t from, int64_t coded) {
    const int64_t first = t.begin;
    for (int64_t j = from / 32 * 32; j < coded; j += 32) {
      const int64_t ahead = 2 * kv.k_block_bytes();
      if constexpr (bits == 8) {  // the next keys, and these tokens' share of the tile's values
        const int64_t half = kv.v_blocks() * kv.v_block_bytes() / 2;
        prefetch_heads(kv.k_block(slot, first + j + 32), kv.k_block_bytes());
        prefetch_heads(kv.v_block(slot, first + j / 64 * 64, 0) + j / 32 % 2 * half, half);
      }
      if constexpr (bits == 4) scale_queries(first + j);
      const float* scales = bits == 8 ? kv.token_scales(kv.k_scales, slot, first + j) : nullptr;
      for_block(query, t.rows, kv.k_block(slot, first + j), kv.k_steps(), ahead,
                [&](int64_t r, int at, F dot) {
                  F score;
                  if constexpr (bits == 8)
                    score = mul(dot, load(scales + at));
                  else
                    score = add(dot, set1(key_constant[r]));
                  store(s.scores + r * s.ld + j + at, score);
                });
    }
  }

  // Adds those of the first `coded` values of the tile at key `tile` of the chunk whose flag in `seen` is
  // set.
  void add_coded_values(int64_t tile, int64_t coded, const uint8_t* seen) {
    const int64_t first = t.begin + tile;
    for (int64_t block = 0; block < kv.v_blocks(); ++block) {
      if (block * 32 % (bits == 8 ? kv.v_blocks() * 32 : kv.group) == 0) weigh(tile, block * 32, seen);
      const int64_t ahead = kv.v_blocks() * kv.v_block_bytes();
      for_block(weight, t.rows, kv.v_block(slot, first, block), (min64(kTileKeys, coded) + 3) / 4, ahead,
                [&](int64_t r, int at, F dot) {
                  const int64_t channel = block * 32 + at;
                  if (channel >= pad) return;
                  float* out = s.out + r * pad + channel;
                  if constexpr (bits == 4) dot = add(dot, set1(value_constant[r]));
                  store(out, add(load(out), dot));
                });
    }
  }

  // The weights of values for the channels that share scales with `channel`: probability * scale.
  void weigh(int64_t tile, int64_t channel, const uint8_t* seen) {
    const int64_t first = t.begin + tile;
    for (int64_t r = 0; r < t.rows; ++r) {
      const float* p = s.probabilities + r * s.ld + tile;
      F sum = zero();
      for (int64_t j = 0; j < kTileKeys; j += W) {
        F scale;
        if constexpr (bits == 8) {
          scale = load(kv.token_scales(kv.v_scales, slot, first) + j);
        } else {
          const bf16* scales = reinterpret_cast<const bf16*>(kv.v_group(slot, first, channel));
          scale = load(scales + j);
          sum = add(sum, select_nonzero(seen + j, W, mul(load(p + j), load(scales + kTileKeys + j)), zero()));
        }
        store(row + j, select_nonzero(seen + j, W, mul(load(p + j), scale), zero()));
      }
      weight.set(r, row, kTileKeys);
      if constexpr (bits == 4) value_constant[r] = reduce_add(sum);
    }
  }

  TW_INLINE F tail_values(const bf16* x, int64_t d) const {
    const int64_t left = kv.head_dim - d;
    return left >= W ? load(x + d) : load(x + d, int(left));
  }
  void tail_scores(int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
      const bf16* k = reinterpret_cast<const bf16*>(kv.tail_row(kv.k_tail, slot, t.begin + j));
      for (int64_t r = 0; r < t.rows; ++r) {
        F sum = zero();
        for (int64_t d = 0; d < kv.head_dim; d += W)
          sum = fma(load(queries + r * pad + d), tail_values(k, d), sum);
        s.scores[r * s.ld + j] = reduce_add(sum);
      }
    }
  }
  void add_tail_values(int64_t from, int64_t to, const uint8_t* seen) {
    for (int64_t j = from; j < to; ++j) {
      if (!seen[j]) continue;
      const bf16* v = reinterpret_cast<const bf16*>(kv.tail_row(kv.v_tail, slot, t.begin + j));
      for (int64_t r = 0; r < t.rows; ++r) {
        const F p = set1(s.probabilities[r * s.ld + j]);
        float* out = s.out + r * pad;
        for (int64_t d = 0; d < kv.head_dim; d += W) store(out + d, fma(p, tail_values(v, d), load(out + d)));
      }
    }
  }

  void run() {
    t.start(queries, pad, s);
    if constexpr (bits == 8) {
      for (int64_t r = 0; r < t.rows; ++r) query.set(r, queries + r * pad, pad);
    }
    // Keys [from, count) of the chunk are in some row's range, those before `coded` are codes.
    const int64_t count = min64(t.hi, t.end) - t.begin, from = max64(0, t.lo - t.begin);
    if (from < count) {
      const int64_t coded = max64(0, min64(count, kv.quantised - t.begin));
      coded_scores(from, coded);
      if constexpr (bits == 4) tail_scores(coded, count);
      softmax_rows<float>(a, s, t.rows, t.b, t.h, 0, t.begin, count);
      // Keys that no row attends do not count, whatever their scales are.
      uint8_t seen[kDecodeChunk];
      for (int64_t j = 0; j < kDecodeChunk; ++j) seen[j] = j >= from && j < count;
      if (is_general(a)) {
        for (int64_t j = from; j < count; ++j) seen[j] = is_seen(a, s, t.rows, from, count, j);
      }
      if constexpr (bits == 4) add_tail_values(coded, count, seen);
      for (int64_t j = coded; j < kDecodeChunk; ++j) seen[j] = 0;
      for (int64_t tile = from / kTileKeys * kTileKeys; tile < coded; tile += kTileKeys)
        add_coded_values(tile, coded - tile, seen + tile);
    }
    t.finish(s);
  }
};

}  // namespace

void TW_KERNEL(attention_decode_quantised)(const AttentionArgs& a, int64_t task, void* memory) {
  float* scratch = static_cast<float*>(memory);
  const bool wide = a.q.dtype != Storage::bf16;
  if (a.kv->bits == 8)
    wide ? QuantisedDecode<8, 3>(a, task, scratch).run() : QuantisedDecode<8, 2>(a, task, scratch).run();
  else
    wide ? QuantisedDecode<4, 3>(a, task, scratch).run() : QuantisedDecode<4, 2>(a, task, scratch).run();
}

}  // namespace tilewright
