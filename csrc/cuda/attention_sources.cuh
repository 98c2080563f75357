// Where keys and values of a decode step come from: each kind of cache hands a warp blocks of keys as
// operands of its products, straight from global memory in pieces of 8 or 16 bytes: which token is which
// column, and which channel which row of an operand, follows from what lies together in memory, so nothing
// moves between lanes.
//
// With g = lane / 4, t = lane % 4, in a block of kKeys keys and kTiles = kKeys / 8 tiles of scores:
//   key(i, e)         the key of column 2t + e of tile i
//   channel(n, e)     the channel of column 2t + e of tile n of the output, of which a warp has kOut channels
//   first_channel(j)  the first of the 4 channels of q that a lane multiplies in step j of 16
//   load_keys/values  loads that start early: all that a block needs, but for keys of codes with many
//   channels kUnroll           how many steps of 16 channels are unrolled key_operand       b of step j (16
//   channels) and tile i value_operand     b of step h (16 keys) and tile n; keep: ones where some row
//   attends the key tile_of, column_of   of the i-th of the 4 keys that a lane multiplies in step h place(c)
//   where channel c of a row of the output lies in shared memory, so that lanes use different banks kUnit
//   what the probabilities are multiplied with beside value_factor kParts in how many numbers of T a
//   probability times its factor is multiplied: the factor would be rounded
//                     in one, and with it all of a token
#pragma once
#include "attention_rows.cuh"
#include "mma.cuh"

namespace tw::cuda {

// The 16-bit halves of two words: first | second << 16.
__device__ inline uint32_t low_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ inline uint32_t high_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

__device__ inline uint32_t fma_pair(uint32_t x, uint32_t y, uint32_t z) {  // of bf16, rounded once
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
  return r;
}

// Four codes, stored as code + 128, as two pairs of T; exact.
template <class T>
__device__ void signed_bytes(uint32_t word, uint32_t& low, uint32_t& high);
template <>
__device__ inline void signed_bytes<bf16>(uint32_t word, uint32_t& low, uint32_t& high) {
  // 128 plus the low 7 bits, less 128 or, without the top bit, 256.
  const auto pair = [](uint32_t x) {
    return fma_pair((x & 0x007f007f) | 0x43004300, 0x3f803f80, (x & 0x00800080) ^ 0xc380c380);
  };
  low = pair(__byte_perm(word, 0, 0x4140)), high = pair(__byte_perm(word, 0, 0x4342));
}
template <>
__device__ inline void signed_bytes<f16>(uint32_t word, uint32_t& low, uint32_t& high) {
  const auto pair = [](uint32_t x) {  // 1024 + byte, less 1152
    uint32_t r;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(0x64806480));
    return r;
  };
  low = pair(__byte_perm(word, 0x64646464, 0x4140)), high = pair(__byte_perm(word, 0x64646464, 0x4342));
}

// scale * nibble + minimum of the low nibbles of the 16-bit halves of x; scales and minima are pairs of bf16.
template <class T>
__device__ uint32_t scaled_nibbles(uint32_t x, uint32_t scales, uint32_t minima);
template <>
__device__ inline uint32_t scaled_nibbles<bf16>(uint32_t x, uint32_t scales, uint32_t minima) {
  const uint32_t codes =
      fma_pair((x & 0x000f000f) | 0x43004300, 0x3f803f80, 0xc300c300);  // 128 + nibble, less 128
  return fma_pair(codes, scales, minima);
}
template <>
__device__ inline uint32_t scaled_nibbles<f16>(uint32_t x, uint32_t scales, uint32_t minima) {
  const auto one = [](uint32_t nibble, uint32_t scale, uint32_t minimum) {
    return fmaf(float(nibble), __uint_as_float(scale), __uint_as_float(minimum));
  };
  return pack_pair<f16>(one(x & 15, scales << 16, minima << 16),
                        one(x >> 16 & 15, scales & 0xffff0000, minima & 0xffff0000));
}

