// Scores with more to them than scale, causality and window: bias, mask, ALiBi, softcap, dropout. And in
// which order a tile has its keys, so that lanes read a bias or mask in pieces.
#pragma once
#include <type_traits>

#include "attention_rows.cuh"

namespace tw::cuda {

// x moved by a coordinate: splitmix64's finaliser (Steele, Lea & Flood 2014).
__device__ inline uint64_t mixed(uint64_t x, uint32_t coordinate) {
  x += (uint64_t(coordinate) + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What a row's scores depend on beside q and k, where a call has more than scale, causality and window.
struct ScoreRow {
  int64_t bias, mask;  // of the row's first key
  float slope;
  int diagonal;
  uint32_t first, second;  // of its dropout
};
__device__ inline ScoreRow score_row(const AttentionArgs& a, const Sequence& s, int head, int query) {
  ScoreRow r;
  r.bias = s.index * a.bias.batch + head * a.bias.head + query * a.bias.row + s.k_begin * a.bias.key;
  r.mask = s.index * a.mask.batch + head * a.mask.head + query * a.mask.row + s.k_begin * a.mask.key;
  r.slope = a.alibi ? a.alibi[s.index * a.alibi_batch + head] : 0.0f;
  r.diagonal = query + s.shift;
  r.first = r.second = 0;
  if (a.keep < 1.0f) {
    const uint64_t x = mixed(mixed(mixed(*a.seed, s.index), head), query);
    r.first = uint32_t(x), r.second = uint32_t(x >> 32);
  }
  return r;
}

__device__ inline float read_score(const AttentionScores& t, int64_t at) {
  if (t.type == Type::f32) return static_cast<const float*>(t.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(t.data)[at];
  return t.type == Type::bf16 ? to_float(__ushort_as_bfloat16(bits)) : to_float(__ushort_as_half(bits));
}

// What mask and bias say of a key.
struct ScoreTerms {
  float bias;
  bool masked;
};
__device__ inline ScoreTerms score_terms(const AttentionArgs& a, const ScoreRow& r, int key) {
  return {a.bias.data ? read_score(a.bias, r.bias + key * a.bias.key) : 0.0f,
          a.mask.data && !static_cast<const uint8_t*>(a.mask.data)[r.mask + key * a.mask.key]};
}

// The score of a key that the row sees by causality and window, from q k^T; -inf where it is masked. slant
// becomes d score / d (scale * q k^T).
__device__ inline float general_score(const AttentionArgs& a, const ScoreRow& r, float product, int key,
                                      const ScoreTerms& terms, float& slant) {
  float x = product * a.scale;
  slant = 1.0f;
  if (a.softcap > 0) {
    const float t = tanh_accurate(__fdividef(x, a.softcap));
    x = a.softcap * t;
    slant = fmaf(-t, t, 1.0f);
  }
  if (a.alibi) x -= r.slope * fabsf(float(key - r.diagonal));
  // A bias of -inf masks, whatever the score is.
  return terms.masked || terms.bias == -kInfinity ? -kInfinity : x + terms.bias;
}

// Whether dropout keeps the row's weight of a key.
__device__ inline bool is_kept(const ScoreRow& r, float limit, int key) {
  uint32_t h = uint32_t(key) + r.first;
  h = (h ^ (h >> 16)) * 0x21f0aaadu;
  h = (h ^ (h >> 15)) + r.second;
  h = (h ^ (h >> 15)) * 0x735a2d97u;
  h ^= h >> 15;
  return float(h >> 8) < limit;
}
__device__ inline float drop_limit(const AttentionArgs& a) { return a.keep * 16777216.0f; }

// Which of a tile's keys is which column of a product: lane t of four, which holds the columns 8 i + 2 t + e
// of its rows, has `run` consecutive keys at a time, and the four lanes' runs lie one behind the other. With
// 2 a key's number is its column's.
struct KeyOrder {
  int run = 2;         // 2, 4 or 8
  bool whole = false;  // a bias or mask can be read in such runs
  __device__ int key(int i, int t, int e) const {
    const int tiles = run / 2;
    return i / tiles * (4 * run) + run * t + i % tiles * 2 + e;
  }
  __device__ int key_of(int column) const { return key(column / 8, column % 8 / 2, column % 2); }
};

// The order for tiles of `keys` keys, the first of which is a multiple of `keys` keys behind key `from`.
__device__ inline KeyOrder key_order(const AttentionLaunch& a, int keys, int from) {
  int run = min(a.score_run, keys / 4);
  while (from % run) run /= 2;
  return {max(run, 2), run > 1};
}

// kRun numbers of a bias from `at` on, a multiple of kRun.
template <int kRun>
__device__ inline void read_scores(const AttentionScores& t, int64_t at, float* to) {
  if (t.type == Type::f32) {
    const float* from = static_cast<const float*>(t.data) + at;
    if constexpr (kRun == 2) {
      const float2 x = *reinterpret_cast<const float2*>(from);
      to[0] = x.x, to[1] = x.y;
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(from + i);
        to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
      }
    }
    return;
  }
  uint32_t words[kRun / 2];
  const uint16_t* from = static_cast<const uint16_t*>(t.data) + at;
  if constexpr (kRun == 8) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  } else if constexpr (kRun == 4) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const uint16_t bits = uint16_t(words[i / 2] >> (16 * (i % 2)));
    to[i] = t.type == Type::bf16 ? to_float(__ushort_as_bfloat16(bits)) : to_float(__ushort_as_half(bits));
  }
}
// A bit for each of the kRun keys from `at` on, a multiple of kRun, that a mask leaves out.
template <int kRun>
__device__ inline uint32_t read_masked(const AttentionScores& t, int64_t at) {
  const uint8_t* from = static_cast<const uint8_t*>(t.data) + at;
  uint32_t words[2] = {}, bits = 0;
  if constexpr (kRun == 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  } else if constexpr (kRun == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) bits |= uint32_t((words[i / 4] >> (8 * (i % 4)) & 0xff) == 0) << i;
  return bits;
}

// What mask and bias say of some of a lane's keys; a bit of `masked` for each.
template <int kCount>
struct KeyTerms {
  static_assert(kCount <= 32, "a bit for each key");
  float bias[kCount] = {};
  uint32_t masked = 0;

