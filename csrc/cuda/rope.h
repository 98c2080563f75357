// Tokens on their way from a projection to attention: rotated, or written into a cache, or both.
#pragma once
#include "types.h"

namespace tw::cuda {

// Where token t of batch element b goes: position p = positions[b, t], or seqlens[b] + t, or t; with a table
// to slot p % slots of page table[b, p / slots], else to slot p of b's own row. A token whose slot or page
// does not exist is not written; of tokens with one slot the last one is.
struct SlotArgs {
  const int64_t* positions = nullptr;
  int64_t positions_batch = 0, positions_token = 0;  // strides
  const void* seqlens = nullptr;                     // int64 or int32
  int64_t seqlens_stride = 0;
  bool seqlens_64 = false;
  const int32_t* table = nullptr;
  int64_t table_batch = 0, table_block = 0;  // strides
  int64_t table_blocks = 0;
  int64_t pages = 0, slots = 0;  // sizes of the caches' first and third dimensions
};

// q, k or v. The cache of a part that goes to one has strides like a tensor's: batch = from page to page.
struct TokenPart {
  Heads in, out;
  int heads = 0, dim = 0;
  bool rotate = false, to_cache = false;
  Type out_type = Type::f32;  // differs from `type` for caches only
};

struct TokenArgs {
  TokenPart parts[3];
  int count = 0;  // of parts, those that go to a cache last
  SlotArgs slot;
  // fp32 (max_positions, half): angles of the pairs (i, i + half), or (2i, 2i + 1). A position outside the
  // tables makes NaN.
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0, max_positions = 0;
  int half = 0;
  bool interleaved = false;
  int64_t batch = 0, seq = 0;
  Type type = Type::f32;
};
// Rope, append, or both. batch * seq < 2^31.
cudaError_t move_tokens(const TokenArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