// A pair of bf16 as a pair of T.
template <class T>
__device__ uint32_t from_bf16_pair(uint32_t x);
template <>
__device__ inline uint32_t from_bf16_pair<bf16>(uint32_t x) {
  return x;
}
template <>
__device__ inline uint32_t from_bf16_pair<f16>(uint32_t x) {
  return pack_pair<f16>(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
}

// Rows of T, dense or in pages; aligned, and dims are multiples of 8.
template <class T, int kDim, int kOut>
struct DenseKeys {
  static constexpr int kUnroll = kDim / 16;
  static constexpr int kKeys = 16, kTiles = 2, kSteps = 1;
  static constexpr float kUnit = 1;
  static constexpr int kParts = 1;
  const AttentionLaunch& a;
  const Sequence& s;
  int kv_head, part, g, t;
  bool bad = false;  // a page did not exist
  uint4 k[2][kDim / 32], v[4][kOut / 64];

  __device__ DenseKeys(const AttentionLaunch& launch, const Sequence& sequence, int kv_head, int part)
      : a(launch), s(sequence), kv_head(kv_head), part(part), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}

  __device__ int key(int i, int e) const { return 8 * i + 2 * t + e; }
  __device__ int channel(int n, int e) const { return part * kOut + n / 8 * 64 + 16 * t + 8 * e + n % 8; }
  __device__ int first_channel(int j) const { return j / 2 * 32 + 8 * t + j % 2 * 4; }
  __device__ static int place(int c) { return c + c / 32 * 8; }

  // The row of a key in x, or null.
  __device__ const uint16_t* row(const Heads& x, int key, Range seen) {
    if (key < seen.first || key >= seen.end) return nullptr;
    int outer = s.k_row, row = s.k_begin + key;
    if (a.block_table) {
      const unsigned position = row, size = unsigned(a.page_size), page = position / size;
      outer = a.block_table[s.k_row * a.table_stride + page];
      row = position - page * size;
      if (outer < 0 || outer >= a.pages) {
        bad = true;
        return nullptr;
      }
    }
    return static_cast<const uint16_t*>(x.base) + outer * x.batch + kv_head * x.head + row * x.token;
  }
  __device__ static uint4 piece(const uint16_t* row, int column, int dim) {
    if (!row || column >= dim) return make_uint4(0, 0, 0, 0);
    return load_once(reinterpret_cast<const uint4*>(row + column));
  }

  __device__ void load_keys(int block, Range seen) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint16_t* from = row(a.k, block + 8 * i + g, seen);
#pragma unroll
      for (int j = 0; j < kDim / 32; ++j) k[i][j] = piece(from, 32 * j + 8 * t, int(a.head_dim));
    }
  }
  __device__ void load_values(int block, Range seen) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* from = row(a.v, block + i / 2 * 8 + 2 * t + i % 2, seen);
#pragma unroll
      for (int m = 0; m < kOut / 64; ++m) v[i][m] = piece(from, part * kOut + 64 * m + 8 * g, int(a.v_dim));
    }
  }
  __device__ float key_factor(int, int) const { return 1.0f; }
  __device__ float value_factor(int, int) const { return 1.0f; }
  __device__ void key_operand(uint32_t (&b)[2], int j, int i) const {
    const uint4 x = k[i][j / 2];
    b[0] = j % 2 ? x.z : x.x, b[1] = j % 2 ? x.w : x.y;
  }
  __device__ void value_operand(uint32_t (&b)[2], int, int n, const uint32_t (&keep)[2]) const {
    const auto word = [&](int i) {
      const uint4 x = v[i][n / 8];
      const int w = n % 8 / 2;
      return w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i)
      b[i] = (n % 2 ? high_halves(word(2 * i), word(2 * i + 1)) : low_halves(word(2 * i), word(2 * i + 1))) &
             keep[i];
  }
  // The four probabilities of row half `half` that multiply the four keys of a lane in step h, as tile and
  // column.
  __device__ static int tile_of(int, int i) { return i / 2; }
  __device__ static int column_of(int, int i) { return i % 2; }
};

