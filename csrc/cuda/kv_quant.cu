// 8 bits: a warp takes a token of a head. 4 bits, after KIVI (https://arxiv.org/abs/2402.02750): one kernel
// turns whole groups of tokens into codes, keys per channel and values per token, another moves what stays
// bf16. How many groups there are stands in device memory, so blocks are launched for as many as can be, and
// those beyond end at once; the last kernel counts. The bits are the CPU's.
#include "convert.cuh"
#include "kv_quant.h"
#include "reduce.cuh"

namespace tw::cuda {
namespace {

constexpr int kThreads = 256;

struct Counts {
  int length, quantised, whole;  // whole: how many will be codes
  bool room;
};
__device__ Counts counts_of(const QuantisedAppendArgs& a) {
  Counts c{static_cast<int>(a.counts[0]), static_cast<int>(a.counts[1]), 0, false};
  c.room = c.length <= a.max_len - a.seq;
  const int old = max(c.length + a.seq - a.residual, 0);
  c.whole = a.bits == 8 ? c.length + a.seq : max(c.quantised, old / a.group * a.group);
  return c;
}

// Bytes before 32 keys from `token` on, or before 32 channels of the values of its 64 tokens.
__device__ int64_t key_block(const QuantisedAppendArgs& a, int slot, int token) {
  const int tiles = (a.max_len + 63) / 64, bytes = (a.head_dim + 3) / 4 * a.bits * 16;
  return (int64_t{slot} * tiles * 2 + token / 32) * bytes;
}
__device__ int64_t value_block(const QuantisedAppendArgs& a, int slot, int token, int block) {
  const int tiles = (a.max_len + 63) / 64, blocks = (a.head_dim + 31) / 32;
  return ((int64_t{slot} * tiles + token / 64) * blocks + block) * 16 * a.bits * 16;
}

template <class T>
__device__ const T* new_row(const QuantisedAppendArgs& a, bool values, int slot, int t) {
  const Heads& x = values ? a.v : a.k;
  return static_cast<const T*>(x.base) + slot / a.kv_heads * x.batch + slot % a.kv_heads * x.head +
         t * x.token;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    append_codes_kernel(const __grid_constant__ QuantisedAppendArgs a) {
  const Counts counts = counts_of(a);
  if (!counts.room) return;
  const int lane = threadIdx.x % 32, d = a.head_dim;
  const int index = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, rows = a.batch * a.kv_heads * a.seq;
  if (index >= 2 * rows) return;
  const bool values = index >= rows;
  const int slot = index % rows / a.seq, t = index % a.seq, token = counts.length + t;
  const T* x = new_row<T>(a, values, slot, t);
  float top = 0.0f;
#pragma unroll 1
  for (int c = lane; c < d; c += 32) {
    const float size = fabsf(to_float(x[c]));
    top = fmaxf(top, size < INFINITY ? size : INFINITY);
  }
  top = warp_reduce(top, Max{});
  const bool good = top < INFINITY;
  const float scale = __fdiv_rn(top, 127.0f);
#pragma unroll 1
  for (int c = lane; c < (d + 3) / 4 * 4; c += 32) {
    const float ratio = good && scale > 0.0f && c < d ? __fdiv_rn(to_float(x[c]), scale) : 0.0f;
    const auto code =
        static_cast<uint8_t>(static_cast<int>(fminf(fmaxf(rintf(ratio), -127.0f), 127.0f)) + 128);
    if (values)
      a.codes[1][value_block(a, slot, token, c / 32) + token % 64 / 4 * 128 + c % 32 * 4 + token % 4] = code;
    else
      a.codes[0][key_block(a, slot, token) + c / 4 * 128 + token % 32 * 4 + c % 4] = code;
  }
  if (lane == 0)
    static_cast<float*>(a.scales[values])[int64_t{slot} * ((a.max_len + 63) / 64) * 64 + token] =
        good ? scale : __int_as_float(0x7fc00000);
}

// A token's channel as bf16: from the tail, or a new one.
template <class T>
__device__ float channel_of(const QuantisedAppendArgs& a, const Counts& counts, bool values, int slot,
                            int token, int channel) {
  if (token >= counts.length)
    return rounded<bf16>(to_float(new_row<T>(a, values, slot, token - counts.length)[channel]));
  const int64_t tail_rows = a.residual + a.group - 1;
  const auto* tail = reinterpret_cast<const bf16*>(a.tails[values]);
  return to_float(tail[(slot * tail_rows + token - counts.quantised) * a.head_dim + channel]);
}

// The scale and minimum of 16 levels from `low` to `high`.
struct Range {
  float low, step;
  bf16 scale, minimum;
  __device__ Range(float low_, float high, bool bad) : low(low_) {
    const float span = high - low;
    scale = bad || span == INFINITY ? __ushort_as_bfloat16(0x7fc0) : from_float<bf16>(__fdiv_rn(span, 15.0f));
    step = to_float(scale);
    minimum = from_float<bf16>(step == step ? low : 0.0f);
  }
  __device__ unsigned code(float x) const {
    return step > 0.0f ? static_cast<unsigned>(rintf(fminf(__fdiv_rn(x - low, step), 15.0f))) : 0u;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    append_groups_kernel(const __grid_constant__ QuantisedAppendArgs a) {
  const Counts counts = counts_of(a);
  const int first = counts.quantised + blockIdx.y * a.group;
  if (!counts.room || first >= counts.whole) return;
  const int slot = blockIdx.x / 2;
  const bool values = blockIdx.x % 2;
  const int d = a.head_dim, lane = threadIdx.x % 32;
  if (!values) {  // a thread takes a channel
    const int padded = (d + 15) / 16 * 16;
    const int groups = (a.max_len + a.group - 1) / a.group;
    auto* scales = static_cast<bf16*>(a.scales[0]) + (int64_t{slot} * groups + first / a.group) * 2 * padded;
#pragma unroll 1
    for (int c = threadIdx.x; c < d; c += kThreads) {
      float low = INFINITY, high = -INFINITY;
      bool bad = false;
#pragma unroll 1
      for (int i = 0; i < a.group; ++i) {
        const float x = channel_of<T>(a, counts, false, slot, first + i, c);
        low = fminf(low, x), high = fmaxf(high, x);
        bad |= !(fabsf(x) < INFINITY);
      }
      const Range range(low, high, bad);
#pragma unroll 1
      for (int i = 0; i < a.group; ++i) {
        if (i % 32 >= 16) continue;  // tokens i and i + 16 share a byte
        const unsigned code = range.code(channel_of<T>(a, counts, false, slot, first + i, c));
        const unsigned other = range.code(channel_of<T>(a, counts, false, slot, first + i + 16, c));
        a.codes[0][key_block(a, slot, first + i) + c / 4 * 64 + i % 16 * 4 + c % 4] =
            static_cast<uint8_t>(code | other << 4);
      }
      scales[c] = range.scale, scales[padded + c] = range.minimum;
    }
    return;
  }
  const int channel_groups = (d + a.group - 1) / a.group;  // a warp takes one, of a token
  for (int i = threadIdx.x / 32; i < a.group * channel_groups; i += kThreads / 32) {
    const int token = first + i / channel_groups;
    const int begin = i % channel_groups * a.group, end = min(begin + a.group, d);
    float low = INFINITY, high = -INFINITY;
    bool bad = false;
#pragma unroll 1
    for (int c = begin + lane; c < end; c += 32) {
      const float x = channel_of<T>(a, counts, true, slot, token, c);
      low = fminf(low, x), high = fmaxf(high, x);
      bad |= !(fabsf(x) < INFINITY);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, step));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
    }
    const Range range(low, high, __any_sync(kAllLanes, bad));
#pragma unroll 1
    for (int block = begin; block < end; block += 32) {  // channels c and c + 16 of 32 share a byte
      const int c = block + lane;
      const unsigned code = c < end ? range.code(channel_of<T>(a, counts, true, slot, token, c)) : 0u;
      const unsigned other = __shfl_down_sync(kAllLanes, code, 16);
      if (lane < 16 && c < d)
        a.codes[1][value_block(a, slot, token, c / 32) + token % 64 / 4 * 64 + lane * 4 + token % 4] =
            static_cast<uint8_t>(code | other << 4);
    }
    if (lane == 0) {
      const int tiles = (a.max_len + 63) / 64;
      auto* scales = static_cast<bf16*>(a.scales[1]) +
                     ((int64_t{slot} * tiles + token / 64) * channel_groups + begin / a.group) * 128 +
                     token % 64;
      scales[0] = range.scale, scales[64] = range.minimum;
    }
  }
}

// The tokens that stay bf16 move to the front of the tail, and new ones follow. A block takes a slot's keys
// or values.
template <class T>
__global__ void __launch_bounds__(kThreads)
    append_tail_kernel(const __grid_constant__ QuantisedAppendArgs a) {
  const Counts counts = counts_of(a);
  if (!counts.room) return;
  const int slot = blockIdx.x / 2, length = counts.length + a.seq, moved = counts.whole - counts.quantised;
  const bool values = blockIdx.x % 2;
  auto* tail =
      reinterpret_cast<bf16*>(a.tails[values]) + int64_t{slot} * (a.residual + a.group - 1) * a.head_dim;
  // `moved` rows at a time: they land before those that are read.
#pragma unroll 1
  for (int token = counts.whole; moved > 0 && token < counts.length; token += moved) {
    const int rows = min(moved, counts.length - token);
    bf16* const to = tail + int64_t{token - counts.whole} * a.head_dim;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * a.head_dim; i += kThreads)
      to[i] = to[i + int64_t{moved} * a.head_dim];
    __syncthreads();
  }
  const int first = max(counts.length, counts.whole);
#pragma unroll 1
  for (int i = threadIdx.x; i < (length - first) * a.head_dim; i += kThreads) {
    const int token = first + i / a.head_dim, channel = i % a.head_dim;
    tail[int64_t{token - counts.whole} * a.head_dim + channel] =
        from_float<bf16>(to_float(new_row<T>(a, values, slot, token - counts.length)[channel]));
  }
}

__global__ void count_kernel(const __grid_constant__ QuantisedAppendArgs a) {
  const Counts counts = counts_of(a);
  if (counts.room) a.counts[0] = counts.length + a.seq, a.counts[1] = counts.whole;
}

template <class T>
cudaError_t launch(const QuantisedAppendArgs& a, cudaStream_t stream) {
  const int64_t slots = int64_t{a.batch} * a.kv_heads;
  if (a.bits == 8) {
    const int64_t blocks = ceil_div(2 * slots * a.seq, kThreads / 32);
    append_codes_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
  } else {
    const int64_t groups = (a.residual + a.group - 1 + a.seq) / a.group;
    if (groups > 65535) return cudaErrorInvalidValue;
    if (groups > 0)
      append_groups_kernel<T>
          <<<dim3(static_cast<unsigned>(2 * slots), static_cast<unsigned>(groups)), kThreads, 0, stream>>>(a);
    append_tail_kernel<T><<<static_cast<unsigned>(2 * slots), kThreads, 0, stream>>>(a);
  }
  const cudaError_t e = cudaGetLastError();
  if (e != cudaSuccess) return e;
  count_kernel<<<1, 1, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t append_quantised(const QuantisedAppendArgs& a, cudaStream_t stream) {
  if (a.seq == 0) return cudaSuccess;
  if (a.batch * a.kv_heads == 0) {
    count_kernel<<<1, 1, 0, stream>>>(a);
    return cudaGetLastError();
  }
  return with_type(a.type, [&](auto type) { return launch<decltype(type)>(a, stream); });
}

}  // namespace tw::cuda
