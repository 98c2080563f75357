// Bit operations as PTX defines them, on values of up to 64 bits; used on values and on their undefined bits.
#pragma once

#include <cstdint>

namespace ptx {

inline uint64_t low_bits(uint32_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

inline uint64_t lop3(uint64_t a, uint64_t b, uint64_t c, uint32_t table) {
  uint64_t r = 0;
  for (uint32_t k = 0; k < 8; ++k)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}

inline uint64_t shl(uint64_t a, uint32_t n, uint32_t bits) { return n >= bits ? 0 : a << n & low_bits(bits); }
inline uint64_t shr(uint64_t a, uint32_t n, uint32_t bits) {
  return n >= bits ? 0 : (a & low_bits(bits)) >> n;
}
inline uint64_t shr_signed(uint64_t a, uint32_t n, uint32_t bits) {
  const auto value = static_cast<int64_t>(a << (64 - bits)) >> (64 - bits);
  return static_cast<uint64_t>(value >> (n >= bits ? bits - 1 : n)) & low_bits(bits);
}

// mode: bit 0 right, bit 1 clamp.
inline uint32_t funnel(uint32_t a, uint32_t b, uint32_t c, uint32_t mode) {
  const uint32_t n = mode & 2 ? (c > 32 ? 32 : c) : c & 31;
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  return mode & 1 ? static_cast<uint32_t>(n == 32 ? both >> 32 : both >> n)
                  : static_cast<uint32_t>(both << n >> 32);
}

enum PermuteMode {
  kPermuteDefault,
  kPermuteF4e,
  kPermuteB4e,
  kPermuteRc8,
  kPermuteEcl,
  kPermuteEcr,
  kPermuteRc16
};

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t c, uint32_t mode) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (uint32_t k = 0; k < 4; ++k) {
    const uint32_t s = c & 3;
    uint32_t from = 0;
    bool sign = false;
    switch (mode) {
      case kPermuteDefault:
        from = c >> 4 * k & 7, sign = c >> 4 * k & 8;
        break;
      case kPermuteF4e:
        from = s + k;
        break;
      case kPermuteB4e:
        from = (s - k) & 7;
        break;
      case kPermuteRc8:
        from = s;
        break;
      case kPermuteEcl:
        from = k > s ? k : s;
        break;
      case kPermuteEcr:
        from = k < s ? k : s;
        break;
      default:
        from = (s & 1) * 2 + (k & 1);
        break;
    }
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * from & 0xff);
    if (sign) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << 8 * k;
  }
  return r;
}

inline uint64_t extract(uint64_t a, uint32_t position, uint32_t length, uint32_t bits, bool is_signed) {
  const uint32_t at = position & 0xff, n = length & 0xff;
  a &= low_bits(bits);
  uint64_t r = at >= bits ? 0 : a >> at & low_bits(n);
  if (is_signed && n) {
    const uint64_t last = static_cast<uint64_t>(at) + n - 1;
    const bool sign = a >> (last < bits ? last : bits - 1) & 1;
    const uint32_t kept = n < (at < bits ? bits - at : 0) ? n : (at < bits ? bits - at : 0);
    if (sign) r |= ~low_bits(kept);
  }
  return r & low_bits(bits);
}

inline uint64_t insert(uint64_t a, uint64_t b, uint32_t position, uint32_t length, uint32_t bits) {
  const uint32_t at = position & 0xff, n = length & 0xff;
  if (at >= bits) return b;
  const uint64_t mask = low_bits(n) << at & low_bits(bits);
  return (b & ~mask) | (a << at & mask);
}

inline uint64_t reverse(uint64_t a, uint32_t bits) {
  uint64_t r = 0;
  for (uint32_t k = 0; k < bits; ++k) r |= (a >> k & 1) << (bits - 1 - k);
  return r;
}

}  // namespace ptx
