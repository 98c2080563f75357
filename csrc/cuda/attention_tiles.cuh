// Tiles of rows in shared memory, swizzled (mma.cuh), and the products that read them.
#pragma once
#include "attention_scores.cuh"
#include "mma.cuh"

namespace tw::cuda {

// 8 elements of a row of `dim` elements into shared memory, from element `column` on; zeros beyond dim, and
// where there is no row.
__device__ inline void load_piece(uint16_t* to, const uint16_t* row, int column, int dim, bool aligned) {
  const int left = row ? max(dim - column, 0) : 0;
  if (aligned) {
    copy_async_16(to, left ? row + column : row, min(left, 8) * 2);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < left ? row[column + 2 * i] : 0;
    const uint32_t high = 2 * i + 1 < left ? row[column + 2 * i + 1] : 0;
    words[i] = low | high << 16;
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// A tile of kRows rows of kDim elements; row_at(i) is where row i lies, or null.
template <int kRows, int kDim, int kThreads, class RowAt>
__device__ void load_tile(uint16_t* tile, int dim, bool aligned, const void* anywhere, RowAt&& row_at) {
  constexpr int kPieces = kDim / 8;
  static_assert(kRows * kPieces % kThreads == 0, "threads share the pieces evenly");
#pragma unroll 1
  for (int part = 0; part < kRows * kPieces / kThreads; ++part) {
    const int piece = part * kThreads + threadIdx.x;
    const int row = piece / kPieces, column = piece % kPieces * 8;
    const uint16_t* from = row_at(row);
    load_piece(tile + swizzled<kDim>(row, column), from, column, dim, aligned);
  }
}

// Where the keys of a sequence's KV head lie.
struct KeyRows {
  const AttentionLaunch& a;
  const Sequence& s;
  int kv_head;
  bool bad = false;  // a page did not exist

  // Element offsets of key `key` in k and v.
  __device__ bool find(int key, int64_t& k_at, int64_t& v_at) {
    int outer = s.k_row, row = s.k_begin + key;
    if (a.block_table) {
      const unsigned position = row, size = unsigned(a.page_size), page = position / size;
      outer = a.block_table[s.k_row * a.table_stride + page];
      row = position - page * size;
      if (outer < 0 || outer >= a.pages) {
        bad = true;
        return false;
      }
    }
    k_at = outer * a.k.batch + kv_head * a.k.head + row * a.k.token;
    v_at = outer * a.v.batch + kv_head * a.v.head + row * a.v.token;
    return true;
  }

  // Tiles of the keys [from, from + kKeys), of which those in `seen` are there; row i is the key of column i.
  template <int kKeys, int kDim, int kThreads>
  __device__ void load(uint16_t* k_tile, uint16_t* v_tile, int from, Range seen, KeyOrder order) {
    constexpr int kPieces = kDim / 8;
    static_assert(kKeys * kPieces % kThreads == 0, "threads share the pieces evenly");
#pragma unroll 1
    for (int part = 0; part < kKeys * kPieces / kThreads; ++part) {
      const int piece = part * kThreads + threadIdx.x;
      const int row = piece / kPieces, column = piece % kPieces * 8;
      const int key = from + order.key_of(row);
      int64_t k_at = 0, v_at = 0;
      const bool there = key >= seen.first && key < seen.end && find(key, k_at, v_at);
      const int place = swizzled<kDim>(row, column);
      const auto* k = static_cast<const uint16_t*>(a.k.base);
      const auto* v = static_cast<const uint16_t*>(a.v.base);
      load_piece(k_tile + place, k + k_at, column, there ? int(a.head_dim) : 0, a.aligned);
      load_piece(v_tile + place, v + v_at, column, there ? int(a.v_dim) : 0, a.aligned);
    }
  }
};

// The lane's number, forgotten at each call: what depends on it is computed where it is used. Kept through a
// loop, the swizzled addresses of a tile alone would fill tens of registers.
__device__ inline int fresh_lane() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// The operand a of rows [row, row + 16) and columns [column, column + 16) of a tile.
template <int kDim>
__device__ inline void load_rows(uint32_t (&r)[4], int lane, const uint16_t* tile, int row, int column) {
  load_matrices(r, tile + swizzled<kDim>(row + lane % 16, column + lane / 16 * 8));
}
// b of a product with the tile's transpose: its rows [row, row + 16) are columns of b. r[0], r[1]: the
// first 8.
template <int kDim>
__device__ inline void load_transposed(uint32_t (&r)[4], int lane, const uint16_t* tile, int row,
                                       int column) {
  load_matrices(r, tile + swizzled<kDim>(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}
// b of a product with the tile: rows [row, row + 16), columns [column, column + 16). r[0], r[1]: the first 8.
template <int kDim>
__device__ inline void load_columns(uint32_t (&r)[4], int lane, const uint16_t* tile, int row, int column) {
  load_matrices_transposed(r, tile + swizzled<kDim>(row + lane % 16, column + lane / 16 * 8));
}

// c[tile of 16 rows][tile of 8] += rows [row, ..) of x times the transpose of kN rows of y.
template <class T, int kDim, int kM, int kN>
__device__ inline void multiply_transposed(float (&c)[kM][kN / 8][4], const uint16_t* x, int row,
                                           const uint16_t* y) {
  const int lane = fresh_lane();
#pragma unroll
  for (int column = 0; column < kDim; column += 16) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_rows<kDim>(left[m], lane, x, row + m * 16, column);
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t right[4];
      load_transposed<kDim>(right, lane, y, n, column);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(c[m][n / 8], left[m], right[0], right[1]);
        mma<T>(c[m][n / 8 + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The operand a of columns [16 * step, 16 * step + 16) of what a product left, rounded to T.
template <class T, int kTiles>
__device__ inline void as_operand(uint32_t (&a)[4], const float (&c)[kTiles][4], int step) {
  a[0] = pack_pair<T>(c[2 * step][0], c[2 * step][1]);
  a[1] = pack_pair<T>(c[2 * step][2], c[2 * step][3]);
  a[2] = pack_pair<T>(c[2 * step + 1][0], c[2 * step + 1][1]);
  a[3] = pack_pair<T>(c[2 * step + 1][2], c[2 * step + 1][3]);
}

// c[.][tile of 8 columns] += p y for p as a product left it, (rows, kN), and a tile y of kN rows. With
// kSelect, bit i of `rows` of a lane says whether row 8 * (i / 2) + 2 * (lane % 4) + i % 2 of y counts:
// others are 0, whatever they hold.
template <class T, int kDim, bool kSelect, int kM, int kN>
__device__ inline void multiply(float (&c)[kM][kDim / 8][4], const float (&p)[kM][kN / 8][4],
                                const uint16_t* y, uint32_t rows = 0) {
  const int lane = fresh_lane();
#pragma unroll
  for (int step = 0; step < kN / 16; ++step) {
    uint32_t left[kM][4], keep[2];
#pragma unroll
    for (int m = 0; m < kM; ++m) as_operand<T>(left[m], p[m], step);
    if constexpr (kSelect) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t two = rows >> (4 * step + 2 * i);
        keep[i] = (two & 1 ? 0xffffu : 0) | (two & 2 ? 0xffff0000u : 0);
      }
    }
#pragma unroll
    for (int column = 0; column < kDim; column += 16) {
      uint32_t right[4];
      load_columns<kDim>(right, lane, y, step * 16, column);
      if constexpr (kSelect) {
#pragma unroll
        for (int i = 0; i < 4; ++i) right[i] &= keep[i % 2];
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(c[m][column / 8], left[m], right[0], right[1]);
        mma<T>(c[m][column / 8 + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// A row takes in a tile's scores, c[.][2 * half] and c[.][2 * half + 1] of its four lanes, -inf: not
// attended: they become weights, which `drop` is shown once they are summed. Returns what everything
// accumulated before is to be multiplied with. unit: what one unit of a score is worth, in log2 units.
template <bool kNatural, int kTiles, class Drop>
__device__ inline float soften(float (&c)[kTiles][4], int half, float unit, float& top, float& sum,
                               Drop&& drop) {
  float highest = top;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) highest = max_nan(highest, max_nan(c[i][2 * half], c[i][2 * half + 1]));
  highest = max_nan(highest, __shfl_xor_sync(0xffffffff, highest, 1));
  highest = max_nan(highest, __shfl_xor_sync(0xffffffff, highest, 2));
  const float safe = highest == -kInfinity ? 0.0f : highest;
  const float shrink = exp2_fast((top - safe) * unit);
  top = highest;
  float total = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e) {
      float& x = c[i][e];
      x = kNatural ? exp2_fast((x - safe) * unit) : exp2_fast(fmaf(x, unit, -safe * unit));
      total += x;
      drop(x, i, e);
    }
  sum = sum * shrink + total;
  return shrink;
}

// Bits as `multiply` wants them: whether some of the warp's rows attends a column. c: scores, -inf: not
// attended.
template <int kM, int kTiles>
__device__ inline uint32_t attended_columns(const float (&c)[kM][kTiles][4]) {
  static_assert(kTiles <= 16, "a bit for each of a lane's columns");
  uint32_t bits = 0;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) bits |= uint32_t(c[m][i][e] != -kInfinity) << (2 * i + e % 2);
#pragma unroll
  for (int o = 4; o < 32; o *= 2) bits |= __shfl_xor_sync(0xffffffff, bits, o);
  return bits;
}

// Rounds 16 rows of a product to T and writes them, through the warp's own 16 rows of a tile in shared
// memory, in pieces of 16 bytes. row_at(i): where row i lies, or null.
template <class T, int kDim, class RowAt>
__device__ inline void store_rows(const float (&c)[kDim / 8][4], const float (&factor)[2], uint16_t* tile,
                                  int row, int dim, bool aligned, RowAt&& row_at) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<uint32_t*>(tile + swizzled<kDim>(row + g + 8 * half, i * 8) + 2 * t) =
          pack_pair<T>(c[i][2 * half] * factor[half], c[i][2 * half + 1] * factor[half]);
  __syncwarp();
  constexpr int kPieces = kDim / 8;
#pragma unroll 1
  for (int piece = lane; piece < 16 * kPieces; piece += 32) {
    const int r = piece / kPieces, column = piece % kPieces * 8;
    uint16_t* to = row_at(r);
    if (!to || column >= dim) continue;
    const uint4 words = *reinterpret_cast<const uint4*>(tile + swizzled<kDim>(row + r, column));
    if (aligned && column + 8 <= dim) {
      *reinterpret_cast<uint4*>(to + column) = words;
    } else {
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < dim) to[column + i] = uint16_t(word[i / 2] >> (16 * (i % 2)));
    }
  }
}

}  // namespace tw::cuda
