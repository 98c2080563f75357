// Reading a PackedWeight inside kernels. Included after cpu/simd.h.
#pragma once
#include "cpu/code_tables.h"
#include "cpu/kernels.h"
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

// One block of 32 rows. Its 32 outputs are computed in pairs of vectors: pair p covers rows [p*W, p*W + W)
// (low nibbles) and [16 + p*W, 16 + p*W + W) (high nibbles), so a 4-bit load feeds both.
constexpr int kPairs = 16 / W;
TW_INLINE int pair_row(int pair, int half) { return half * 16 + pair * W; }

// How codes are read, one step of 4 k after the other: several kinds of codes share a way.
enum class Read { nibbles, five, six, bytes, table, e4m3, bf16 };
TW_INLINE Read read_of(const PackedWeight& w) {
  switch (w.codes) {
    case Codes::int4:
      return Read::nibbles;
    case Codes::int5:
      return Read::five;
    case Codes::int6:
      return Read::six;
    case Codes::int8:
      return Read::bytes;
    case Codes::e4m3:
      return Read::e4m3;
    case Codes::bf16:
      return Read::bf16;
    default:
      return Read::table;
  }
}
// Calls f with Read as a constant; those without integer codes only where asked.
template <Read r>
struct As {
  static constexpr Read read = r;
};
template <bool kFloats, class Fn>
TW_INLINE void with_read(const PackedWeight& w, Fn&& f) {
  switch (read_of(w)) {
    case Read::nibbles:
      return f(As<Read::nibbles>{});
    case Read::five:
      return f(As<Read::five>{});
    case Read::six:
      return f(As<Read::six>{});
    case Read::bytes:
      return f(As<Read::bytes>{});
    case Read::table:
      return f(As<Read::table>{});
    case Read::e4m3:
      if constexpr (kFloats) f(As<Read::e4m3>{});
      return;
    case Read::bf16:
      if constexpr (kFloats) f(As<Read::bf16>{});
      return;
  }
}
constexpr int code_block_bytes(Read r) {  // of 32 k
  return r == Read::bf16                       ? 2048
         : r == Read::bytes || r == Read::e4m3 ? 1024
         : r == Read::six                      ? 768
         : r == Read::five                     ? 640
                                               : 512;
}

TW_INLINE const IntegerTable& integer_table(Codes c) {
  switch (c) {
    case Codes::mxfp4:
      return kMxfp4;
    case Codes::iq1:
      return kIq1;
    case Codes::iq2:
      return kIq2;
    case Codes::iq3_xxs:
      return kIq3Xxs;
    case Codes::iq3_s:
      return kIq3S;
    default:
      return kIq4Nl;
  }
}

struct Block {
  const uint8_t *codes, *scales, *offsets, *supers;
  Scale kind;
  int64_t super_offsets;  // from the supers of scales to those of minima
  float unit;             // of a table's values, a power of two
  int blocks_per_group, parts;

  Block() = default;
  TW_INLINE Block(const PackedWeight& w, int64_t block) {
    codes = w.data + block * w.block_bytes();
    scales = codes + w.code_bytes();
    offsets = scales + w.groups() * 32 * w.scale_bytes();
    supers = offsets + w.groups() * 32 * w.offset_bytes();
    kind = w.scale;
    super_offsets = w.k_supers() * 64;
    unit = w.is_table() && !w.is_float() ? integer_table(w.codes).unit : 1.0f;
    blocks_per_group = int(w.blocks_per_group());
    parts = int(w.parts());
  }
  // Of part `part` of block kb of 32 k.
  TW_INLINE int64_t group(int64_t kb, int part) const {
    return parts == 2              ? kb * 2 + part
           : blocks_per_group == 1 ? kb
                                   : uint32_t(kb) / uint32_t(blocks_per_group);
  }
  TW_INLINE F values(const uint8_t* p, int64_t group, int64_t kb, int row, const uint8_t* super) const {
    const int64_t at = group * 32 + row;
    switch (kind) {
      case Scale::f16:
        return load(reinterpret_cast<const f16*>(p) + at);
      case Scale::bf16:
        return load(reinterpret_cast<const bf16*>(p) + at);
      case Scale::f32:
        return load(reinterpret_cast<const float*>(p) + at);
      case Scale::two_level:
        // Exact: 11 bits and a power of two, times 8 bits.
        return mul(mul(load(reinterpret_cast<const f16*>(super) + kb / 8 * 32 + row), set1(unit)),
                   to_float(load_s8(reinterpret_cast<const int8_t*>(p) + at)));
      default:
        return set1(1.0f);
    }
  }
  TW_INLINE F scale(int64_t group, int64_t kb, int row) const {
    return values(scales, group, kb, row, supers);
  }
  TW_INLINE F minimum(int64_t group, int64_t kb, int row) const {
    return values(offsets, group, kb, row, supers + super_offsets);
  }
  TW_INLINE I zero_point(int64_t group, int row) const { return load_u8(offsets + group * 32 + row); }
};

// Scales and offsets where a tile wants them: of part `part` of block kb, W rows from `row` on. As they are
// stored, for tiles that pass over a weight once, ...
struct StoredScales {
  Block block;
  TW_INLINE F scale(int64_t kb, int part, int row) const {
    return block.scale(block.group(kb, part), kb, row);
  }
  TW_INLINE F minimum(int64_t kb, int part, int row) const {
    return block.minimum(block.group(kb, part), kb, row);
  }
  TW_INLINE I zero_point(int64_t kb, int part, int row) const {
    return block.zero_point(block.group(kb, part), row);
  }
};
// ... and decoded with the codes of a slab, for those that share a panel.
struct PanelScales {
  const float *scales, *offsets;  // [block][part][32 rows]; zero points are int32
  int64_t first;                  // block
  int parts;

