// Reads two tensors and writes one, so memory decides: 16 bytes a thread.
#include "act_mul.h"
#include "convert.cuh"

namespace tw::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return x / (1.0f + expf(-x));
    case Activation::gelu:
      // By erfc: 1 + erf has no digits left in the lower tail.
      return 0.5f * x * erfcf(-0.70710678f * x);
    default:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) act_mul_kernel(const __grid_constant__ ActMulArgs a) {
  const uint32_t per_row = a.n / VEC;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= a.rows * per_row) return;
  const uint32_t row = a.rows == 1 ? 0 : index / per_row;
  const int64_t at = int64_t{index - row * per_row} * VEC;
  float x[VEC], y[VEC];
  load_floats<VEC>(static_cast<const T*>(a.gate.base) + a.gate.offset(row) + at, x);
  load_floats<VEC>(static_cast<const T*>(a.up.base) + a.up.offset(row) + at, y);
#pragma unroll
  for (int i = 0; i < VEC; ++i) y[i] *= activated(x[i], a.activation);
  store_floats<VEC>(static_cast<T*>(a.out.base) + a.out.offset(row) + at, y);
}

template <class T, int VEC>
cudaError_t launch(const ActMulArgs& a, cudaStream_t stream) {
  const int64_t vectors = a.rows * (a.n / VEC);
  if (vectors >= int64_t{1} << 31) return cudaErrorInvalidValue;
  act_mul_kernel<T, VEC><<<ceil_div(vectors, kThreads), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t act_mul(const ActMulArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.n == 0) return cudaSuccess;
  return with_type(a.type, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = 16 / sizeof(T);
    const bool whole = a.n % kVec == 0 && a.gate.aligned(16, sizeof(T)) && a.up.aligned(16, sizeof(T)) &&
                       a.out.aligned(16, sizeof(T));
    return whole ? launch<T, kVec>(a, stream) : launch<T, 1>(a, stream);
  });
}

}  // namespace tw::cuda
