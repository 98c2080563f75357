// The AMX tile instructions of palette 1 in C++, so that tests execute the amx kernels on CPUs without AMX;
// only a build with TILEWRIGHT_EMULATE_AMX has them. Arithmetic, its order, and what is an error are those of
// Intel's SDM, volume 2; where the instruction would fault, this says why and aborts. One rule is ours: a
// thread releases its configuration before it loads another, so that no task leaves one behind.
#include "cpu/amx_emulated.h"

#include <immintrin.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/amx.h"

namespace tilewright::emulated {
namespace {

constexpr int kTiles = 8, kColumns = kTileRowBytes / 4;

struct Tile {
  int rows, row_bytes;                                   // 0: not configured
  alignas(64) uint8_t data[kTileHeight][kTileRowBytes];  // zero beyond rows and row_bytes
};
struct Registers {
  bool configured;
  Tile tiles[kTiles];
};
thread_local Registers registers;

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
  std::fputs("emulated AMX: ", stderr);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputs("\n", stderr);
  std::abort();
}

Tile& use(const char* instruction, int t) {
  if (t < 0 || t >= kTiles) fail("%s: there is no tmm%d", instruction, t);
  if (!registers.configured) fail("%s tmm%d: no configuration is loaded", instruction, t);
  Tile& tile = registers.tiles[t];
  if (tile.rows == 0) fail("%s tmm%d: the tile is not configured", instruction, t);
  return tile;
}

struct Operands {
  Tile& c;
  const Tile &a, &b;
};
Operands use(const char* instruction, int c, int a, int b) {
  const Operands o = {use(instruction, c), use(instruction, a), use(instruction, b)};
  if (c == a || c == b || a == b) fail("%s: tmm%d, tmm%d, tmm%d must differ", instruction, c, a, b);
  if (o.c.row_bytes % 4 || o.a.row_bytes % 4 || o.b.row_bytes % 4)
    fail("%s: rows of %d, %d, %d bytes", instruction, o.c.row_bytes, o.a.row_bytes, o.b.row_bytes);
  if (o.c.rows != o.a.rows || o.c.row_bytes != o.b.row_bytes || o.a.row_bytes / 4 != o.b.rows)
    fail("%s: C %d x %d, A %d x %d, B %d x %d do not match", instruction, o.c.rows, o.c.row_bytes / 4,
         o.a.rows, o.a.row_bytes / 4, o.b.rows, o.b.row_bytes / 4);
  return o;
}

template <class T>
T element(const Tile& t, int row, int column) {
  T x;
  std::memcpy(&x, t.data[row] + column * 4, 4);
  return x;
}

float first(uint32_t pair) { return bits_to_float(pair << 16); }
float second(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

// Rounding, and subnormals as zero, come from MXCSR, which the caller has set: hence no inlining.
[[gnu::noinline]] void dot_bf16(const Operands& o) {
  for (int m = 0; m < o.c.rows; ++m) {
    float firsts[kColumns] = {}, seconds[kColumns] = {};
    for (int k = 0; k < o.b.rows; ++k) {
      const auto x = element<uint32_t>(o.a, m, k);
      for (int n = 0; n < kColumns; ++n) {
        const auto y = element<uint32_t>(o.b, k, n);
        firsts[n] = __builtin_fmaf(first(x), first(y), firsts[n]);
        seconds[n] = __builtin_fmaf(second(x), second(y), seconds[n]);
      }
    }
    for (int n = 0; n < o.c.row_bytes / 4; ++n) {
      const float sum = element<float>(o.c, m, n) + (firsts[n] + seconds[n]);
      std::memcpy(o.c.data[m] + n * 4, &sum, 4);
    }
  }
}

}  // namespace

void tile_config(const void* p) {
  TileConfig config;
  std::memcpy(&config, p, sizeof config);
  if (registers.configured) fail("ldtilecfg: a task before this one did not release its tiles");
  if (config.palette != 1) fail("ldtilecfg: there is no palette %d", config.palette);
  if (config.start_row != 0) fail("ldtilecfg: start_row is %d", config.start_row);
  for (const uint8_t x : config.reserved)
    if (x) fail("ldtilecfg: reserved bytes must be zero");
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    if (t >= kTiles && (rows || row_bytes)) fail("ldtilecfg: there is no tmm%d", t);
    if (rows > kTileHeight || row_bytes > kTileRowBytes || !rows != !row_bytes)
      fail("ldtilecfg tmm%d: %d rows of %d bytes", t, rows, row_bytes);
  }
  registers = {};
  registers.configured = true;
  for (int t = 0; t < kTiles; ++t) {
    registers.tiles[t].rows = config.rows[t];
    registers.tiles[t].row_bytes = config.row_bytes[t];
  }
}

void tile_release() { registers = {}; }

void tile_load(int t, const void* p, int64_t stride) {
  Tile& tile = use("tileloadd", t);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.data[r], static_cast<const char*>(p) + r * stride, size_t(tile.row_bytes));
}

void tile_store(int t, void* p, int64_t stride) {
  const Tile& tile = use("tilestored", t);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(p) + r * stride, tile.data[r], size_t(tile.row_bytes));
}

void tile_zero(int t) {
  Tile& tile = use("tilezero", t);
  std::memset(tile.data, 0, sizeof tile.data);
}

void tile_dot_bf16(int c, int a, int b) {
  constexpr unsigned kMasked = 0x1f80, kFlush = 0x8040;  // round to nearest even, no exception; FTZ and DAZ
  const Operands o = use("tdpbf16ps", c, a, b);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kMasked | kFlush);
  dot_bf16(o);
  _mm_setcsr(before);
}

void tile_dot_int8(int c, int a, int b, bool signed_a, bool signed_b) {
  const Operands o = use("tdpb[su][su]d", c, a, b);
  const auto value = [](uint8_t x, bool is_signed) { return is_signed ? int(int8_t(x)) : int(x); };
  for (int m = 0; m < o.c.rows; ++m)
    for (int n = 0; n < o.c.row_bytes / 4; ++n) {
      auto sum = element<uint32_t>(o.c, m, n);  // wraps around
      for (int k = 0; k < o.b.rows; ++k)
        for (int i = 0; i < 4; ++i)
          sum += uint32_t(value(o.a.data[m][4 * k + i], signed_a) * value(o.b.data[k][4 * n + i], signed_b));
      std::memcpy(o.c.data[m] + n * 4, &sum, 4);
    }
}

}  // namespace tilewright::emulated
