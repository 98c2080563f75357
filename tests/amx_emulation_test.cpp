// The emulated tile instructions against Intel's SDM: values that only the documented order of the arithmetic
// gives, shapes that are not whole, and everything that must be refused. Exits with 1 if a check failed.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/amx.h"

using namespace tilewright;

namespace {

int failures = 0;
#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                 \
    }                                                             \
  } while (0)

constexpr int C = 0, A = 4, B = 6;

// C (m x n) in tmm0, A (m x k) in tmm4, B (k x n) in tmm6; k counts elements of 4 bytes.
TileConfig shapes(int m, int n, int k) {
  TileConfig config;
  config.rows[C] = config.rows[A] = uint8_t(m);
  config.rows[B] = uint8_t(k);
  config.row_bytes[C] = config.row_bytes[B] = uint16_t(4 * n);
  config.row_bytes[A] = uint16_t(4 * k);
  return config;
}

float left[32], right[32];            // A's row and B's column of the next product, as pairs
float bf16_product(int k, float c) {  // of one row and one column with C = c
  uint16_t a[16][32] = {}, b[16][32] = {};
  for (int i = 0; i < 32; ++i) {
    a[0][i] = to_bf16(left[i]).bits;
    b[i / 2][i % 2] = to_bf16(right[i]).bits;
  }
  tile_config(shapes(1, 1, k));
  tile_load<C>(&c, 4);
  tile_load<A>(a, 64);
  tile_load<B>(b, 64);
  tile_dot_bf16<C, A, B>();
  tile_store<C>(&c, 4);
  tile_release();
  return c;
}
void fill(float a, float b) {
  for (int i = 0; i < 32; ++i) {
    left[i] = a;
    right[i] = b;
  }
}

void bf16_order() {
  const float big = 16777216.0f;  // 2^24: adding 1 to it gives 2^24 again
  fill(1.0f, 1.0f);
  CHECK(bf16_product(16, big) == big + 32);  // products are summed apart from C
  CHECK(bf16_product(3, big) == big + 6);    // and only k of them
  left[0] = big;
  CHECK(bf16_product(16, 0.0f) == big + 16);  // first halves lose their ones, second halves do not
  left[1] = -big;
  CHECK(bf16_product(16, 0.0f) == 15);  // 2^24 and 15 lost ones; -2^24 + 15 is exact
  fill(0.0f, 0.0f);
  left[0] = 1.0f + 1 / 128.0f;  // the product's last bit survives until the one rounding of the fma
  right[0] = 1.0f + 1 / 128.0f;
  left[2] = -1.0f;
  right[2] = 1.0f;
  CHECK(bf16_product(16, 0.0f) == 1 / 64.0f + 1 / 16384.0f);
}

void bf16_special_values() {
  const float least = 1.1754943508222875e-38f, subnormal = least / 2;
  fill(0.0f, 0.0f);
  left[0] = subnormal;
  right[0] = 0x1p100f;
  CHECK(bf16_product(16, 0.0f) == 0);       // operands
  CHECK(bf16_product(16, subnormal) == 0);  // C
  left[0] = least;
  right[0] = 0.5f;
  CHECK(bf16_product(16, 0.0f) == 0);  // results
  right[0] = 1.0f;
  CHECK(bf16_product(16, 0.0f) == least);
  right[0] = INFINITY;
  CHECK(bf16_product(16, 0.0f) == INFINITY && std::isnan(bf16_product(16, -INFINITY)));
  left[0] = 0;
  CHECK(std::isnan(bf16_product(16, 0.0f)));
}

// Every shape against loops, in numbers that are exact; nothing outside of C is written.
template <class Dot>
void int8_shapes(bool signed_b, Dot dot) {
  for (int m = 1; m <= 16; m += 5)
    for (int n = 1; n <= 16; n += 3)
      for (int k = 1; k <= 16; k += 3) {
        uint8_t a[16][64], b[16][64];
        int32_t c[16][20], before[16][20];
        for (int r = 0; r < 16; ++r) {
          for (int i = 0; i < 64; ++i) a[r][i] = uint8_t(r * 37 + i * 11), b[r][i] = uint8_t(r * 53 + i * 29);
          for (int i = 0; i < 20; ++i) c[r][i] = before[r][i] = 1000 * r + i;
        }
        tile_config(shapes(m, n, k));
        tile_load<C>(c, sizeof c[0]);
        tile_load<A>(a, 64);
        tile_load<B>(b, 64);
        dot();
        tile_store<C>(c, sizeof c[0]);
        tile_release();
        bool same = true;
        for (int r = 0; r < 16; ++r)
          for (int j = 0; j < 20; ++j) {
            int expected = before[r][j];
            for (int i = 0; r < m && j < n && i < 4 * k; ++i) {
              const uint8_t y = b[i / 4][4 * j + i % 4];
              expected += int8_t(a[r][i]) * (signed_b ? int8_t(y) : y);
            }
            same = same && c[r][j] == expected;
          }
        CHECK(same);
      }
}

