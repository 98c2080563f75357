// Packing into and reading from the layout of PackedWeight (cpu/kernels.h). Done once a weight, or for a few
// rows a step (embeddings), so plain C++: packing runs at the speed of memory on two threads as it is.
#include "ops/quant.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/simd.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {
namespace {

// Where codes come from: 32 consecutive k of one row, with their scale and offset.
struct Chunk {
  uint8_t codes[32];
  float scale, offset;
};

// GGUF blocks of 32 (ggml's quants): value = d * (code - 8), d * code + m, d * (code - 128).
struct GgufSource {
  const uint8_t* data;
  int64_t row_bytes;
  enum Kind { q4_0, q4_1, q8_0 } kind;
  int64_t block_bytes() const { return kind == q4_0 ? 18 : kind == q4_1 ? 20 : 34; }

  void read(int64_t row, int64_t kb, Chunk& c) const {
    const uint8_t* p = data + row * row_bytes + kb * block_bytes();
    f16 half;
    std::memcpy(&half, p, 2);
    c.scale = to_float(half);
    p += 2;
    if (kind == q4_1) {
      std::memcpy(&half, p, 2);
      c.offset = to_float(half);
      p += 2;
    }
    if (kind == q8_0) {
      for (int i = 0; i < 32; ++i) c.codes[i] = uint8_t(p[i] ^ 0x80);  // signed + 128
    } else {
      for (int i = 0; i < 16; ++i) {
        c.codes[i] = p[i] & 15;
        c.codes[i + 16] = p[i] >> 4;
      }
    }
  }
};

// codes uint8 (n, k), scales fp32 (n, groups), offsets fp32 or uint8 (n, groups) or none; all contiguous.
struct ArraySource {
  const uint8_t* codes;
  const float* scales;
  const void* offsets;
  Offset offset;
  int64_t k, groups, blocks_per_group;

  void read(int64_t row, int64_t kb, Chunk& c) const {
    const int64_t first = kb * 32, count = std::min<int64_t>(32, k - first);
    std::memcpy(c.codes, codes + row * k + first, static_cast<size_t>(count));
    std::memset(c.codes + count, 0, static_cast<size_t>(32 - count));
    const int64_t g = row * groups + kb / blocks_per_group;
    c.scale = scales[g];
    if (offset == Offset::min) c.offset = static_cast<const float*>(offsets)[g];
    if (offset == Offset::zero) c.offset = static_cast<const uint8_t*>(offsets)[g];
  }
};

void put_value(uint8_t* p, bool half, float v) {
  if (half) {
    const f16 h = to_f16(v);
    std::memcpy(p, &h, 2);
  } else {
    std::memcpy(p, &v, 4);
  }
}

float get_value(const uint8_t* p, bool half) {
  if (half) {
    f16 h;
    std::memcpy(&h, p, 2);
    return to_float(h);
  }
  float v;
  std::memcpy(&v, p, 4);
  return v;
}

template <class Source>
void pack_blocks(const PackedWeight& w, const Source& source, uint8_t* out) {
  parallel_ranges(w.n_blocks(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* codes = out + block * w.block_bytes();
      uint8_t* scales = codes + w.code_bytes();
      uint8_t* offsets = scales + w.groups() * 32 * w.scale_bytes();
      std::memset(codes, 0, static_cast<size_t>(w.block_bytes()));
      const int64_t rows = std::min<int64_t>(32, w.n - block * 32);
      for (int64_t kb = 0; kb < w.k_blocks(); ++kb) {
        const int64_t group = kb / w.blocks_per_group();
        for (int64_t r = 0; r < rows; ++r) {
          Chunk c;
          source.read(block * 32 + r, kb, c);
          if (w.bits == 8) {
            uint8_t* at = codes + kb * 1024 + r * 4;
            for (int step = 0; step < 8; ++step) std::memcpy(at + step * 128, c.codes + step * 4, 4);
          } else {
            uint8_t* at = codes + kb * 512 + (r & 15) * 4;
            const int shift = r < 16 ? 0 : 4;
            for (int step = 0; step < 8; ++step) {
              uint32_t have, add;
              std::memcpy(&have, at + step * 64, 4);
              std::memcpy(&add, c.codes + step * 4, 4);
              have |= (add & 0x0f0f0f0fu) << shift;
              std::memcpy(at + step * 64, &have, 4);
            }
          }
          if (kb % w.blocks_per_group() == 0) {
            const int64_t g = group * 32 + r;
            put_value(scales + g * w.scale_bytes(), w.half_scales, c.scale);
            if (w.offset == Offset::min) put_value(offsets + g * w.scale_bytes(), w.half_scales, c.offset);
            if (w.offset == Offset::zero) offsets[g] = static_cast<uint8_t>(c.offset);
          }
        }
      }
    }
  });
}

}  // namespace

