// The AMX tile instructions (Intel SDM volume 2): eight registers of at most 16 rows x 64 bytes.
//   C[m][n] += A[m][k] * B[k][n] where an element of A and B is 4 bytes of the reduction dimension, two bf16
//   or four bytes, and an element of C is an fp32 or int32: B is laid out as for vdpbf16ps and vpdpbusd.
// Tiles belong to a thread, and a thread that keeps a configuration pays for it in every context switch:
// TileRegisters holds one for as long as a task runs.
//
// In inline assembly because gcc 12's intrinsics want literal tile numbers, and do not tell the compiler that
// they read memory (_tile_loadd none of it, _tile_loadconfig 8 of 64 bytes). A build with
// TILEWRIGHT_EMULATE_AMX calls amx_emulated.cpp instead.
#pragma once
#include "cpu/simd.h"
#if defined(TILEWRIGHT_EMULATE_AMX)
#include "cpu/amx_emulated.h"
#endif

namespace tilewright {
namespace {

constexpr int kTileHeight = 16, kTileRowBytes = 64;  // the most that palette 1 has

struct alignas(64) TileConfig {  // what ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if defined(TILEWRIGHT_EMULATE_AMX)
TW_INLINE void tile_config(const TileConfig& config) { emulated::tile_config(&config); }
TW_INLINE void tile_release() { emulated::tile_release(); }
template <int t>
TW_INLINE void tile_load(const void* p, int64_t stride) {
  emulated::tile_load(t, p, stride);
}
template <int t>
TW_INLINE void tile_store(void* p, int64_t stride) {
  emulated::tile_store(t, p, stride);
}
template <int t>
TW_INLINE void tile_zero() {
  emulated::tile_zero(t);
}
template <int c, int a, int b>
TW_INLINE void tile_dot_bf16() {
  emulated::tile_dot_bf16(c, a, b);
}
template <int c, int a, int b>
TW_INLINE void tile_dot_s8s8() {
  emulated::tile_dot_int8(c, a, b, true, true);
}
template <int c, int a, int b>
TW_INLINE void tile_dot_s8u8() {
  emulated::tile_dot_int8(c, a, b, true, false);
}
#else
TW_INLINE void tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
TW_INLINE void tile_release() { __asm__ volatile("tilerelease"); }
template <int t>
TW_INLINE void tile_load(const void* p, int64_t stride) {  // rows `stride` bytes apart
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
TW_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
TW_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
}
// C += A B. bf16 pairs: the sums of the products of first and of second halves are added, then that to C;
// subnormals count as 0.
template <int c, int a, int b>
TW_INLINE void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
// Bytes, exact in int32: A is signed, B signed or unsigned.
template <int c, int a, int b>
TW_INLINE void tile_dot_s8s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
TW_INLINE void tile_dot_s8u8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
#endif

// From here to the end of the scope 2 x 2 tiles of C in tmm0-3, of A in tmm4 and 5, of B in tmm6 and 7: with
// those a tile is loaded for each product, which takes 16 cycles against 8 of a load. The first tile of A has
// `rows` rows, the second `more` (none: it and its tiles of C may not be used); a row of A is `bytes` of the
// reduction dimension.
struct TileRegisters {
  TW_INLINE explicit TileRegisters(int rows = kTileHeight, int more = kTileHeight,
                                   int bytes = kTileRowBytes) {
    TileConfig config;
    const auto set = [&](int t, int tile_rows, int row_bytes) {
      config.rows[t] = uint8_t(tile_rows);
      config.row_bytes[t] = tile_rows ? uint16_t(row_bytes) : 0;
    };
    for (int t = 0; t < 4; ++t) set(t, t < 2 ? rows : more, kTileRowBytes);
    set(4, rows, bytes);
    set(5, more, bytes);
    set(6, bytes / 4, kTileRowBytes);
    set(7, bytes / 4, kTileRowBytes);
    tile_config(config);
  }
  TW_INLINE ~TileRegisters() { tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// Calls f(i, j) for the tiles of C: i of MR, j of NC, constants; theirs is tmm(2i + j).
template <int N>
struct TileIndex {
  static constexpr int n = N;
};
template <int MR, int NC, class Fn>
TW_INLINE void each_tile(Fn&& f) {
  f(TileIndex<0>{}, TileIndex<0>{});
  if constexpr (NC > 1) f(TileIndex<0>{}, TileIndex<1>{});
  if constexpr (MR > 1) f(TileIndex<1>{}, TileIndex<0>{});
  if constexpr (MR > 1 && NC > 1) f(TileIndex<1>{}, TileIndex<1>{});
}

}  // namespace
}  // namespace tilewright
