// Float formats other than the machine's, and rounding in every direction.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ptx {

enum Rounding : uint32_t { kNearestEven, kTowardsZero, kDown, kUp, kNearestAway };

struct Format {
  int precision;     // bits of the significand, the hidden one included
  int min_exponent;  // of the smallest normal number
  int max_exponent;
  int bits;
};
constexpr Format kHalf = {11, -14, 15, 16}, kBrain = {8, -126, 127, 16}, kSingle = {24, -126, 127, 32},
                 kTensorFloat = {11, -126, 127, 19}, kDouble = {53, -1022, 1023, 64};
constexpr uint32_t kNan32 = 0x7fffffff, kNan16 = 0x7fff;

inline uint64_t infinity_of(const Format& f) {
  return static_cast<uint64_t>(f.max_exponent - f.min_exponent + 2) << (f.precision - 1);
}

// x in the format, correctly rounded.
inline uint64_t encode(double x, const Format& f, Rounding rounding) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint64_t sign = bits >> 63 << (f.bits - 1);
  const uint64_t infinity = infinity_of(f);
  if (std::isnan(x)) return (1ull << (f.bits - 1)) - 1;
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  int exponent = static_cast<int>(bits >> 52 & 0x7ff);
  uint64_t m = bits & ((1ull << 52) - 1);
  exponent ? m |= 1ull << 52 : ++exponent;
  exponent -= 1023;  // x = m * 2^(exponent - 52)
  while (!(m >> 52)) m <<= 1, --exponent;
  int shift = 53 - f.precision;
  if (exponent < f.min_exponent) shift += f.min_exponent - exponent, exponent = f.min_exponent - 1;
  if (shift > 54) shift = 54;  // all of it is a remainder less than half
  uint64_t kept = shift ? m >> shift : m;
  const uint64_t rest = shift ? m & ((1ull << shift) - 1) : 0, half = shift ? 1ull << (shift - 1) : 1;
  bool up = false;
  switch (rounding) {
    case kNearestEven:
      up = rest > half || (rest == half && (kept & 1));
      break;
    case kNearestAway:
      up = rest >= half && rest;
      break;
    case kTowardsZero:
      break;
    case kDown:
      up = rest && sign;
      break;
    case kUp:
      up = rest && !sign;
      break;
  }
  kept += up;
  // A carry out of the significand raises the exponent field by itself.
  const uint64_t field = static_cast<uint64_t>(exponent - f.min_exponent + 1) << (f.precision - 1);
  const uint64_t hidden = exponent >= f.min_exponent ? 1ull << (f.precision - 1) : 0;
  uint64_t out = exponent >= f.min_exponent ? field + (kept - hidden) : kept;
  if (out >= infinity) {
    const bool to_infinity = rounding == kNearestEven || rounding == kNearestAway ||
                             (rounding == kUp && !sign) || (rounding == kDown && sign);
    out = to_infinity ? infinity : infinity - 1;
  }
  return sign | out;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest > 0x7c00) return std::bit_cast<float>(kNan32);
  // The exponent's bias differs by 112; a subnormal half is a normal float.
  if (rest == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000);
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}
inline float brain_to_float(uint16_t b) {
  return (b & 0x7fff) > 0x7f80 ? std::bit_cast<float>(kNan32)
                               : std::bit_cast<float>(static_cast<uint32_t>(b) << 16);
}
inline uint16_t float_to_brain(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return kNan16;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// a + b, rounded to odd where it is not exact: rounding that again to few bits equals rounding once.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double virtual_b = sum - a;
  const double error = (a - (sum - virtual_b)) + (b - virtual_b);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (error == 0 || (bits & 1)) return sum;
  bits += (error > 0) == (sum > 0) ? 1 : ~0ull;  // the odd neighbour towards the true sum
  return std::bit_cast<double>(bits);
}

inline float flushed(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return u & 0x7f800000 ? x : std::bit_cast<float>(u & 0x80000000);
}
inline float canonical(float x) { return x == x ? x : std::bit_cast<float>(kNan32); }
inline double canonical(double x) { return x == x ? x : std::bit_cast<double>(0x7ff8000000000000ull); }
template <class T>
T saturated(T x) {  // to [0, 1]; NaN gives +0
  return x > T{0} ? (x < T{1} ? x : T{1}) : T{0};
}

}  // namespace ptx
