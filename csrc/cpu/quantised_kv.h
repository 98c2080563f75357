// A KV cache of codes, as the ops that fill it and the kernels that read it see it. Included by files
// compiled with ISA flags, so no STL here.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"

namespace tilewright {

constexpr int64_t kTileKeys = 64;

// Tokens [0, quantised) are codes, in tiles of kTileKeys = 64; with 4 bits the newest ones, [quantised,
// length), are bf16 rows (the tail). A slot is a batch element's KV head. Codes stand in blocks of 32 rows as
// in PackedWeight, so that no product needs a horizontal sum:
//   keys     [slots][tiles][2][k_steps()] steps: the rows are 32 tokens, a step holds 4 channels of each
//   values   [slots][tiles][v_blocks()][16] steps: the rows are 32 channels, a step holds 4 tokens of each
//   a step   8 bits: [32 rows][4] bytes, code + 128; 4 bits: [16][4] bytes, row r in the low nibble and row
//            r + 16 in the high one
// 8 bits: x = scale * code, one fp32 scale a token: k_scales and v_scales [slots][tiles][64].
// 4 bits: x = scale * code + minimum, both bf16. Keys: per channel and `group` tokens,
//   k_scales [slots][groups()][2][padded16(head_dim)]; values: per token and `group` channels,
//   v_scales [slots][tiles][channel_groups()][2][64].
struct QuantisedKv {
  uint8_t *k_codes = nullptr, *v_codes = nullptr;
  void *k_scales = nullptr, *v_scales = nullptr;
  uint16_t *k_tail = nullptr, *v_tail = nullptr;  // bf16 [slots][tail_rows][head_dim]
  int64_t batch = 0, kv_heads = 0, head_dim = 0, max_len = 0;
  int64_t length = 0, quantised = 0;
  int bits = 8;
  int64_t group = 32, tail_rows = 0;

  int64_t slots() const { return batch * kv_heads; }
  int64_t tiles() const { return (max_len + 63) / 64; }
  int64_t step_bytes() const { return bits * 16; }
  int64_t k_steps() const { return (head_dim + 3) / 4; }
  int64_t k_block_bytes() const { return k_steps() * step_bytes(); }
  int64_t v_blocks() const { return (head_dim + 31) / 32; }
  int64_t v_block_bytes() const { return 16 * step_bytes(); }
  int64_t groups() const { return (max_len + group - 1) / group; }
  int64_t channel_groups() const { return (head_dim + group - 1) / group; }

  // The 32 keys from `token` (a multiple of 32) on.
  uint8_t* k_block(int64_t slot, int64_t token) const {
    return k_codes + (slot * tiles() * 2 + token / 32) * k_block_bytes();
  }
  // 32 channels of the values of the tile that begins with `token`.
  uint8_t* v_block(int64_t slot, int64_t token, int64_t block) const {
    return v_codes + ((slot * tiles() + token / 64) * v_blocks() + block) * v_block_bytes();
  }
  float* token_scales(void* scales, int64_t slot, int64_t token) const {
    return static_cast<float*>(scales) + slot * tiles() * 64 + token;
  }
  uint16_t* k_group(int64_t slot,
                    int64_t token) const {  // scales; the minima follow padded16(head_dim) later
    return static_cast<uint16_t*>(k_scales) + (slot * groups() + token / group) * 2 * padded16(head_dim);
  }
  uint16_t* v_group(int64_t slot, int64_t token,
                    int64_t channel) const {  // scales; the minima follow 64 later
    return static_cast<uint16_t*>(v_scales) +
           ((slot * tiles() + token / 64) * channel_groups() + channel / group) * 128;
  }
  uint16_t* tail_row(uint16_t* tail, int64_t slot, int64_t token) const {
    return tail + (slot * tail_rows + token - quantised) * head_dim;
  }
};

// Scratch of a decode task: queries, scores, probabilities, out, max, sum and a row in fp32, and the
// fixed-point forms of queries and of a tile's weights.
inline int64_t quantised_decode_bytes(int64_t head_dim) {
  const int64_t pad = padded16(head_dim), row = pad > kTileKeys ? pad : kTileKeys;
  return (kDecodeRows * (2 * pad + 2 * kDecodeChunk + 2) + row) * 4 + kDecodeRows * 3 * (pad + kTileKeys);
}

}  // namespace tilewright