// What caches of codes share: blocks of 32 tokens.
struct CodeKeys {
  static constexpr int kKeys = 32, kTiles = 4, kSteps = 2;
  const AttentionLaunch& a;
  int64_t slot;
  int part, g, t, tiles, k_steps, v_blocks;
  bool bad = false;

  __device__ CodeKeys(const AttentionLaunch& launch, const Sequence& s, int kv_head, int part)
      : a(launch),
        slot(s.k_row * launch.kv_heads + kv_head),
        part(part),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {
    tiles = int((a.capacity + 63) / 64), k_steps = int((a.head_dim + 3) / 4),
    v_blocks = int((a.head_dim + 31) / 32);
  }
  __device__ int first_channel(int j) const { return 16 * j + 4 * t; }
  template <int kStepBytes>
  __device__ const uint8_t* key_block(int block) const {
    return a.kv.k_codes + (slot * tiles * 2 + block / 32) * (int64_t(k_steps) * kStepBytes);
  }
  template <int kStepBytes>
  __device__ const uint8_t* value_block(int block) const {
    return a.kv.v_codes + ((slot * tiles + block / 64) * v_blocks * 16 + block / 32 % 2 * 8) * kStepBytes;
  }
};

// int8 codes with an fp32 scale for each token.
template <class T, int kDim, int kOut>
struct Int8Keys : CodeKeys {
  static constexpr bool kHeld = kDim <= 128;  // a block's keys fit the registers
  static constexpr int kUnroll = kHeld ? kDim / 16 : 2;
  // A scale is a 127th of a token's largest value. Times 64 it is about as large as the values are, so that
  // fp16 holds it as well as it would hold them.
  static constexpr float kUnit = 64;
  static constexpr int kParts = 2;
  uint4 k[kHeld ? kDim / 16 : 1], v[2][kOut / 32];
  int block = 0;
  float k_scale[8], v_scale[8];  // of the lane's tokens

  using CodeKeys::CodeKeys;
  __device__ int key(int i, int e) const { return 16 * e + 4 * t + i; }
  __device__ int channel(int n, int e) const { return part * kOut + n / 4 * 32 + 8 * t + 4 * e + n % 4; }
  __device__ static int place(int c) { return c; }

  __device__ void load_scales(float (&to)[8], const void* scales, int block) const {
    const auto* from =
        reinterpret_cast<const float4*>(static_cast<const float*>(scales) + slot * tiles * 64 + block);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 x = from[4 * i + t];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  }
  __device__ uint4 key_codes(int j) const {
    if (4 * j + t >= k_steps) return make_uint4(0, 0, 0, 0);
    return load_once(reinterpret_cast<const uint4*>(key_block<128>(block)) + (4 * j + t) * 8 + g % 2 * 4 +
                     g / 2);
  }
  __device__ void load_keys(int from, Range) {
    block = from;
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) k[j] = key_codes(j);
    }
    load_scales(k_scale, a.kv.k_scales, block);
  }
  __device__ void load_values(int block, Range) {
    const auto* from = reinterpret_cast<const uint4*>(value_block<128>(block));
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int m = 0; m < kOut / 32; ++m)
        v[h][m] = part * (kOut / 32) + m < v_blocks
                      ? load_once(from + ((part * (kOut / 32) + m) * 16 + 4 * h + t) * 8 + g)
                      : make_uint4(0, 0, 0, 0);
    load_scales(v_scale, a.kv.v_scales, block);
  }
  __device__ float key_factor(int i, int e) const { return k_scale[4 * e + i]; }
  __device__ float value_factor(int i, int e) const { return v_scale[4 * e + i] * kUnit; }
  __device__ static uint32_t word(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }
  __device__ void key_operand(uint32_t (&b)[2], int j, int i) const {
    signed_bytes<T>(word(kHeld ? k[kHeld ? j : 0] : key_codes(j), i), b[0], b[1]);
  }
  __device__ void value_operand(uint32_t (&b)[2], int h, int n, const uint32_t (&)[2]) const {
    signed_bytes<T>(word(v[h][n / 4], n % 4), b[0], b[1]);
  }
  __device__ static int tile_of(int, int i) { return i; }
  __device__ static int column_of(int h, int) { return h; }
};