  // For blocks [first, last) of at most kPanelBlocks, into the memory after a panel of kPanelBytes.
  static constexpr int64_t kPanelBlocks = 16;
  TW_INLINE PanelScales(const Block& b, Offset offset, int64_t first, int64_t last, uint8_t* panel)
      : first(first), parts(b.parts) {
    auto* s = reinterpret_cast<float*>(panel + kPanelBytes);
    float* o = s + kPanelBlocks * 2 * 32;
    scales = s;
    offsets = o;
    for (int64_t kb = first; kb < last; ++kb)
      for (int part = 0; part < parts; ++part)
        for (int row = 0; row < 32; row += W, s += W, o += W) {
          const int64_t group = b.group(kb, part);
          store(s, b.scale(group, kb, row));
          if (offset == Offset::min) store(o, b.minimum(group, kb, row));
          if (offset == Offset::zero) istore(o, b.zero_point(group, row));
        }
  }
  TW_INLINE int64_t at(int64_t kb, int part, int row) const {
    return ((kb - first) * parts + part) * 32 + row;
  }
  TW_INLINE F scale(int64_t kb, int part, int row) const { return load(scales + at(kb, part, row)); }
  TW_INLINE F minimum(int64_t kb, int part, int row) const { return load(offsets + at(kb, part, row)); }
  TW_INLINE I zero_point(int64_t kb, int part, int row) const { return iload(offsets + at(kb, part, row)); }
};
static_assert(kPanelScaleBytes == PanelScales::kPanelBlocks * 2 * 32 * 4 * 2);

// The codes of 32 k of a pair of vectors, one step of 4 after the other: 4 bytes a lane, a lane a row. Codes
// of a table come as they are stored.
template <Read r>
struct StepReader {
  const uint8_t* at;
  I low_bits, high_bits;  // five, six: what is left of the planes

  TW_INLINE StepReader(const uint8_t* codes, int64_t kb, int pair)
      : at(codes + kb * code_block_bytes(r) + pair * W * 4) {
    if constexpr (r == Read::five) planes(0);
  }
  TW_INLINE void planes(int step) {
    const uint8_t* p = at + 512 + step / 4 * 128;
    low_bits = iload(p);
    high_bits = iload(p + 64);
  }
  // Steps are asked for in ascending order, each once.
  TW_INLINE void step(int step, I& low, I& high) {
    if constexpr (r == Read::bytes || r == Read::e4m3) {
      low = iload(at + step * 128);
      high = iload(at + step * 128 + 64);
    } else {
      const I raw = in_register(iload(at + step * 64));
      low = low_nibbles(raw);
      high = high_nibbles(raw);
      if constexpr (r == Read::five) {
        const I one = iset1(0x10101010);
        low = ior(low, iand(ishl<4>(low_bits), one));
        high = ior(high, iand(ishl<4>(high_bits), one));
        low_bits = ishr<1>(low_bits);
        high_bits = ishr<1>(high_bits);
      }
      if constexpr (r == Read::six) {
        if (step % 4 == 0) planes(step);
        const I two = iset1(0x30303030);
        low = ior(low, iand(ishl<4>(low_bits), two));
        high = ior(high, iand(ishl<4>(high_bits), two));
        low_bits = ishr<2>(low_bits);
        high_bits = ishr<2>(high_bits);
      }
    }
  }
};

// Codes that a pass over a block with few rows will want soon: `bytes` more with each call.
struct Prefetch {
  const uint8_t* at = nullptr;
  int bytes = 0;
  // For a pass that is over before all could arrive: the processor itself follows a stream whose page's head
  // it has seen.
  bool heads = false;
  static constexpr uintptr_t kPage = 4096, kHead = 512;
  TW_INLINE void next() {
    if (!heads || (reinterpret_cast<uintptr_t>(at) & (kPage - 1)) < kHead)
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += bytes;
  }
};

// The values of a table of integers, as unsigned bytes around 128.
struct ByteTable {
  uint8_t bytes[16];
  TW_INLINE explicit ByteTable(const PackedWeight& w) {
    const IntegerTable& table = integer_table(w.codes);
    for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(table.values[i] + 128);
  }
};
// The values of any table as floats. Units are the scale's business.
struct ValueTable {
  float values[16];
  TW_INLINE explicit ValueTable(const PackedWeight& w) {
    const FloatTable& floats = w.codes == Codes::fp4 ? kFp4 : kNf4;
    const IntegerTable& integers = integer_table(w.codes);
    for (int i = 0; i < 16; ++i) values[i] = w.is_float() ? floats.values[i] : float(integers.values[i]);
  }
};

// Stores W outputs of row m, the block's rows [first, first + W), with bias and residual; outputs past n are
// dropped.
TW_INLINE void store_outputs(const LinearArgs& a, int64_t block, int first, int64_t m, F y) {
  const int64_t at = block * 32 + first, left = a.w.n - at;
  if (left <= 0) return;
  const int count = left < W ? int(left) : W;
  if (a.bias) y = add(y, load(a.bias + at, count));
  with_storage(a.out_dtype, [&](auto t) {
    using T = decltype(t);
    T* out = row<T>(a.out, m) + at;
    const T* residual = a.residual.base ? row<const T>(a.residual, m) + at : nullptr;
    if (count == W)
      store(out, residual ? add(y, load(residual)) : y);
    else
      store(out, residual ? add(y, load(residual, count)) : y, count);
  });
}

}  // namespace
}  // namespace tilewright
