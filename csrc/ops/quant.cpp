// Packing into and reading from the layout of PackedWeight (cpu/kernels.h). Done once a weight, or for a few
// rows a step (embeddings), so plain C++: packing runs at the speed of memory on two threads as it is.
#include "ops/quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/code_tables.h"
#include "cpu/simd.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"
#include "ops/gguf_blocks.h"

namespace tilewright {
namespace {

struct GgufSource {
  const GgufType& type;
  const uint8_t* data;
  int64_t row_bytes;

  void read(int64_t row, int64_t kb, Chunk& c) const {
    const int64_t block = type.columns == 256 ? kb / 8 : kb;
    type.read(data + row * row_bytes + block * type.bytes, int(kb - block * (type.columns / 32)), c);
  }
};

// codes uint8 (n, k), scales fp32 (n, groups), offsets fp32 or uint8 (n, groups) or none; all contiguous.
struct ArraySource {
  const uint8_t* codes;
  const float* scales;
  const void* offsets;
  Offset offset;
  int64_t k, groups, parts, blocks_per_group;

  void read(int64_t row, int64_t kb, Chunk& c) const {
    const int64_t first = kb * 32, count = std::min<int64_t>(32, k - first);
    std::memcpy(c.codes, codes + row * k + first, static_cast<size_t>(count));
    std::memset(c.codes + count, 0, static_cast<size_t>(32 - count));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t group = kb * parts / blocks_per_group + part, g = row * groups + group;
      const bool exists = group < groups;  // the second half of the last block may not
      c.scale[part] = exists ? scales[g] : 0.0f;
      c.offset[part] = 0.0f;
      if (exists && offset == Offset::min) c.offset[part] = static_cast<const float*>(offsets)[g];
      if (exists && offset == Offset::zero) c.offset[part] = static_cast<const uint8_t*>(offsets)[g];
    }
  }
};

void put_value(uint8_t* base, int64_t at, Scale kind, float v) {
  if (kind == Scale::f32) std::memcpy(base + at * 4, &v, 4);
  if (kind == Scale::two_level) base[at] = static_cast<uint8_t>(static_cast<int8_t>(v));
  if (kind == Scale::f16 || kind == Scale::bf16) {
    const uint16_t bits = kind == Scale::f16 ? to_f16(v).bits : to_bf16(v).bits;
    std::memcpy(base + at * 2, &bits, 2);
  }
}

float get_value(const uint8_t* base, int64_t at, Scale kind) {
  if (kind == Scale::f32) {
    float v;
    std::memcpy(&v, base + at * 4, 4);
    return v;
  }
  if (kind == Scale::two_level) return static_cast<int8_t>(base[at]);
  uint16_t bits;
  std::memcpy(&bits, base + at * 2, 2);
  return kind == Scale::f16 ? to_float(f16{bits}) : to_float(bf16{bits});
}

// The sections of a block (see PackedWeight).
template <class Byte>
struct Sections {
  Byte *codes, *scales, *offsets, *supers;
  Sections(const PackedWeight& w, Byte* data, int64_t block) {
    codes = data + block * w.block_bytes();
    scales = codes + w.code_bytes();
    offsets = scales + w.groups() * 32 * w.scale_bytes();
    supers = offsets + w.groups() * 32 * w.offset_bytes();
  }
};

// The codes of 32 columns of row r of a block.
void put_codes(const PackedWeight& w, uint8_t* codes, int64_t kb, int64_t r, const uint8_t from[32]) {
  codes += kb * 128 * w.bits();
  if (w.bits() == 8) {
    for (int step = 0; step < 8; ++step) std::memcpy(codes + step * 128 + r * 4, from + step * 4, 4);
    return;
  }
  const int shift = r < 16 ? 0 : 4;
  const int64_t lane = (r & 15) * 4;
  for (int step = 0; step < 8; ++step) {
    uint32_t have, add;
    std::memcpy(&have, codes + step * 64 + lane, 4);
    std::memcpy(&add, from + step * 4, 4);
    have |= (add & 0x0f0f0f0fu) << shift;
    std::memcpy(codes + step * 64 + lane, &have, 4);
  }
  const int upper = w.bits() - 4;  // bits in planes
  for (int step = 0; upper > 0 && step < 8; ++step) {
    const int per_plane = 8 / upper;
    uint8_t* plane = codes + 512 + step / per_plane * 128 + (r < 16 ? 0 : 64) + lane;
    uint32_t have, add;
    std::memcpy(&have, plane, 4);
    std::memcpy(&add, from + step * 4, 4);
    have |= (add >> 4 & (upper == 1 ? 0x01010101u : 0x03030303u)) << (step % per_plane * upper);
    std::memcpy(plane, &have, 4);
  }
}

int get_code(const PackedWeight& w, const uint8_t* codes, int64_t kb, int64_t r, int64_t i) {
  codes += kb * 128 * w.bits();
  const int64_t step = i / 4, lane = (r & 15) * 4 + i % 4;
  if (w.bits() == 8) return codes[step * 128 + r * 4 + i % 4];
  int code = (codes[step * 64 + lane] >> (r < 16 ? 0 : 4)) & 15;
  if (const int upper = w.bits() - 4; upper > 0) {
    const int per_plane = 8 / upper;
    const uint8_t plane = codes[512 + step / per_plane * 128 + (r < 16 ? 0 : 64) + lane];
    code |= (plane >> (step % per_plane * upper) & ((1 << upper) - 1)) << 4;
  }
  return code;
}

template <class Source>
void pack_blocks(const PackedWeight& w, const Source& source, uint8_t* out) {
  parallel_ranges(w.n_blocks(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Sections<uint8_t> to(w, out, block);
      std::memset(to.codes, 0, static_cast<size_t>(w.block_bytes()));
      const int64_t rows = std::min<int64_t>(32, w.n - block * 32);
      for (int64_t kb = 0; kb < w.k_blocks(); ++kb) {
        const int64_t group = kb / w.blocks_per_group() * w.parts();
        for (int64_t r = 0; r < rows; ++r) {
          Chunk c;
          source.read(block * 32 + r, kb, c);
          put_codes(w, to.codes, kb, r, c.codes);
          if (kb % w.blocks_per_group() != 0) continue;
          for (int64_t part = 0; part < w.parts(); ++part) {
            const int64_t g = (group + part) * 32 + r;
            put_value(to.scales, g, w.scale, c.scale[part]);
            if (w.offset == Offset::min) put_value(to.offsets, g, w.scale, c.offset[part]);
            if (w.offset == Offset::zero) to.offsets[g] = static_cast<uint8_t>(c.offset[part]);
          }
          if (w.scale == Scale::two_level && kb % 8 == 0) {
            put_value(to.supers, kb / 8 * 32 + r, Scale::f16, c.super_scale);
            if (w.offset == Offset::min)
              put_value(to.supers, (w.k_supers() + kb / 8) * 32 + r, Scale::f16, c.super_min);
          }
        }
      }
    }
  });
}