void dequantise_row(const PackedWeight& w, int64_t row, float* out) {
  const uint8_t* codes = w.data + (row / 32) * w.block_bytes();
  const uint8_t* scales = codes + w.code_bytes();
  const uint8_t* offsets = scales + w.groups() * 32 * w.scale_bytes();
  const int64_t r = row % 32;
  for (int64_t kb = 0; kb < w.k_blocks(); ++kb) {
    const int64_t g = kb / w.blocks_per_group() * 32 + r;
    const float scale = get_value(scales + g * w.scale_bytes(), w.half_scales);
    const float zero = w.offset == Offset::zero   ? offsets[g]
                       : w.offset == Offset::none ? 1 << (w.bits - 1)
                                                  : 0;
    const float min =
        w.offset == Offset::min ? get_value(offsets + g * w.scale_bytes(), w.half_scales) : 0.0f;
    const int64_t count = std::min<int64_t>(32, w.k - kb * 32);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t step = i / 4, lane = i % 4;
      const int code = w.bits == 8
                           ? codes[kb * 1024 + step * 128 + r * 4 + lane]
                           : (codes[kb * 512 + step * 64 + (r & 15) * 4 + lane] >> (r < 16 ? 0 : 4)) & 15;
      const float v = scale * (static_cast<float>(code) - zero);
      out[kb * 32 + i] = w.offset == Offset::min ? v + min : v;
    }
  }
}

PackedWeight packed_weight(const char* op, const TensorView& packed, int64_t n, int64_t k, int bits,
                           int64_t group_size, int offset, int scale_bits) {
  TW_EXPECT(n >= 0 && k >= 0 && n < (int64_t{1} << 40) && k < (int64_t{1} << 31), op,
            "impossible weight shape");
  TW_EXPECT(bits == 4 || bits == 8, op, "bits must be 4 or 8, got " + std::to_string(bits));
  TW_EXPECT(group_size == -1 || (group_size > 0 && group_size % 32 == 0), op,
            "group_size must be -1 or a multiple of 32, got " + std::to_string(group_size));
  TW_EXPECT(offset >= 0 && offset <= 2 && (scale_bits == 16 || scale_bits == 32), op,
            "unknown offset or scale kind");
  PackedWeight w;
  w.n = n;
  w.k = k;
  w.bits = bits;
  w.group = group_size < 0 ? std::max<int64_t>(k, 1) : group_size;
  w.offset = static_cast<Offset>(offset);
  w.half_scales = scale_bits == 16;
  w.data = packed.as<const uint8_t>();
  expect_cpu(op, "the packed weight", packed);
  TW_EXPECT(packed.dtype == DType::u8 && packed.ndim == 2 && packed.dim(0) == w.n_blocks() &&
                packed.dim(1) == w.block_bytes() &&
                (packed.numel() == 0 || packed.dim(0) == 1 || packed.stride(0) == packed.dim(1)) &&
                (packed.numel() == 0 || packed.stride(1) == 1),
            op,
            "the packed weight must be contiguous uint8 of shape (" + std::to_string(w.n_blocks()) + ", " +
                std::to_string(w.block_bytes()) + "), got " + name_of(packed.dtype) + " " + shape_of(packed));
  return w;
}