void bf16_shapes() {
  for (int m = 1; m <= 16; m += 5)
    for (int n = 1; n <= 16; n += 3)
      for (int k = 1; k <= 16; k += 3) {
        bf16 a[16][32], b[16][32];
        float c[16][20];
        for (int r = 0; r < 16; ++r) {
          for (int i = 0; i < 32; ++i) a[r][i] = to_bf16(float(r - i)), b[r][i] = to_bf16(float(3 * r - i));
          for (int i = 0; i < 20; ++i) c[r][i] = float(100 * r + i);
        }
        tile_config(shapes(m, n, k));
        tile_load<C>(c, sizeof c[0]);
        tile_load<A>(a, 64);
        tile_load<B>(b, 64);
        tile_dot_bf16<C, A, B>();
        tile_store<C>(c, sizeof c[0]);
        tile_release();
        bool same = true;
        for (int r = 0; r < 16; ++r)
          for (int j = 0; j < 20; ++j) {
            float expected = float(100 * r + j);
            for (int i = 0; r < m && j < n && i < 2 * k; ++i)
              expected += float(r - i) * float(3 * (i / 2) - 2 * j - i % 2);
            same = same && c[r][j] == expected;
          }
        CHECK(same);
      }
}

void full_tiles() {
  char from[16 * 64], to[16 * 64] = {};
  for (int i = 0; i < 16 * 64; ++i) from[i] = char(i * 7);
  {
    const TileRegisters registers;
    tile_load<7>(from, 64);
    tile_store<7>(to, 64);
    CHECK(!std::memcmp(from, to, sizeof to));
    tile_zero<7>();
    tile_store<7>(to, 64);
    CHECK(!to[0] && !std::memcmp(to, to + 1, sizeof to - 1));
    tile_load<7>(from, 64);
  }
  const TileRegisters again;
  tile_store<7>(to, 64);
  CHECK(!to[0] && !std::memcmp(to, to + 1, sizeof to - 1));  // ldtilecfg zeroes
}

// f must abort in a process of its own with a message that contains `reason`.
template <class Fn>
void refused(const char* reason, Fn&& f) {
  int ends[2];
  if (pipe(ends)) std::perror("pipe"), std::exit(1);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    f();
    _exit(0);
  }
  close(ends[1]);
  std::string message;
  char buffer[256];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) message.append(buffer, size_t(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT || message.find(reason) == std::string::npos) {
    std::printf("not refused with \"%s\", but status %d, \"%s\"\n", reason, status, message.c_str());
    ++failures;
  }
}

template <class Fn>
void refused_config(const char* reason, Fn&& spoil) {
  TileConfig config = shapes(16, 16, 16);
  spoil(config);
  refused(reason, [&] { tile_config(config); });
}

void refusals() {
  float memory[16 * 16] = {};
  refused("no configuration is loaded", [&] { tile_load<C>(memory, 64); });
  refused("no configuration is loaded", [&] { tile_dot_bf16<C, A, B>(); });
  refused("no configuration is loaded", [&] {
    {
      const TileRegisters registers;
    }
    tile_zero<C>();
  });
  refused("did not release", [&] {
    const TileRegisters first;
    const TileRegisters second;
  });
  refused("not configured", [&] {
    tile_config(shapes(16, 16, 16));
    tile_load<1>(memory, 64);
  });
  refused("must differ", [&] {
    tile_config(shapes(16, 16, 16));
    tile_dot_bf16<C, A, A>();
  });
  const auto mismatch = [&](auto spoil) {
    refused("do not match", [&] {
      TileConfig config = shapes(12, 12, 12);
      spoil(config);
      tile_config(config);
      tile_dot_bf16<C, A, B>();
    });
    refused("do not match", [&] {
      TileConfig config = shapes(12, 12, 12);
      spoil(config);
      tile_config(config);
      tile_dot_s8s8<C, A, B>();
    });
  };
  mismatch([](TileConfig& c) { c.rows[A] = 11; });
  mismatch([](TileConfig& c) { c.rows[B] = 13; });
  mismatch([](TileConfig& c) { c.rows[C] = 13; });
  mismatch([](TileConfig& c) { c.row_bytes[A] = 44; });
  mismatch([](TileConfig& c) { c.row_bytes[B] = 64; });
  mismatch([](TileConfig& c) { c.row_bytes[C] = 4; });
  refused("rows of", [&] {
    TileConfig config = shapes(12, 12, 12);
    config.row_bytes[A] = 46;
    tile_config(config);
    tile_dot_bf16<C, A, B>();
  });
  refused_config("palette", [](TileConfig& c) { c.palette = 0; });
  refused_config("palette", [](TileConfig& c) { c.palette = 2; });
  refused_config("start_row", [](TileConfig& c) { c.start_row = 1; });
  refused_config("reserved", [](TileConfig& c) { c.reserved[13] = 1; });
  refused_config("17 rows", [](TileConfig& c) { c.rows[3] = 17, c.row_bytes[3] = 64; });
  refused_config("65 bytes", [](TileConfig& c) { c.rows[7] = 16, c.row_bytes[7] = 65; });
  refused_config("0 bytes", [](TileConfig& c) { c.rows[7] = 16; });
  refused_config("0 rows", [](TileConfig& c) { c.row_bytes[7] = 64; });
  refused_config("no tmm8", [](TileConfig& c) { c.rows[8] = 16, c.row_bytes[8] = 64; });
}

}  // namespace

int main() {
  const unsigned rounding = _mm_getcsr();
  bf16_order();
  bf16_special_values();
  bf16_shapes();
  int8_shapes(true, [] { tile_dot_s8s8<C, A, B>(); });
  int8_shapes(false, [] { tile_dot_s8u8<C, A, B>(); });
  full_tiles();
  refusals();
  CHECK(_mm_getcsr() == rounding);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