const IntegerTable& integer_table(Codes c) {
  return c == Codes::mxfp4     ? kMxfp4
         : c == Codes::iq1     ? kIq1
         : c == Codes::iq2     ? kIq2
         : c == Codes::iq3_xxs ? kIq3Xxs
         : c == Codes::iq3_s   ? kIq3S
                               : kIq4Nl;
}

float e4m3_value(int byte) {
  const int e = byte >> 3 & 15, m = byte & 7;
  if (e == 15 && m == 7) return std::nanf("");
  const float magnitude = e == 0 ? std::ldexp(static_cast<float>(m), -9) : std::ldexp(8.0f + m, e - 10);
  return byte & 0x80 ? -magnitude : magnitude;
}

// Elements of a weight as floats.
class Dequantiser {
 public:
  explicit Dequantiser(const PackedWeight& weight) : w_(weight) {
    const int codes = 1 << std::min(w_.bits(), 8);
    for (int c = 0; c < codes; ++c) {
      if (w_.codes == Codes::e4m3)
        values_[c] = e4m3_value(c);
      else if (w_.is_table() && w_.is_float())
        values_[c] = (w_.codes == Codes::nf4 ? kNf4 : kFp4).values[c];
      else if (w_.is_table())
        values_[c] = integer_table(w_.codes).values[c];
      else
        values_[c] = static_cast<float>(c - (w_.offset == Offset::none ? codes / 2 : 0));
    }
    if (w_.is_table() && !w_.is_float()) unit_ = integer_table(w_.codes).unit;
  }

