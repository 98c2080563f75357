// What the kernels of quantised linear layers share: codes as floats, scales on their way to shared memory,
// and which tile a block computes.
#pragma once
#include "convert.cuh"
#include "linear.h"
#include "memory.cuh"

namespace tw::cuda {

__device__ inline float load_float(const void* p, Type type, int64_t at) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(p)[at];
    case Type::bf16:
      return to_float(static_cast<const bf16*>(p)[at]);
    default:
      return to_float(static_cast<const f16*>(p)[at]);
  }
}

__device__ inline void store_float(void* p, Type type, int64_t at, float x) {
  switch (type) {
    case Type::f32:
      static_cast<float*>(p)[at] = x;
      return;
    case Type::bf16:
      static_cast<bf16*>(p)[at] = from_float<bf16>(x);
      return;
    case Type::f16:
      static_cast<f16*>(p)[at] = from_float<f16>(x);
      return;
  }
}

// What the columns of a group share: .x the scale, .y the zero point or minimum.
__device__ inline float2 scale_at(const GpuWeight& w, int64_t rows, int64_t row, int column) {
  const int group = w.group ? min(column / w.group, w.groups - 1) : 0;
  const int64_t at = group * rows + row;
  float2 s{load_float(w.scales, w.scale_type, at), float(w.middle)};
  if (w.offset == Offset::zero) s.y = static_cast<const uint8_t*>(w.offsets)[at];
  if (w.offset == Offset::min) s.y = load_float(w.offsets, w.scale_type, at);
  return s;
}

// A code as a float, plus kBase: its bits in the mantissa of a power of two, for one shift and one logical
// operation. The weight is then scale * (that) + shift.
template <int BITS>
struct Codes {
  static constexpr float kBase = BITS == 4 ? 128.0f : 256.0f;
  // 4 bits: nibble i of the word; 8 bits: byte i.
  static __device__ float value(uint32_t word, int i) {
    if constexpr (BITS == 4) {  // the last bit of 128's mantissa that is worth 1 is bit 16
      const uint32_t moved = i < 4 ? word << (16 - 4 * i) : word >> (4 * i - 16);
      return __uint_as_float((moved & 0x000f0000u) | 0x43000000u);
    } else {  // bit 15
      const uint32_t moved = i < 2 ? word << (15 - 8 * i) : word >> (8 * i - 15);
      return __uint_as_float((moved & 0x007f8000u) | 0x43800000u);
    }
  }
};

// (scale, shift) for Codes.
template <int BITS>
__device__ float2 scale_and_shift(const GpuWeight& w, float2 s) {
  constexpr float kBase = Codes<BITS>::kBase;
  return {s.x, w.offset == Offset::min ? fmaf(s.x, -kBase, s.y) : -s.x * (kBase + s.y)};
}

// The rows [first, end) of x and out that a block computes, and the rows of w: those of its expert from
// `weight` on.
struct TileRows {
  int first = 0, end = 0;
  int64_t weight = 0;
  bool known = true;  // false: rows that no expert has
};

// Tiles of BM rows by BN outputs, 8 tiles below each other sharing their part of w in the L2 cache. With
// experts tile_m counts over the tiles of all of them.
template <int BM>
__device__ TileRows rows_of_tile(const LinearArgs& a, int tile_m) {
  if (!a.group_sizes) return {tile_m * BM, min(a.m, tile_m * BM + BM), 0, true};
  int begin = 0;
  for (int e = 0; e <= a.experts; ++e) {  // the last round: what is left
    const int64_t size = e < a.experts ? a.group_sizes[e] : a.m;
    const int end = static_cast<int>(min(int64_t{a.m}, begin + max(size, int64_t{0})));
    const int tiles = (end - begin + BM - 1) / BM;
    if (tile_m < tiles) {
      const int first = begin + tile_m * BM;
      return {first, min(end, first + BM), e < a.experts ? int64_t{e} * a.n : 0, e < a.experts};
    }
    tile_m -= tiles;
    begin = end;
  }
  return {0, 0, 0, true};
}

struct Tile {
  int m, n;
};
__device__ inline Tile tile_of(int index, int tiles_m, int tiles_n) {
  constexpr int kBand = 8;
  const int band = kBand * tiles_n, first = index / band * kBand;
  const int height = min(tiles_m - first, kBand), within = index % band;
  return {first + within % height, within / height};
}

__device__ inline uint32_t pack_outputs(Type type, float low, float high) {
  return type == Type::bf16 ? pack_pair<bf16>(low, high) : pack_pair<f16>(low, high);
}

// Outputs of a row in pieces of 8 bytes and more.
__device__ inline bool whole_outputs(const LinearArgs& a) {
  return a.n % 8 == 0 && reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
}

// Two neighbouring outputs as they are stored; column is even.
__device__ inline float2 finished(const LinearArgs& a, const TileRows& rows, int column, float low,
                                  float high) {
  if (!rows.known) low = high = __int_as_float(0x7fc00000);
  if (a.bias) {
    if (column < a.n) low += a.bias[rows.weight + column];
    if (column + 1 < a.n) high += a.bias[rows.weight + column + 1];
  }
  return {low, high};
}

// Stores them, those that exist.
__device__ inline void store_outputs(const LinearArgs& a, const TileRows& rows, int row, int column,
                                     float low, float high) {
  if (row >= rows.end || column >= a.n) return;
  const bool both = column + 1 < a.n;
  const float2 x = finished(a, rows, column, low, high);
  low = x.x, high = x.y;
  const int64_t at = int64_t{row} * a.n + column;
  if (whole_outputs(a)) {
    if (a.out_type == Type::f32)
      *reinterpret_cast<float2*>(static_cast<float*>(a.out) + at) = x;
    else
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a.out) + at) = pack_outputs(a.out_type, low, high);
    return;
  }
  store_float(a.out, a.out_type, at, low);
  if (both) store_float(a.out, a.out_type, at + 1, high);
}

// Stores the rows `row` and row + 8 of a warp's products, c[tile of 8 columns], the first column of which is
// `first`. Lanes exchange what they hold of two tiles, so that a row's sectors are written whole.
template <int kTiles>
__device__ void store_product(const LinearArgs& a, const TileRows& rows, int row, int first,
                              const float (&c)[kTiles][4]) {
  const int t = threadIdx.x % 4;
  const bool exchange = kTiles % 2 == 0 && whole_outputs(a) && a.out_type != Type::f32;
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8)
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      if (!exchange) {
#pragma unroll
        for (int j = i; j < i + 2 && j < kTiles; ++j)
          store_outputs(a, rows, row, first + 8 * j + 2 * t, c[j][2 * half], c[j][2 * half + 1]);
        continue;
      }
      if constexpr (kTiles % 2 == 0) {
        uint32_t words[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 x =
              finished(a, rows, first + 8 * (i + j) + 2 * t, c[i + j][2 * half], c[i + j][2 * half + 1]);
          words[j] = pack_outputs(a.out_type, x.x, x.y);
        }
        const uint32_t other = __shfl_xor_sync(0xffffffff, words[1 - t % 2], 1);
        const int column = first + 8 * (i + t % 2) + t / 2 * 4;
        if (row < rows.end && column < a.n)
          *reinterpret_cast<uint2*>(static_cast<uint16_t*>(a.out) + int64_t{row} * a.n + column) =
              t % 2 ? make_uint2(other, words[1]) : make_uint2(words[0], other);
      }
    }
}

}  // namespace tw::cuda
