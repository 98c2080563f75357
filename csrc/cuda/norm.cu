// Each element is read once and written once or twice, so memory decides; statistics are fp32, the variance
// is taken around the mean in a second pass over registers. Short rows take a warp each, longer ones a block;
// rows beyond what a block's registers hold are read again from the L2 cache.
#include "convert.cuh"
#include "norm.h"
#include "reduce.cuh"

namespace tw::cuda {
namespace {

constexpr int kChunks = 4;     // vectors of a row that a thread keeps
constexpr int kThreads = 256;  // of a block

template <class T, int VEC>
__device__ void load_weight(const NormArgs& a, const void* weight, int64_t at, float (&w)[VEC]) {
  const bool is_float = sizeof(T) == 4 || a.weight_type == Type::f32;
  if (VEC > 1 && a.whole_weights) {
    if (!is_float) return load_floats<VEC>(static_cast<const T*>(weight) + at, w);
#pragma unroll
    for (int i = 0; i < VEC; i += 4)
      load_floats<4>(static_cast<const float*>(weight) + at + i, reinterpret_cast<float (&)[4]>(w[i]));
    return;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i)
    w[i] = is_float ? static_cast<const float*>(weight)[at + i]
                    : to_float(static_cast<const T*>(weight)[at + i]);
}

// THREADS = 32: a warp a row, else a block a row. CACHED: n <= THREADS * VEC * kChunks.
template <class T, int VEC, int THREADS, bool CACHED>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs a) {
  __shared__ float memory[2][kThreads / 32];
  const uint32_t row = THREADS == 32 ? blockIdx.x * (kThreads / 32) + threadIdx.x / 32 : blockIdx.x;
  if (THREADS == 32 && row >= a.rows) return;
  const int lane = threadIdx.x % THREADS;
  const T* x = static_cast<const T*>(a.x.base) + a.x.offset(row);
  const T* residual =
      a.residual.base ? static_cast<const T*>(a.residual.base) + a.residual.offset(row) : nullptr;
  T* out = static_cast<T*>(a.out.base) + a.out.offset(row);
  T* total = residual ? static_cast<T*>(a.total.base) + a.total.offset(row) : nullptr;
  const int64_t n = a.n;
  constexpr int64_t kStep = int64_t{THREADS} * VEC;

  const auto summed = [&](int64_t at, float (&t)[VEC]) {
    load_floats<VEC>(x + at, t);
    if (!residual) return;
    float more[VEC];
    load_floats<VEC>(residual + at, more);
#pragma unroll
    for (int i = 0; i < VEC; ++i) t[i] = rounded<T>(t[i] + more[i]);
  };
  const auto reduced = [&](float sum, int pass) { return block_reduce<THREADS>(sum, memory[pass], Sum{}); };

  float kept[CACHED ? kChunks : 1][VEC];
  float sum = 0.0f;
  // Calls f(at, t) for this thread's vectors of the row.
  const auto each = [&](auto&& f) {
    if constexpr (CACHED) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int64_t at = c * kStep + lane * VEC;
        if (at < n) f(at, kept[c]);
      }
    } else {
#pragma unroll 1
      for (int64_t at = lane * VEC; at < n; at += kStep) {
        summed(at, kept[0]);
        f(at, kept[0]);
      }
    }
  };
  if constexpr (CACHED) each([&](int64_t at, float (&t)[VEC]) { summed(at, t); });
  each([&](int64_t at, float (&t)[VEC]) {
    if (total) store_floats<VEC>(total + at, t);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += a.centred ? t[i] : t[i] * t[i];
  });
  float mean = 0.0f;
  sum = reduced(sum, 0);
  if (a.centred) {
    mean = sum * a.per_column;
    sum = 0.0f;
    each([&](int64_t, float (&t)[VEC]) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum += (t[i] - mean) * (t[i] - mean);
    });
    sum = reduced(sum, 1);
  }
  const float rstd = rsqrtf(sum * a.per_column + a.eps);
  each([&](int64_t at, float (&t)[VEC]) {
    float w[VEC], y[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) y[i] = (t[i] - mean) * rstd;
    if (a.weight) {
      load_weight<T, VEC>(a, a.weight, at, w);
#pragma unroll
      for (int i = 0; i < VEC; ++i) y[i] *= w[i];
    }
    if (a.bias) {
      load_weight<T, VEC>(a, a.bias, at, w);
#pragma unroll
      for (int i = 0; i < VEC; ++i) y[i] += w[i];
    }
    store_floats<VEC>(out + at, y);
  });
}

template <class T, int VEC>
cudaError_t launch(const NormArgs& a, cudaStream_t stream) {
  if (a.n <= 32 * VEC * kChunks)
    norm_kernel<T, VEC, 32, true><<<ceil_div(a.rows, kThreads / 32), kThreads, 0, stream>>>(a);
  else if (a.n <= kThreads * VEC * kChunks)
    norm_kernel<T, VEC, kThreads, true><<<a.rows, kThreads, 0, stream>>>(a);
  else
    norm_kernel<T, VEC, kThreads, false><<<a.rows, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t norm(const NormArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  NormArgs a = args;
  a.per_column = 1.0f / float(a.n);
  a.whole_weights = (reinterpret_cast<uintptr_t>(a.weight) | reinterpret_cast<uintptr_t>(a.bias)) % 16 == 0;
  return with_type(a.type, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = 16 / sizeof(T);
    bool whole = a.n % kVec == 0;
    for (const Rows* r : {&a.x, &a.residual, &a.out, &a.total})
      whole &= r->base == nullptr || r->aligned(16, sizeof(T));
    return whole ? launch<T, kVec>(a, stream) : launch<T, 1>(a, stream);
  });
}

}  // namespace tw::cuda