  // Columns [first, last) of row r of a block, within one part of block kb of 32.
  void read(const Sections<const uint8_t>& from, int64_t kb, int64_t r, int64_t first, int64_t last,
            float* out) const {
    if (w_.codes == Codes::bf16) {
      for (int64_t k = first; k < last; ++k) {
        bf16 v;
        std::memcpy(&v,
                    from.codes + k / 32 * 2048 + (r < 16 ? 0 : 1024) + k % 32 / 4 * 128 + k % 2 * 64 +
                        (r & 15) * 4 + k % 4 / 2 * 2,
                    2);
        *out++ = to_float(v);
      }
      return;
    }
    const int64_t part = (first - kb * 32) * w_.parts() / 32;
    const int64_t g = (kb / w_.blocks_per_group() * w_.parts() + part) * 32 + r;
    float scale = get_value(from.scales, g, w_.scale), min = 0.0f;
    if (w_.offset == Offset::min) min = get_value(from.offsets, g, w_.scale);
    if (w_.scale == Scale::two_level) {
      scale *= get_value(from.supers, kb / 8 * 32 + r, Scale::f16) * unit_;
      if (w_.offset == Offset::min)
        min *= get_value(from.supers, (w_.k_supers() + kb / 8) * 32 + r, Scale::f16);
    }
    const float zero = w_.offset == Offset::zero ? from.offsets[g] : 0.0f;
    for (int64_t k = first; k < last; ++k) {
      const float v = scale * (values_[get_code(w_, from.codes, kb, r, k - kb * 32)] - zero);
      *out++ = w_.offset == Offset::min ? v + min : v;
    }
  }

 private:
  const PackedWeight& w_;
  float values_[256];  // what a code stands for, before scale and zero point
  float unit_ = 1.0f;
};

}  // namespace

void dequantise_row(const PackedWeight& w, int64_t row, float* out) {
  const Dequantiser dequantiser(w);
  const Sections<const uint8_t> from(w, w.data, row / 32);
  const int64_t step = 32 / w.parts();
  for (int64_t k = 0; k < w.k; k += step)
    dequantiser.read(from, k / 32, row % 32, k, std::min(k + step, w.k), out + k);
}

void dequantise_column(const PackedWeight& w, int64_t block, int64_t k, float* out) {
  const Dequantiser dequantiser(w);
  const Sections<const uint8_t> from(w, w.data, block);
  for (int64_t r = 0; r < 32; ++r) dequantiser.read(from, k / 32, r, k, k + 1, out + r);
}