// 4-bit codes: a scale and minimum for each channel of a group of tokens (keys), and for each token's group
// of channels (values), bf16.
template <class T, int kDim, int kOut>
struct Int4Keys : CodeKeys {
  static constexpr bool kHeld = kDim <= 128;
  static constexpr int kUnroll = kHeld ? kDim / 16 : 4;
  static constexpr float kUnit = 1;
  static constexpr int kParts = 1;
  uint2 k[kHeld ? kDim / 16 : 1], v[2][kOut / 32];
  int block = 0;

  using CodeKeys::CodeKeys;
  __device__ int key(int i, int e) const { return 4 * t + 2 * e + i % 2 + i / 2 * 16; }
  __device__ static int place(int c) { return c / 32 * 32 + c % 16 / 4 * 8 + c / 16 % 2 * 4 + c % 4; }
  __device__ int channel(int n, int e) const {
    return part * kOut + n / 4 * 32 + 4 * t + 2 * e + n % 2 + n % 4 / 2 * 16;
  }

  __device__ uint2 key_codes(int j) const {
    if (4 * j + t >= k_steps) return make_uint2(0, 0);
    return reinterpret_cast<const uint2*>(key_block<64>(block))[(4 * j + t) * 8 + g];
  }
  __device__ void load_keys(int from, Range) {
    block = from;
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) k[j] = key_codes(j);
    }
  }
  __device__ void load_values(int from, Range) {
    const auto* codes = reinterpret_cast<const uint2*>(value_block<64>(from));
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int m = 0; m < kOut / 32; ++m)
        v[h][m] = part * (kOut / 32) + m < v_blocks
                      ? codes[((part * (kOut / 32) + m) * 16 + 4 * h + t) * 8 + g]
                      : make_uint2(0, 0);
  }
  __device__ float key_factor(int, int) const { return 1.0f; }
  __device__ float value_factor(int, int) const { return 1.0f; }
  __device__ void key_operand(uint32_t (&b)[2], int j, int i) const {
    if (4 * j + t >= k_steps) {
      b[0] = b[1] = 0;
      return;
    }
    const int padded = int((a.head_dim + 15) / 16 * 16);
    const int64_t groups = (a.capacity + a.kv.group - 1) / a.kv.group;
    const auto* scales = static_cast<const uint16_t*>(a.kv.k_scales) +
                         (slot * groups + block / int(a.kv.group)) * 2 * padded + first_channel(j);
    const uint2 scale = *reinterpret_cast<const uint2*>(scales);
    const uint2 minimum = *reinterpret_cast<const uint2*>(scales + padded);
    const uint2 codes = kHeld ? k[kHeld ? j : 0] : key_codes(j);
    const uint32_t word = (i % 2 ? codes.y : codes.x) >> (i / 2 * 4);
    b[0] = scaled_nibbles<T>(__byte_perm(word, 0, 0x4140), scale.x, minimum.x);
    b[1] = scaled_nibbles<T>(__byte_perm(word, 0, 0x4342), scale.y, minimum.y);
  }
  __device__ void value_operand(uint32_t (&b)[2], int h, int n, const uint32_t (&keep)[2]) const {
    const int m = n / 4, at = part * (kOut / 32) + m, group = at * 32 / int(a.kv.group);
    if (at >= v_blocks) {
      b[0] = b[1] = 0;
      return;
    }
    const int groups = int((a.head_dim + a.kv.group - 1) / a.kv.group);
    const auto* scales = static_cast<const uint16_t*>(a.kv.v_scales) +
                         ((slot * tiles + block / 64) * groups + group) * 128 + block % 64 + 16 * h + 4 * t;
    const uint2 scale = *reinterpret_cast<const uint2*>(scales),
                minimum = *reinterpret_cast<const uint2*>(scales + 64);
    const uint32_t word = (n % 2 ? v[h][m].y : v[h][m].x) >> (n % 4 / 2 * 4);
    b[0] = scaled_nibbles<T>(__byte_perm(word, 0, 0x4140), scale.x, minimum.x) & keep[0];
    b[1] = scaled_nibbles<T>(__byte_perm(word, 0, 0x4342), scale.y, minimum.y) & keep[1];
  }
  __device__ static int tile_of(int h, int i) { return 2 * h + i % 2; }
  __device__ static int column_of(int, int i) { return i / 2; }
};

