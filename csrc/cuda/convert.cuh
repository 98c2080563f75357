// Numbers in storage and in registers: fp32, bf16, fp16, alone and in vectors of 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "types.h"

namespace tw::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// Two floats as the register of two bf16 or fp16 that a matrix instruction takes; `low` in the low half.
template <class T>
__device__ uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<bf16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
template <>
__device__ inline uint32_t pack_pair<f16>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <int N, class T>
__device__ void load_floats(const T* p, float (&out)[N]) {
  const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(v.v[i]);
}
template <int N, class T>
__device__ void store_floats(T* p, const float (&x)[N]) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.v[i] = from_float<T>(x[i]);
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}

// What x becomes in memory of type T.
template <class T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Calls f with a value of the C++ type that `type` names.
template <class F>
cudaError_t with_type(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(float{});
    case Type::bf16:
      return f(bf16{});
    case Type::f16:
      return f(f16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace tw::cuda
