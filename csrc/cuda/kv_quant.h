// Appending to a quantised KV cache.
#pragma once
#include "types.h"

namespace tw::cuda {

// The layout of csrc/cpu/quantised_kv.h. counts, int64 (2,), lies on the device: how many tokens there are,
// and how many of them as codes. Tokens for which there is no room (length + seq > max_len) are not written,
// and not counted.
// Of keys and values together less than 2^31 tokens and heads.
struct QuantisedAppendArgs {
  Heads k, v;  // the new tokens
  Type type = Type::bf16;
  int seq = 0;
  uint8_t* codes[2] = {};  // of keys, values
  void* scales[2] = {};
  uint16_t* tails[2] = {};
  int64_t* counts = nullptr;
  int batch = 0, kv_heads = 0, max_len = 0, head_dim = 0, bits = 8, group = 32;
  int residual = 32;  // 4 bits: so many tokens at least stay bf16
};
cudaError_t append_quantised(const QuantisedAppendArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
