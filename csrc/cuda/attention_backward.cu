// The gradient of attention: delta, then k and v, then q, then what is summed over rows. See
// attention_gradient.cuh.
#include "attention_gradient.cuh"

namespace tw::cuda {
namespace {

// delta of a row (batch, head, query) for each warp: the sum of grad_out * out, less grad_lse.
template <class T>
__global__ void __launch_bounds__(128)
    attention_delta_kernel(const __grid_constant__ GradientLaunch a, int64_t count) {
  const int64_t number = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (number >= count) return;
  const int query = int(number % a.seq_q), head = int(number / a.seq_q % a.heads);
  const int64_t b = number / a.seq_q / a.heads;
  const T* g = static_cast<const T*>(a.grad_out.base) + b * a.grad_out.batch + head * a.grad_out.head +
               query * a.grad_out.token;
  const T* out =
      static_cast<const T*>(a.out.base) + b * a.out.batch + head * a.out.head + query * a.out.token;
  float sum = 0;
  for (int i = threadIdx.x % 32; i < a.v_dim; i += 32) sum = fmaf(to_float(g[i]), to_float(out[i]), sum);
#pragma unroll
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(0xffffffff, sum, o);
  if (threadIdx.x % 32) return;
  if (a.grad_lse && a.lse[number] != -kInfinity) sum -= a.grad_lse[number];
  a.delta[number] = sum;
}

// Gradients of the slopes and sinks: a block for each head, or for each sequence and head, sums over rows in
// order.
__global__ void __launch_bounds__(128)
    attention_row_sums_kernel(const __grid_constant__ GradientLaunch a, bool of_slopes) {
  __shared__ float sums[128];
  const bool each = of_slopes && a.alibi_batch;
  const int head = blockIdx.x % int(a.heads), own = blockIdx.x / int(a.heads);
  float sum = 0;
  for (int b = each ? own : 0; b < (each ? own + 1 : int(a.batch)); ++b) {
    const Sequence s = sequence_of(a, b);
    for (int i = threadIdx.x; i < s.count; i += 128) {
      const int64_t at = lse_index(a, s, head, i);
      if (of_slopes)
        sum += a.slopes[at];
      else if (a.lse[at] != -kInfinity)
        sum -= expf(a.sinks[head] - a.lse[at]) * a.delta[at];
    }
  }
  sums[threadIdx.x] = sum;
#pragma unroll
  for (int half = 64; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) (of_slopes ? a.grad_alibi : a.grad_sinks)[blockIdx.x] = sums[0];
}

}  // namespace

cudaError_t attention_backward(const AttentionGradArgs& args, cudaStream_t stream) {
  const bool has_bias = args.grad_bias != nullptr;
  if (!is_valid(args) || args.block_table || args.k_batch || args.kv.k_codes ||
      (args.grad_alibi && !args.slopes) || (has_bias && !args.bias.data))
    return cudaErrorInvalidValue;
  if (args.batch == 0 || args.heads == 0 || args.seq_q == 0) return cudaSuccess;
  GradientLaunch a;
  static_cast<AttentionLaunch&>(a) = prepared(args, nullptr, 0);
  a.splits = 1;
  a.grad_out = args.grad_out, a.grad_q = args.grad_q, a.grad_k = args.grad_k, a.grad_v = args.grad_v;
  a.grad_lse = args.grad_lse, a.delta = args.delta, a.slopes = args.grad_alibi ? args.slopes : nullptr;
  a.grad_alibi = args.grad_alibi, a.grad_sinks = args.grad_sinks, a.grad_bias = args.grad_bias;
  std::copy(args.bias_sizes, args.bias_sizes + 4, a.bias_sizes);
  a.aligned = a.aligned && aligned16(a.grad_out);
  a.aligned_out = aligned16(a.grad_q) && aligned16(a.grad_k) && aligned16(a.grad_v);

  const int64_t rows = (a.q_start ? 1 : a.batch) * a.heads * a.seq_q;
  const auto delta = a.type == Type::bf16 ? attention_delta_kernel<bf16> : attention_delta_kernel<f16>;
  delta<<<unsigned(ceil_div(rows, 4)), 128, 0, stream>>>(a, rows);
  if (const cudaError_t e = cudaGetLastError()) return e;
  if (a.capacity > 0)
    if (const cudaError_t e = gradient_of_keys(a, stream)) return e;
  if (const cudaError_t e = gradient_of_queries(a, stream)) return e;
  if (a.grad_alibi)
    attention_row_sums_kernel<<<unsigned((a.alibi_batch ? a.batch : 1) * a.heads), 128, 0, stream>>>(a, true);
  if (a.grad_sinks) attention_row_sums_kernel<<<unsigned(a.heads), 128, 0, stream>>>(a, false);
  if (const cudaError_t e = cudaGetLastError()) return e;
  return has_bias ? gradient_of_bias(a, stream) : cudaSuccess;
}

}  // namespace tw::cuda