namespace {

// The format as a PackedWeight without data; impossible ones are refused.
PackedWeight described(const char* op, const WeightFormat& f) {
  TW_EXPECT(f.n >= 0 && f.k >= 0 && f.n < (int64_t{1} << 40) && f.k < (int64_t{1} << 31), op,
            "impossible weight shape");
  TW_EXPECT(f.codes >= 0 && f.codes <= static_cast<int>(Codes::bf16), op, "unknown kind of codes");
  TW_EXPECT(f.group_size == -1 || f.group_size == 16 || (f.group_size > 0 && f.group_size % 32 == 0), op,
            "group_size must be -1, 16 or a multiple of 32, got " + std::to_string(f.group_size));
  TW_EXPECT(f.offset >= 0 && f.offset <= 2 && f.scale >= 0 && f.scale <= static_cast<int>(Scale::none), op,
            "unknown offset or scale kind");
  PackedWeight w;
  w.n = f.n;
  w.k = f.k;
  w.codes = static_cast<Codes>(f.codes);
  w.offset = static_cast<Offset>(f.offset);
  w.scale = static_cast<Scale>(f.scale);
  w.group = f.group_size < 0 ? std::max<int64_t>(32, (f.k + 31) / 32 * 32) : f.group_size;
  TW_EXPECT((w.codes == Codes::bf16) == (w.scale == Scale::none), op,
            "bf16 codes, and only those, have no scales");
  TW_EXPECT(w.offset == Offset::none || !(w.is_table() || w.is_float()), op,
            "codes of tables, e4m3 and bf16 have no offsets");
  TW_EXPECT(w.scale == Scale::two_level || w.codes < Codes::iq1 || w.codes > Codes::iq3_s, op,
            "codes iq1 to iq3 have two-level scales");
  TW_EXPECT(w.scale != Scale::two_level || (w.offset != Offset::zero && w.group <= 256 && 256 % w.group == 0),
            op, "two-level scales go with groups that divide 256, and not with zero points");
  return w;
}

bool contiguous_matrix(const TensorView& t) {
  return t.ndim == 2 && (t.numel() == 0 || ((t.shape[1] == 1 || t.strides[1] == 1) &&
                                            (t.shape[0] == 1 || t.strides[0] == t.shape[1])));
}

}  // namespace

PackedWeight packed_weight(const char* op, const TensorView& packed, const WeightFormat& format) {
  PackedWeight w = described(op, format);
  w.data = packed.as<const uint8_t>();
  expect_cpu(op, "the packed weight", packed);
  TW_EXPECT(packed.dtype == DType::u8 && packed.dim(0) == w.n_blocks() && packed.dim(1) == w.block_bytes() &&
                contiguous_matrix(packed),
            op,
            "the packed weight must be contiguous uint8 of shape (" + std::to_string(w.n_blocks()) + ", " +
                std::to_string(w.block_bytes()) + "), got " + name_of(packed.dtype) + " " + shape_of(packed));
  return w;
}

int64_t packed_block_bytes(const WeightFormat& format) {
  return described("packed_block_bytes", format).block_bytes();
}

void pack_codes(const TensorView& codes, const TensorView& scales, const TensorView& offsets,
                const TensorView& out, const WeightFormat& format) {
  constexpr const char* op = "pack";
  const PackedWeight w = packed_weight(op, out, format);
  TW_EXPECT(w.scale != Scale::none && w.scale != Scale::two_level, op, "scales must be fp16, bf16 or fp32");
  TW_EXPECT(
      codes.dtype == DType::u8 && contiguous_matrix(codes) && codes.dim(0) == w.n && codes.dim(1) == w.k, op,
      "codes must be contiguous uint8 (n, k)");
  const int64_t columns = format.group_size < 0 ? std::max<int64_t>(w.k, 1) : w.group;
  const int64_t groups = (w.k + columns - 1) / columns;
  TW_EXPECT(scales.dtype == DType::f32 && contiguous_matrix(scales) && scales.dim(0) == w.n &&
                (w.k == 0 || scales.dim(1) == groups),
            op, "scales must be contiguous float32 (n, groups)");
  if (w.offset != Offset::none)
    TW_EXPECT(offsets.dtype == (w.offset == Offset::min ? DType::f32 : DType::u8) &&
                  contiguous_matrix(offsets) && same_shape(offsets, scales),
              op, "offsets must have the scales' shape, float32 for minima and uint8 for zero points");
  if (w.n == 0 || w.k == 0) return;
  pack_blocks(w,
              ArraySource{codes.as<const uint8_t>(), scales.as<const float>(), offsets.data, w.offset, w.k,
                          groups, w.parts(), w.blocks_per_group()},
              out.as<uint8_t>());
}

