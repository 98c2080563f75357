#include "ops/gguf_blocks.h"

#include <cstring>
#include <iterator>

#include "cpu/simd.h"
#include "ops/gguf_grids.h"

namespace tilewright {
namespace {

// Eight codes are the bytes of one uint64_t, the first in the lowest: a shift never crosses into a neighbour
// that the mask keeps.
constexpr uint64_t kBytes = 0x0101010101010101u;

template <class T>
T load_as(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
uint64_t load8(const uint8_t* p) { return load_as<uint64_t>(p); }
void store8(uint8_t* p, uint64_t v) { std::memcpy(p, &v, 8); }
float load_f16(const uint8_t* p) { return to_float(f16{load_as<uint16_t>(p)}); }

// 8 bits, 8 pairs of bits, 4 triples of bits: one a byte.
uint64_t spread_bits(uint64_t v) {
  v = (v | v << 28) & 0x0000000f0000000fu;
  v = (v | v << 14) & 0x0003000300030003u;
  return (v | v << 7) & kBytes;
}
uint64_t spread_pairs(uint64_t v) {
  v = (v | v << 24) & 0x000000ff000000ffu;
  v = (v | v << 12) & 0x000f000f000f000fu;
  return (v | v << 6) & 3 * kBytes;
}
uint32_t spread_triples(uint32_t v) {
  v = (v | v << 10) & 0x003f003fu;
  return (v | v << 5) & 0x07070707u;
}

// Both groups of a chunk alike.
void set_scale(Chunk& c, float scale, float offset = 0) {
  c.scale[0] = c.scale[1] = scale;
  c.offset[0] = c.offset[1] = offset;
}
void set_scales(Chunk& c, int first, int second) {
  c.scale[0] = float(first);
  c.scale[1] = float(second);
  c.offset[0] = c.offset[1] = 0;
}
// The nibble of a byte for this part.
int nibble(uint8_t byte, int part) { return byte >> (part & 1) * 4 & 15; }

// 16 bytes: low nibbles are columns 0..15, high ones 16..31.
void read_nibbles(const uint8_t* p, Chunk& c) {
  for (int i = 0; i < 16; i += 8) {
    const uint64_t v = load8(p + i);
    store8(c.codes + i, v & 15 * kBytes);
    store8(c.codes + 16 + i, v >> 4 & 15 * kBytes);
  }
}

// Blocks of 32 columns: [d] [min] [bit 4 of each code] codes.
template <int bits, bool with_min>
void read_q(const uint8_t* p, int, Chunk& c) {
  set_scale(c, load_f16(p), with_min ? load_f16(p + 2) : 0);
  p += with_min ? 4 : 2;
  read_nibbles(p + (bits == 5 ? 4 : 0), c);
  if (bits == 5)
    for (int i = 0; i < 4; ++i) store8(c.codes + 8 * i, load8(c.codes + 8 * i) | spread_bits(p[i]) << 4);
}

void read_q8_0(const uint8_t* p, int, Chunk& c) {
  set_scale(c, load_f16(p));
  for (int i = 0; i < 32; i += 8) store8(c.codes + i, load8(p + 2 + i) ^ 0x80 * kBytes);  // signed + 128
}

void read_iq4_nl(const uint8_t* p, int, Chunk& c) {
  set_scale(c, load_f16(p));
  read_nibbles(p + 2, c);
}

// The scale is 2^(e - 128), with e = 0 and 1 subnormal. No e is a NaN to ggml.
void read_mxfp4(const uint8_t* p, int, Chunk& c) {
  const uint32_t e = p[0];
  set_scale(c, bits_to_float(e < 2 ? 0x00200000u << e : (e - 1) << 23));
  read_nibbles(p + 1, c);
}

// From here on: 256 columns a block. Codes of 2 and 4 bits: 32 bytes hold the same bits of a few parts.

// scale and min [16], codes [64], d, dmin; value = d * scale * code - dmin * min.
void read_q2_k(const uint8_t* p, int part, Chunk& c) {
  const uint8_t *codes = p + 16 + part / 4 * 32, *scales = p + part * 2;
  for (int i = 0; i < 32; i += 8) store8(c.codes + i, load8(codes + i) >> part % 4 * 2 & 3 * kBytes);
  for (int g = 0; g < 2; ++g) {
    c.scale[g] = float(scales[g] & 15);
    c.offset[g] = float(-(scales[g] >> 4));
  }
  c.super_scale = load_f16(p + 80);
  c.super_min = load_f16(p + 82);
}

// bit 2 of codes [32], bits 0 and 1 [64], scales (6 bits, 32 too high) [12], d; value = d * scale * (code -
// 4).
void read_q3_k(const uint8_t* p, int part, Chunk& c) {
  const uint8_t *low = p + 32 + part / 4 * 32, *scales = p + 96;
  for (int i = 0; i < 32; i += 8) {
    const uint64_t high = load8(p + i) >> part & kBytes;
    // code - 4 = stored - 8
    store8(c.codes + i, (load8(low + i) >> part % 4 * 2 & 3 * kBytes) + (high << 2) + 4 * kBytes);
  }
  for (int g = 0; g < 2; ++g) {
    const int i = part * 2 + g;
    const int scale = (scales[i & 7] >> i / 8 * 4 & 15) | (scales[8 + (i & 3)] >> i / 4 * 2 & 3) << 4;
    c.scale[g] = float(scale - 32);
    c.offset[g] = 0;
  }
  c.super_scale = load_f16(p + 108);
  c.super_min = 0;
}

// d, dmin, scale and min (6 bits each) [12], [bit 4 of codes [32]], codes [128];
// value = d * scale * code - dmin * min.
template <int bits>
void read_q45_k(const uint8_t* p, int part, Chunk& c) {
  c.super_scale = load_f16(p);
  c.super_min = load_f16(p + 2);
  // Parts 0 to 3: low 6 bits of bytes 0 to 3 and 4 to 7. Parts 4 to 7: bytes 8 to 11 and the others' top
  // bits.
  const uint8_t* s = p + 4 + (part & 3);
  const int scale = part < 4 ? s[0] & 63 : (s[8] & 15) | s[0] >> 6 << 4;
  const int min = part < 4 ? s[4] & 63 : s[8] >> 4 | s[4] >> 6 << 4;
  set_scale(c, float(scale), float(-min));
  const uint8_t *high = p + 16, *low = high + (bits == 5 ? 32 : 0) + part / 2 * 32;
  for (int i = 0; i < 32; i += 8) {
    uint64_t v = load8(low + i) >> (part & 1) * 4 & 15 * kBytes;
    if (bits == 5) v |= (load8(high + i) >> part & kBytes) << 4;
    store8(c.codes + i, v);
  }
}

// bits 0 to 3 of codes [128], bits 4 and 5 [64], signed scales [16], d; value = d * scale * (code - 32).
void read_q6_k(const uint8_t* p, int part, Chunk& c) {
  const uint8_t *low = p + part / 4 * 64 + part % 2 * 32, *high = p + 128 + part / 4 * 32;
  for (int i = 0; i < 32; i += 8)
    store8(c.codes + i, (load8(low + i) >> part % 4 / 2 * 4 & 15 * kBytes) |
                            (load8(high + i) >> part % 4 * 2 & 3 * kBytes) << 4);
  set_scales(c, int8_t(p[192 + part * 2]), int8_t(p[193 + part * 2]));
  c.super_scale = load_f16(p + 208);
  c.super_min = 0;
}

// d, scales (6 bits, 32 too high): bits 4 and 5 [2], bits 0 to 3 [4], codes [128].
void read_iq4_xs(const uint8_t* p, int part, Chunk& c) {
  const int scale = nibble(p[4 + part / 2], part) | (load_as<uint16_t>(p + 2) >> part * 2 & 3) << 4;
  set_scale(c, float(scale - 32));
  c.super_scale = load_f16(p);
  c.super_min = 0;
  read_nibbles(p + 8 + part * 16, c);
}

// Eight signs, as bit 3 of eight codes.
uint64_t signs(uint64_t bits) { return spread_bits(bits) << 3; }
// Of 7 bits the eighth sign makes the number of minuses even.
uint64_t signs_of_7(uint32_t bits) {
  bits &= 127;
  return signs(bits | uint32_t(__builtin_parity(bits)) << 7);
}

// d, and for each part: grid indices [4], 4 times 7 signs and a scale of 4 bits.
void read_iq2_xxs(const uint8_t* p, int part, Chunk& c) {
  const uint8_t* q = p + 2 + part * 8;
  const auto rest = load_as<uint32_t>(q + 4);
  for (int i = 0; i < 4; ++i)
    store8(c.codes + 8 * i, spread_pairs(kIq2XxsGrid[q[i]]) | signs_of_7(rest >> 7 * i));
  const int scale = 2 * int(rest >> 28) + 1;
  set_scales(c, scale, scale);
  c.super_scale = load_f16(p);
  c.super_min = 0;
}

// d, grid index (9 bits) and 7 signs [32], scales of 4 bits [8].
void read_iq2_xs(const uint8_t* p, int part, Chunk& c) {
  for (int i = 0; i < 4; ++i) {
    const auto q = load_as<uint16_t>(p + 2 + part * 8 + i * 2);
    store8(c.codes + 8 * i, spread_pairs(kIq2XsGrid[q & 511]) | signs_of_7(q >> 9));
  }
  set_scales(c, 2 * (p[66 + part] & 15) + 1, 2 * (p[66 + part] >> 4) + 1);
  c.super_scale = load_f16(p);
  c.super_min = 0;
}

// d, grid index's low 8 bits [32], signs [32], index's 2 high bits [8], scales of 4 bits [8].
void read_iq2_s(const uint8_t* p, int part, Chunk& c) {
  const uint8_t* q = p + 2 + part * 4;
  for (int i = 0; i < 4; ++i) {
    const int row = q[i] | (p[66 + part] >> 2 * i & 3) << 8;
    store8(c.codes + 8 * i, spread_pairs(kIq2SGrid[row]) | signs(q[32 + i]));
  }
  set_scales(c, 2 * (p[74 + part] & 15) + 1, 2 * (p[74 + part] >> 4) + 1);
  c.super_scale = load_f16(p);
  c.super_min = 0;
}

uint64_t spread_triples(uint32_t first, uint32_t second) {
  return spread_triples(first) | uint64_t(spread_triples(second)) << 32;
}

// d, grid indices [64], and for each part 4 times 7 signs and a scale of 4 bits.
void read_iq3_xxs(const uint8_t* p, int part, Chunk& c) {
  const uint8_t* q = p + 2 + part * 8;
  const auto rest = load_as<uint32_t>(p + 66 + part * 4);
  for (int i = 0; i < 4; ++i)
    store8(c.codes + 8 * i,
           spread_triples(kIq3XxsGrid[q[2 * i]], kIq3XxsGrid[q[2 * i + 1]]) | signs_of_7(rest >> 7 * i));
  const int scale = 2 * int(rest >> 28) + 1;
  set_scales(c, scale, scale);
  c.super_scale = load_f16(p);
  c.super_min = 0;
}

// d, grid index's low 8 bits [64], its bit 8 [8], signs [32], scales of 4 bits [4].
void read_iq3_s(const uint8_t* p, int part, Chunk& c) {
  const uint8_t *q = p + 2 + part * 8, *sign = p + 74 + part * 4;
  const uint32_t high = p[66 + part];
  for (int i = 0; i < 4; ++i) {
    const uint32_t first = q[2 * i] | (high >> 2 * i & 1) << 8;
    const uint32_t second = q[2 * i + 1] | (high >> (2 * i + 1) & 1) << 8;
    store8(c.codes + 8 * i, spread_triples(kIq3SGrid[first], kIq3SGrid[second]) | signs(sign[i]));
  }
  const int scale = 2 * nibble(p[106 + part / 2], part) + 1;
  set_scales(c, scale, scale);
  c.super_scale = load_f16(p);
  c.super_min = 0;
}

// d, grid index's low 8 bits [32], and for each part 4 times its 3 high bits, a scale of 3 bits, and whether
// 1/8 is subtracted from the levels or added.
void read_iq1_s(const uint8_t* p, int part, Chunk& c) {
  const uint8_t* q = p + 2 + part * 4;
  const uint32_t rest = load_as<uint16_t>(p + 34 + part * 2);
  for (int i = 0; i < 4; ++i)
    store8(c.codes + 8 * i,
           spread_pairs(kIq1Grid[q[i] | (rest >> 3 * i & 7) << 8]) | (rest >> 15) * (8 * kBytes));
  const int scale = 2 * int(rest >> 12 & 7) + 1;
  set_scales(c, scale, scale);
  c.super_scale = load_f16(p);
  c.super_min = 0;
}

// grid index's low 8 bits [32], its 3 high bits and the sign of 1/8 in 4 bits [16], and in [4] x 16 bits: 4
// scales of 3 bits, and a quarter of d on top.
void read_iq1_m(const uint8_t* p, int part, Chunk& c) {
  const uint8_t *q = p + part * 4, *high = p + 32 + part * 2, *scales = p + 48;
  for (int i = 0; i < 4; ++i) {
    const uint32_t rest = high[i / 2] >> i % 2 * 4;
    store8(c.codes + 8 * i, spread_pairs(kIq1Grid[q[i] | (rest & 7) << 8]) | (rest >> 3 & 1) * (8 * kBytes));
  }
  const int pair = load_as<uint16_t>(scales + part / 2 * 2) >> part % 2 * 6;
  set_scales(c, 2 * (pair & 7) + 1, 2 * (pair >> 3 & 7) + 1);
  const int d = scales[1] >> 4 | scales[3] >> 4 << 4 | scales[5] >> 4 << 8 | scales[7] >> 4 << 12;
  c.super_scale = to_float(f16{uint16_t(d)});
  c.super_min = 0;
}

// Nothing is rounded: the supers are fp16 in the file, integer factors fit int8, 2^(e - 128) is a bf16. And a
// level times its factor times its super has at most 24 bits, so that fp32 products are exact in any order; a
// minimum adds one rounding, as it does in ggml.
constexpr GgufType kTypes[] = {
    {"Q4_0", Codes::int4, 32, Offset::none, Scale::f16, 32, 18, read_q<4, false>},
    {"Q4_1", Codes::int4, 32, Offset::min, Scale::f16, 32, 20, read_q<4, true>},
    {"Q5_0", Codes::int5, 32, Offset::none, Scale::f16, 32, 22, read_q<5, false>},
    {"Q5_1", Codes::int5, 32, Offset::min, Scale::f16, 32, 24, read_q<5, true>},
    {"Q8_0", Codes::int8, 32, Offset::none, Scale::f16, 32, 34, read_q8_0},
    {"Q2_K", Codes::int4, 16, Offset::min, Scale::two_level, 256, 84, read_q2_k},
    {"Q3_K", Codes::int4, 16, Offset::none, Scale::two_level, 256, 110, read_q3_k},
    {"Q4_K", Codes::int4, 32, Offset::min, Scale::two_level, 256, 144, read_q45_k<4>},
    {"Q5_K", Codes::int5, 32, Offset::min, Scale::two_level, 256, 176, read_q45_k<5>},
    {"Q6_K", Codes::int6, 16, Offset::none, Scale::two_level, 256, 210, read_q6_k},
    {"IQ1_S", Codes::iq1, 32, Offset::none, Scale::two_level, 256, 50, read_iq1_s},
    {"IQ1_M", Codes::iq1, 16, Offset::none, Scale::two_level, 256, 56, read_iq1_m},
    {"IQ2_XXS", Codes::iq2, 32, Offset::none, Scale::two_level, 256, 66, read_iq2_xxs},
    {"IQ2_XS", Codes::iq2, 16, Offset::none, Scale::two_level, 256, 74, read_iq2_xs},
    {"IQ2_S", Codes::iq2, 16, Offset::none, Scale::two_level, 256, 82, read_iq2_s},
    {"IQ3_XXS", Codes::iq3_xxs, 32, Offset::none, Scale::two_level, 256, 98, read_iq3_xxs},
    {"IQ3_S", Codes::iq3_s, 32, Offset::none, Scale::two_level, 256, 110, read_iq3_s},
    {"IQ4_NL", Codes::iq4_nl, 32, Offset::none, Scale::f16, 32, 18, read_iq4_nl},
    {"IQ4_XS", Codes::iq4_nl, 32, Offset::none, Scale::two_level, 256, 136, read_iq4_xs},
    {"MXFP4", Codes::mxfp4, 32, Offset::none, Scale::bf16, 32, 17, read_mxfp4},
};

}  // namespace

GgufTypes gguf_types() { return {std::begin(kTypes), std::end(kTypes)}; }

const GgufType* find_gguf_type(std::string_view name) {
  for (const GgufType& type : kTypes)
    if (name == type.name) return &type;
  return nullptr;
}

}  // namespace tilewright