  __device__ ScoreTerms operator[](int i) const { return {bias[i], (masked >> i & 1) != 0}; }

  // Reads places [i, i + kRun), the keys from `key` on, of which the row sees those in `seen`. whole: what
  // exists can be read at once.
  template <int kRun>
  __device__ void read(const AttentionArgs& a, const Sequence& s, const ScoreRow& r, int i, int key,
                       bool whole, Range seen) {
    if (key + kRun <= seen.first || key >= seen.end) return;
    if (!whole || key + kRun > s.keys) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (key + j < seen.first || key + j >= seen.end) continue;
        const ScoreTerms x = score_terms(a, r, key + j);
        bias[i + j] = x.bias;
        masked |= uint32_t(x.masked) << (i + j);
      }
      return;
    }
    if (a.bias.data && a.bias.key) {
      read_scores<kRun>(a.bias, r.bias + key, bias + i);
    } else if (a.bias.data) {
      const float x = read_score(a.bias, r.bias);
#pragma unroll
      for (int j = 0; j < kRun; ++j) bias[i + j] = x;
    }
    if (a.mask.data && a.mask.key)
      masked |= read_masked<kRun>(a.mask, r.mask + key) << i;
    else if (a.mask.data && !static_cast<const uint8_t*>(a.mask.data)[r.mask])
      masked |= ((1u << kRun) - 1) << i;
  }
};

// Of a lane's keys of a tile that begins with key `from`; column 8 i + 2 t + e is in place 2 i + e.
template <int kCount>
__device__ inline KeyTerms<kCount> tile_terms(const AttentionArgs& a, const Sequence& s, const ScoreRow& r,
                                              int from, KeyOrder order, Range seen) {
  KeyTerms<kCount> terms;
  const int t = threadIdx.x % 4;
  const auto in_runs = [&](auto length) {
    constexpr int kRun = decltype(length)::value;
#pragma unroll
    for (int i = 0; kRun <= kCount && i < kCount; i += kRun)
      terms.template read<kRun>(a, s, r, i, from + order.key(i / 2, t, 0), order.whole, seen);
  };
  if (order.run == 8)
    in_runs(std::integral_constant<int, 8>{});
  else if (order.run == 4)
    in_runs(std::integral_constant<int, 4>{});
  else
    in_runs(std::integral_constant<int, 2>{});
  return terms;
}

}  // namespace tw::cuda
