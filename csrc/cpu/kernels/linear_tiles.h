// What the linear kernels share at level amx: 16 or 32 rows of x times the 32 outputs of a block.
#pragma once
#include "cpu/amx.h"
#include "cpu/simd.h"

namespace tilewright {
namespace {

constexpr int kTiledRows = 2 * kTileHeight;

// Calls f(m, rows, tiles of A) for at most kTiledRows rows at a time, the tiles configured for them and
// for `bytes` of the reduction dimension.
template <class Fn>
TW_INLINE void in_tiled_rows(int64_t count, int bytes, Fn&& f) {
  for (int64_t m = 0; m < count; m += kTiledRows) {
    const int rows = int(count - m < kTiledRows ? count - m : kTiledRows);
    const int more = rows > kTileHeight ? rows - kTileHeight : 0;
    const TileRegisters held(rows - more, more, bytes);
    if (more)
      f(m, rows, TileIndex<2>{});
    else
      f(m, rows, TileIndex<1>{});
  }
}

template <int MR>
TW_INLINE void tiles_zero() {
  each_tile<MR, 2>([](auto i, auto j) { tile_zero<i.n * 2 + j.n>(); });
}
template <int MR>
TW_INLINE void tiles_load(const void* c) {  // [rows][32] of 4 bytes
  each_tile<MR, 2>([&](auto i, auto j) {
    tile_load<i.n * 2 + j.n>(static_cast<const char*>(c) + i.n * kTileHeight * 128 + j.n * 64, 128);
  });
}
template <int MR>
TW_INLINE void tiles_store(void* c) {
  each_tile<MR, 2>([&](auto i, auto j) {
    tile_store<i.n * 2 + j.n>(static_cast<char*>(c) + i.n * kTileHeight * 128 + j.n * 64, 128);
  });
}
// A: rows of x, `x_stride` bytes apart. B: outputs 0 to 15 and 16 to 31 of the block, steps `stride` apart.
template <int MR>
TW_INLINE void operands_load(const void* x, int64_t x_stride, const uint8_t* low, const uint8_t* high,
                             int64_t stride) {
  tile_load<4>(x, x_stride);
  if constexpr (MR > 1) tile_load<5>(static_cast<const char*>(x) + kTileHeight * x_stride, x_stride);
  tile_load<6>(low, stride);
  tile_load<7>(high, stride);
}

}  // namespace
}  // namespace tilewright
