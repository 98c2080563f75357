// From a call to a launch: what the kernels of attention are given, and how keys are split.
#pragma once
#include <algorithm>

#include "attention.h"

namespace tw::cuda {

// What a launcher adds to a call.
struct AttentionLaunch : AttentionArgs {
  int group = 1;  // heads of a KV head
  int tiles = 0;  // tiles of rows: of a sequence's KV head, or of all packed queries of a KV head
  int left = -1, right = -1;
  bool aligned = false;      // q, k, v (and a gradient's operands) can be read in pieces of 16 bytes
  bool aligned_out = false;  // what is written, too
  int score_run = 1;  // 1, 2, 4 or 8: in pieces of so many keys, from the first on, mask and bias are aligned
  // Keys split between blocks: split i takes the keys [i * chunk, (i + 1) * chunk) and leaves fp32 rows of
  // v_dim in partials and (maximum, sum) in stats, both [batch][kv_heads][splits][rows of a KV head].
  int splits = 1, chunk = 1;
  float* partials = nullptr;
  float2* stats = nullptr;
};

constexpr int kFewRows =
    16;  // up to so many rows of a KV head one tensor core tile does: attention_decode.cu

inline bool aligned16(const Heads& t) {
  return reinterpret_cast<uintptr_t>(t.base) % 16 == 0 && t.batch % 8 == 0 && t.head % 8 == 0 &&
         t.token % 8 == 0;
}

// Whether scores have more to them than scale, causality and window.
inline bool is_general(const AttentionArgs& a) {
  return a.softcap > 0 || a.alibi || a.bias.data || a.mask.data || a.keep < 1.0f || !(a.scale > 0);
}

// Into how many parts the keys are cut, so that twice the multiprocessors have a block each and none has
// fewer than 256 keys. It depends on shapes and on the device alone: so do the result's bits.
inline int64_t key_splits(const AttentionArgs& a, int multiprocessors) {
  if (a.q_start || a.kv_heads == 0 || a.batch == 0) return 1;
  const int64_t rows = a.seq_q * (a.heads / a.kv_heads);
  const int64_t blocks = std::max<int64_t>(1, a.batch * a.kv_heads * ceil_div(rows, 64));
  const int64_t wanted = ceil_div(2 * std::max(multiprocessors, 1), blocks);
  return std::max<int64_t>(1, std::min(wanted, a.capacity / 256));
}

// The longest run of keys, of 1, 2, 4 or 8 (fp32: 4, 16 bytes), that starts at a multiple of its size in
// every row.
inline int aligned_run(const AttentionScores& t, int64_t bytes) {
  if (!t.data || t.key == 0) return 8;
  if (t.key != 1) return 1;
  int run = bytes == 4 ? 4 : 8;
  while (reinterpret_cast<uintptr_t>(t.data) % (run * bytes) || t.batch % run || t.head % run || t.row % run)
    run /= 2;
  return run;
}

inline AttentionLaunch prepared(const AttentionArgs& args, void* workspace, int multiprocessors) {
  AttentionLaunch a;
  static_cast<AttentionArgs&>(a) = args;
  a.group = a.kv_heads ? int(a.heads / a.kv_heads) : 1;
  const int64_t reach =
      std::min<int64_t>(a.seq_q + a.capacity, INT32_MAX / 2);  // a window beyond it has no edge
  a.left = int(std::min(a.window_left, reach)), a.right = int(std::min(a.window_right, reach));
  a.aligned = aligned16(a.q) && aligned16(a.k) && aligned16(a.v);
  a.aligned_out = aligned16(a.out);
  a.score_run = std::min(aligned_run(a.mask, 1), aligned_run(a.bias, a.bias.type == Type::f32 ? 4 : 2));
  a.splits = int(key_splits(a, multiprocessors));
  a.chunk = int(ceil_div(std::max<int64_t>(a.capacity, 1), int64_t(a.splits) * 64) * 64);
  a.stats = static_cast<float2*>(workspace);
  a.partials = static_cast<float*>(workspace) + a.batch * a.heads * a.seq_q * a.splits * 2;
  return a;
}

inline bool is_valid(const AttentionArgs& a) {
  constexpr int64_t kMost = INT32_MAX;
  return (a.type == Type::bf16 || a.type == Type::f16) && a.head_dim <= 256 && a.v_dim <= 256 &&
         (a.kv_heads ? a.heads % a.kv_heads == 0 : a.heads == 0) &&
         a.seq_q * std::max<int64_t>(a.heads, 1) <= kMost / 2 && a.capacity <= kMost / 2 &&
         a.batch * std::max<int64_t>(a.heads, 1) <= kMost && a.k_rows <= kMost &&
         (a.keep >= 1.0f || a.seed) && (!a.q_start || (a.q_end && !a.mask.data && !a.bias.data)) &&
         (!a.block_table || (a.page_size > 0 && !a.mask.data && !a.bias.data));
}

cudaError_t attention_prefill(const AttentionLaunch& args, cudaStream_t stream);
// For few rows of a KV head (any number with codes), without packed queries; k and v that are no codes are
// aligned, and their sizes multiples of 8.
cudaError_t attention_decode(const AttentionLaunch& args, cudaStream_t stream);
// Rows from what the splits left.
cudaError_t attention_merge(const AttentionLaunch& args, cudaStream_t stream);

}  // namespace tw::cuda
