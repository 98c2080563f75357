// Reading a PackedWeight inside kernels. Included after cpu/simd.h.
#pragma once
#include "cpu/kernels.h"

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

template <class T>
TW_INLINE void store_outputs(T* out, int64_t n_left, int row,
                             F y) {  // n_left: outputs from the block's first
  const int64_t left = n_left - row;
  if (left >= W)
    store(out + row, y);
  else if (left > 0)
    store(out + row, y, int(left));
}

}  // namespace
}  // namespace tilewright