// The newest tokens of a cache of 4-bit codes: bf16 rows, placed as Int4Keys places them.
template <class T, int kDim, int kOut>
struct TailKeys : CodeKeys {
  static constexpr int kUnroll = kDim > 128 ? 4 : kDim / 16;
  static constexpr float kUnit = 1;
  static constexpr int kParts = 1;
  int first = 0, block = 0;  // the first token of the tail
  Range seen = {0, 0};

  using CodeKeys::CodeKeys;
  __device__ int key(int i, int e) const { return 4 * t + 2 * e + i % 2 + i / 2 * 16; }
  __device__ void load_keys(int from, Range range) { block = from, seen = range; }
  __device__ void load_values(int, Range) {}
  __device__ float key_factor(int, int) const { return 1.0f; }
  __device__ float value_factor(int, int) const { return 1.0f; }
  __device__ const uint16_t* row(const void* tail, int token) const {
    if (token < seen.first || token >= seen.end) return nullptr;
    return static_cast<const uint16_t*>(tail) + (slot * a.kv.tail_rows + token - first) * a.head_dim;
  }
  // Channels `channel` and the next one of a token.
  __device__ uint32_t pair(const uint16_t* row, int channel) const {
    const int dim = int(a.head_dim);
    if (!row || channel >= dim) return 0;
    if (dim % 2 == 0) return *reinterpret_cast<const uint32_t*>(row + channel);
    return row[channel] | (channel + 1 < dim ? uint32_t(row[channel + 1]) << 16 : 0);
  }
  __device__ void key_operand(uint32_t (&b)[2], int j, int i) const {
    const uint16_t* from = row(a.kv.k_tail, block + 2 * g + i % 2 + i / 2 * 16);
    const int channel = first_channel(j);
    uint2 x = {0, 0};
    if (a.head_dim % 4 == 0) {
      if (from && channel < a.head_dim) x = *reinterpret_cast<const uint2*>(from + channel);
    } else {
      x = {pair(from, channel), pair(from, channel + 2)};
    }
    b[0] = from_bf16_pair<T>(x.x), b[1] = from_bf16_pair<T>(x.y);
  }
  __device__ void value_operand(uint32_t (&b)[2], int h, int n, const uint32_t (&keep)[2]) const {
    const int token = block + 16 * h + 4 * t, channel = part * kOut + n / 4 * 32 + 2 * g + n % 4 / 2 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t x = pair(row(a.kv.v_tail, token + 2 * half), channel);
      const uint32_t y = pair(row(a.kv.v_tail, token + 2 * half + 1), channel);
      b[half] = from_bf16_pair<T>(n % 2 ? high_halves(x, y) : low_halves(x, y)) & keep[half];
    }
  }
  __device__ static int tile_of(int h, int i) { return 2 * h + i % 2; }
  __device__ static int column_of(int, int i) { return i / 2; }
};

}  // namespace tw::cuda
