// Sums and maxima over a warp or a block, in a fixed order: every lane gets the same bits.
#pragma once
#include <cstdint>

namespace tw::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // NaN where either is NaN
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return max(a, b); }
  __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const {
    return max(a, b);
  }
};

// LANES: a power of two; each group of so many lanes by itself.
template <int LANES = 32, class T, class Op>
__device__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// `memory`: a value of shared memory for each warp, which nobody has read since the last barrier.
template <int THREADS, class T, class Op>
__device__ T block_reduce(T x, T* memory, Op op) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024);
  constexpr int kWarps = THREADS / 32;
  x = warp_reduce(x, op);
  if constexpr (kWarps == 1) return x;
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  x = memory[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = op(x, memory[w]);
  return x;
}

}  // namespace tw::cuda
