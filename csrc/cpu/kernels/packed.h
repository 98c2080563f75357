// Reading a PackedWeight inside kernels. Included after cpu/simd.h.
#pragma once
#include "cpu/kernels.h"
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

// One block of 32 rows. Its 32 outputs are computed in pairs of vectors: pair p covers rows [p*W, p*W + W)
// (low nibbles) and [16 + p*W, 16 + p*W + W) (high nibbles), so a 4-bit load feeds both.
constexpr int kPairs = 16 / W;
TW_INLINE int pair_row(int pair, int half) { return half * 16 + pair * W; }

struct Block {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* offsets;
  int64_t scale_bytes, offset_bytes;
  int blocks_per_group;

  TW_INLINE Block(const PackedWeight& w, int64_t block) {
    codes = w.data + block * w.block_bytes();
    scales = codes + w.code_bytes();
    scale_bytes = w.scale_bytes();
    offset_bytes = w.offset_bytes();
    offsets = scales + w.groups() * 32 * scale_bytes;
    blocks_per_group = int(w.blocks_per_group());
  }
  TW_INLINE F load_values(const uint8_t* p) const {
    return scale_bytes == 2 ? load(reinterpret_cast<const f16*>(p)) : load(reinterpret_cast<const float*>(p));
  }
  TW_INLINE F scale(int64_t group, int row) const {
    return load_values(scales + (group * 32 + row) * scale_bytes);
  }
  TW_INLINE F minimum(int64_t group, int row) const {
    return load_values(offsets + (group * 32 + row) * scale_bytes);
  }
  TW_INLINE I zero_point(int64_t group, int row) const { return load_u8(offsets + group * 32 + row); }
};

// 4-bit codes of `k_blocks` blocks as bytes, in the 8-bit layout.
TW_INLINE void unpack_nibbles(const uint8_t* codes, int64_t k_blocks, uint8_t* bytes) {
  for (int64_t step = 0; step < k_blocks * 8; ++step)
    for (int p = 0; p < kPairs; ++p) {
      const I raw = iload(codes + step * 64 + p * W * 4);
      istore(bytes + step * 128 + p * W * 4, low_nibbles(raw));
      istore(bytes + step * 128 + 64 + p * W * 4, high_nibbles(raw));
    }
}

// Stores W outputs of row m, the block's rows [first, first + W), with the bias; outputs past n are dropped.
TW_INLINE void store_outputs(const LinearArgs& a, int64_t block, int first, int64_t m, F y) {
  const int64_t at = block * 32 + first, left = a.w.n - at;
  if (left <= 0) return;
  const int count = left < W ? int(left) : W;
  if (a.bias) y = add(y, load(a.bias + at, count));
  with_storage(a.out_dtype, [&](auto t) {
    auto* out = row<decltype(t)>(a.out, m) + at;
    if (count == W)
      store(out, y);
    else
      store(out, y, count);
  });
}

}  // namespace
}  // namespace tilewright
