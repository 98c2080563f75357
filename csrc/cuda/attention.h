// Attention on CUDA devices: what a call says, and its launchers. They neither allocate nor synchronise, so
// that a CUDA graph can capture them; workspaces come from the caller. Strides count elements, the last
// dimension of q, k, v and out is contiguous. All pointers are to device memory.
//
//   out = softmax(scores) v, scores = mask(softcap(scale * q k^T) - alibi + bias)
//
// Shapes, dtypes and options mean the same as in csrc/ops.h (AttentionInputs, AttentionOptions), where the
// caller has checked them. What lies in device memory (bounds of sequences, pages) is checked there: rows
// whose bounds or pages do not exist become NaN.
#pragma once
#include "types.h"

namespace tw::cuda {

struct AttentionScores {  // broadcast to (batch, heads, seq_q, seq_k) by zero strides; absent: no data
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, key = 0;
  Type type = Type::f32;
};
enum class CausalMask : uint8_t { none, top_left, bottom_right };

// A quantised KV cache, as csrc/cpu/quantised_kv.h lays it out. Every sequence reads its own slots, of
// head_dim channels; with 4 bits, groups of tokens and of channels are multiples of 32.
struct QuantisedKvArgs {
  const uint8_t *k_codes = nullptr, *v_codes = nullptr;  // null: the call has k and v
  const void *k_scales = nullptr, *v_scales = nullptr;
  const void *k_tail = nullptr, *v_tail = nullptr;
  const int64_t* counts = nullptr;  // int64 (2): tokens in all, and as codes; the others are rows of the tail
  int64_t tail_rows = 0, group = 32, score_keys = -1;  // score_keys: how many keys mask and bias have
  int bits = 8;
};

struct AttentionArgs {
  Heads q, k, v, out;      // pages: k and v are (pages, kv_heads, page_size, dim)
  QuantisedKvArgs kv;      // in place of k and v; capacity is its max_len
  float* lse = nullptr;    // contiguous (q's batch, heads, seq_q), or null
  Type type = Type::bf16;  // of q, k, v and out: bf16 or f16
  // batch: sequences. capacity: keys that a row of k and v, or of the block table, has room for; k_rows: how
  // many such rows there are.
  int64_t batch = 0, heads = 0, kv_heads = 0, seq_q = 0, head_dim = 0, v_dim = 0, capacity = 0, k_rows = 0;
  // int64 (batch), or null. q_start, q_end: rows of packed queries (q has a batch of 1), ascending; rows of
  // no sequence are left as they are. k_start, k_end: valid keys. k_batch: which row of k and v a sequence
  // reads; null: its own, or with packed_keys the only one.
  const int64_t *q_start = nullptr, *q_end = nullptr, *k_start = nullptr, *k_end = nullptr,
                *k_batch = nullptr;
  bool packed_keys = false;
  // int32 (k_rows, ...): key j is row j % page_size of page block_table[row * table_stride + j / page_size].
  const int32_t* block_table = nullptr;
  int64_t table_stride = 0, page_size = 0, pages = 0;
  AttentionScores mask, bias;    // mask: bytes, nonzero = attend. Neither with packed queries or pages
  const float* alibi = nullptr;  // slopes (batch, heads), or (heads) with alibi_batch = 0
  int64_t alibi_batch = 0;
  const float* sinks = nullptr;  // (heads): one more logit in the denominator
  float scale = 1, softcap = 0;  // softcap 0: none
  CausalMask causal = CausalMask::none;
  int64_t window_left = -1, window_right = -1;
  float keep = 1;                 // probability that dropout leaves an attention weight; 1: no dropout
  const int64_t* seed = nullptr;  // one number
};

// Bytes of workspace that `attention_forward` wants on a device with so many multiprocessors.
int64_t attention_forward_workspace_bytes(const AttentionArgs& args, int multiprocessors);
// cudaErrorInvalidValue: a head_dim above 256, or sizes of 2^31 and more.
cudaError_t attention_forward(const AttentionArgs& args, void* workspace, int multiprocessors,
                              cudaStream_t stream);

// The gradient of `attention_forward`, with its out and lse. No atomics: every sum has one order.
struct AttentionGradArgs : AttentionArgs {
  Heads grad_out, grad_q, grad_k,
      grad_v;                       // as out, q, k and v; rows and keys of no sequence are left as they are
  const float* grad_lse = nullptr;  // as lse, or null
  float* delta = nullptr;           // as lse, overwritten: the sum of grad_out * out, less grad_lse
  // What is not asked for is null. slopes: as lse, overwritten, wanted with grad_alibi. grad_bias:
  // contiguous, of the bias's own sizes, which are 1 or the call's.
  float *slopes = nullptr, *grad_alibi = nullptr, *grad_sinks = nullptr, *grad_bias = nullptr;
  int64_t bias_sizes[4] = {};
};
// cudaErrorInvalidValue also for pages, rows of k and v by index (k_batch) and quantised caches.
cudaError_t attention_backward(const AttentionGradArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