int64_t packed_block_bytes(int64_t k, int bits, int64_t group_size, int offset, int scale_bits) {
  PackedWeight w;
  w.k = k;
  w.bits = bits;
  w.group = group_size < 0 ? std::max<int64_t>(k, 1) : group_size;
  w.offset = static_cast<Offset>(offset);
  w.half_scales = scale_bits == 16;
  return w.block_bytes();
}

void pack_codes(const TensorView& codes, const TensorView& scales, const TensorView& offsets,
                const TensorView& out, int64_t n, int64_t k, int bits, int64_t group_size, int offset,
                int scale_bits) {
  constexpr const char* op = "pack_codes";
  const PackedWeight w = packed_weight(op, out, n, k, bits, group_size, offset, scale_bits);
  const auto contiguous = [](const TensorView& t) {
    return t.ndim == 2 && (t.numel() == 0 || ((t.shape[1] == 1 || t.strides[1] == 1) &&
                                              (t.shape[0] == 1 || t.strides[0] == t.shape[1])));
  };
  TW_EXPECT(codes.dtype == DType::u8 && contiguous(codes) && codes.dim(0) == n && codes.dim(1) == k, op,
            "codes must be contiguous uint8 (n, k)");
  TW_EXPECT(scales.dtype == DType::f32 && contiguous(scales) && scales.dim(0) == n &&
                scales.dim(1) == (k == 0 ? scales.dim(1) : w.groups()),
            op, "scales must be contiguous float32 (n, groups)");
  if (w.offset != Offset::none)
    TW_EXPECT(offsets.dtype == (w.offset == Offset::min ? DType::f32 : DType::u8) && contiguous(offsets) &&
                  same_shape(offsets, scales),
              op, "offsets must have the scales' shape, float32 for minima and uint8 for zero points");
  if (w.n == 0 || w.k == 0) return;
  pack_blocks(w,
              ArraySource{codes.as<const uint8_t>(), scales.as<const float>(), offsets.data, w.offset, k,
                          w.groups(), w.blocks_per_group()},
              out.as<uint8_t>());
}

void pack_gguf(const TensorView& raw, const std::string& type, const TensorView& out, int64_t n, int64_t k) {
  constexpr const char* op = "from_gguf";
  GgufSource source{raw.as<const uint8_t>(), 0, GgufSource::q4_0};
  if (type == "Q4_1")
    source.kind = GgufSource::q4_1;
  else if (type == "Q8_0")
    source.kind = GgufSource::q8_0;
  else
    TW_EXPECT(type == "Q4_0", op, "unknown type " + type);
  const PackedWeight w = packed_weight(op, out, n, k, type == "Q8_0" ? 8 : 4, 32,
                                       static_cast<int>(type == "Q4_1" ? Offset::min : Offset::none), 16);
  source.row_bytes = k / 32 * source.block_bytes();
  TW_EXPECT(k % 32 == 0 && raw.dtype == DType::u8 && raw.ndim == 2 && raw.dim(0) == n &&
                raw.dim(1) == source.row_bytes &&
                (raw.numel() == 0 || (raw.stride(1) == 1 && (n == 1 || raw.stride(0) == raw.dim(1)))),
            op,
            type + " data for shape (" + std::to_string(n) + ", " + std::to_string(k) +
                ") must be contiguous uint8 of shape (" + std::to_string(n) + ", " +
                std::to_string(source.row_bytes) + "), got " + shape_of(raw));
  if (w.n == 0 || w.k == 0) return;
  pack_blocks(w, source, out.as<uint8_t>());
}

void weight_rows(const TensorView& index, const TensorView& packed, int64_t n, int64_t k, int bits,
                 int64_t group_size, int offset, int scale_bits, const TensorView& out) {
  constexpr const char* op = "QuantizedWeight.rows";
  const PackedWeight w = packed_weight(op, packed, n, k, bits, group_size, offset, scale_bits);
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