void pack_bf16(const TensorView& w, const TensorView& out, const WeightFormat& format) {
  constexpr const char* op = "pack";
  const PackedWeight to = packed_weight(op, out, format);
  TW_EXPECT(w.dtype == DType::bf16 && contiguous_matrix(w) && w.dim(0) == to.n && w.dim(1) == to.k &&
                to.codes == Codes::bf16,
            op, "a dense weight must be contiguous bfloat16 (n, k)");
  const auto* from = w.as<const uint16_t>();
  auto* data = out.as<uint8_t>();
  parallel_ranges(to.n_blocks(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* codes = data + block * to.block_bytes();
      std::memset(codes, 0, static_cast<size_t>(to.block_bytes()));
      for (int64_t r = 0; r < std::min<int64_t>(32, to.n - block * 32); ++r) {
        const uint16_t* row = from + (block * 32 + r) * to.k;
        uint8_t* first = codes + (r < 16 ? 0 : 1024) + (r & 15) * 4;
        for (int64_t k = 0; k < to.k; k += 4) {
          uint8_t* at = first + k / 32 * 2048 + k % 32 / 4 * 128;
          for (int64_t i = 0; i < std::min<int64_t>(4, to.k - k); ++i)
            std::memcpy(at + i % 2 * 64 + i / 2 * 2, row + k + i, 2);
        }
      }
    }
  });
}

void pack_gguf(const TensorView& raw, const std::string& type_name, const TensorView& out, int64_t n,
               int64_t k) {
  constexpr const char* op = "from_gguf";
  const GgufType* type = find_gguf_type(type_name);
  TW_EXPECT(type != nullptr, op, "unknown type " + type_name);
  const PackedWeight w =
      packed_weight(op, out, {n, k, int(type->codes), type->group, int(type->offset), int(type->scale)});
  const int64_t row_bytes = k / type->columns * type->bytes;
  expect_cpu(op, "raw", raw);
  TW_EXPECT(
      k % type->columns == 0 && raw.dtype == DType::u8 && contiguous_matrix(raw) && raw.dim(0) == n &&
          raw.dim(1) == row_bytes,
      op,
      type_name + " data must be contiguous uint8 (rows, bytes) of the weight's size, got " + shape_of(raw));
  if (w.n == 0 || w.k == 0) return;
  pack_blocks(w, GgufSource{*type, raw.as<const uint8_t>(), row_bytes}, out.as<uint8_t>());
}

void weight_rows(const TensorView& index, const TensorView& packed, const WeightFormat& format,
                 const TensorView& out) {
  constexpr const char* op = "QuantizedWeight.rows";
  const PackedWeight w = packed_weight(op, packed, format);
  const int64_t n = w.n, k = w.k;
  TW_EXPECT(index.dtype == DType::i64 && index.ndim == 1 && (index.dim(0) <= 1 || index.stride(0) == 1), op,
            "index must be contiguous int64");
  TW_EXPECT(out.dtype == DType::f32 && out.ndim == 2 && out.dim(0) == index.dim(0) && out.dim(1) == k &&
                (out.numel() == 0 || (out.stride(0) == k && (k == 1 || out.stride(1) == 1))),
            op, "out must be contiguous float32 (len(index), k)");
  const auto* rows = index.as<const int64_t>();
  for (int64_t i = 0; i < index.dim(0); ++i)
    if (rows[i] < 0 || rows[i] >= n)
      throw std::out_of_range(std::string(op) + ": index " + std::to_string(rows[i]) + " is outside the " +
                              std::to_string(n) + " rows");
  if (out.numel() == 0) return;
  parallel_ranges(index.dim(0), std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dequantise_row(w, rows[i], out.as<float>() + i * k);
  });
}

}  // namespace tilewright
