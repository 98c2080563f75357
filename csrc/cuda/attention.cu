// Which kernel runs an attention call, and the merge of keys that were split.
#include "attention_rows.cuh"
#include "attention_wgmma.h"

namespace tw::cuda {
namespace {

// One row of out from its splits, in ascending order, for each warp.
template <class T>
__global__ void __launch_bounds__(128) attention_merge_kernel(const __grid_constant__ AttentionLaunch a) {
  const int lane = threadIdx.x % 32, rows = int(a.seq_q) * a.group;
  const int64_t number = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (number >= a.batch * a.kv_heads * rows) return;
  const int row = int(number % rows), slot = int(number / rows);
  const int b = slot / int(a.kv_heads), kv_head = slot % int(a.kv_heads);
  const Sequence s = sequence_of(a, b);
  const Folded f = folded(a, kv_head, row);
  // A split that some row sees was written for all rows of its tile, and of those that this row sees all.
  const Range range = visible_keys(a, s, f.query);
  int first = range.first / a.chunk, end = (range.end + a.chunk - 1) / a.chunk;
  if (!s.known) first = end = 0;
  const int64_t at = int64_t(slot) * a.splits * rows + row;
  float top = a.sinks ? a.sinks[f.head] : -kInfinity, sum = top == -kInfinity ? 0.0f : 1.0f;
  const float sink = top;
  for (int i = first; i < end; ++i) top = max_nan(top, a.stats[at + int64_t(i) * rows].x);
  const float safe = top == -kInfinity ? 0.0f : top;
  sum *= exp2_fast((sink - safe) * kLog2e);
  if (sink == -kInfinity) sum = 0.0f;
  float total[8] = {};  // columns lane, lane + 32, ...
  for (int i = first; i < end; ++i) {
    const int64_t one = at + int64_t(i) * rows;
    const float2 stat = a.stats[one];
    const float shrink = exp2_fast((stat.x - safe) * kLog2e);
    sum += shrink * stat.y;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (lane + 32 * c < a.v_dim) total[c] += shrink * a.partials[one * a.v_dim + lane + 32 * c];
  }
  if (!s.known) sum = __int_as_float(0x7fffffff);
  const float factor = end_factor(a, sum);
  T* out = static_cast<T*>(a.out.base) + b * a.out.batch + f.head * a.out.head + f.query * a.out.token;
#pragma unroll
  for (int c = 0; c < 8; ++c)
    if (lane + 32 * c < a.v_dim) out[lane + 32 * c] = from_float<T>(total[c] * factor);
  if (a.lse && lane == 0) a.lse[lse_index(a, s, f.head, f.query)] = log_sum(top, sum);
}

}  // namespace

cudaError_t attention_merge(const AttentionLaunch& a, cudaStream_t stream) {
  const int64_t blocks = ceil_div(a.batch * a.heads * a.seq_q, 4);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = a.type == Type::bf16 ? attention_merge_kernel<bf16> : attention_merge_kernel<f16>;
  kernel<<<unsigned(blocks), 128, 0, stream>>>(a);
  return cudaGetLastError();
}

int64_t attention_forward_workspace_bytes(const AttentionArgs& args, int multiprocessors) {
  const int64_t splits = key_splits(args, multiprocessors);
  return splits == 1 ? 0 : args.batch * args.heads * args.seq_q * splits * (args.v_dim + 2) * 4;
}

cudaError_t attention_forward(const AttentionArgs& args, void* workspace, int multiprocessors,
                              cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.batch == 0 || args.heads == 0 || args.seq_q == 0 || (args.v_dim == 0 && !args.lse))
    return cudaSuccess;
  const AttentionLaunch a = prepared(args, workspace, multiprocessors);
  const bool few =
      a.seq_q * a.group <= kFewRows && !a.q_start && a.aligned && a.head_dim % 8 == 0 && a.v_dim % 8 == 0;
  if (few || a.kv.k_codes) return attention_decode(a, stream);
  if (const cudaError_t e = attention_wgmma(a, stream); e != cudaErrorNotSupported) return e;
  return attention_prefill(a, stream);
}

}  // namespace tw::cuda
