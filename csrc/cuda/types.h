// What launchers take: pointers, sizes and strides (in elements). Read by g++ (bindings) and nvcc (kernels).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace tw::cuda {

enum class Type : int { f32, bf16, f16 };  // storage; arithmetic is fp32

inline int64_t bytes_of(Type t) { return t == Type::f32 ? 4 : 2; }

constexpr int kMaxRowDims = 5;

// Rows of a tensor whose last dimension is contiguous: row r, counted over the leading dimensions, begins
// offset(r) elements after base. dims == 0: one row.
struct Rows {
  void* base = nullptr;
  int dims = 0;
  uint32_t shape[kMaxRowDims] = {};
  int64_t strides[kMaxRowDims] = {};

  // Whether every row begins at a multiple of `bytes` bytes.
  bool aligned(int64_t bytes, int64_t item) const {
    if (reinterpret_cast<uintptr_t>(base) % bytes) return false;
    for (int d = 0; d < dims; ++d)
      if (strides[d] * item % bytes) return false;
    return true;
  }
#ifdef __CUDACC__
  __device__ int64_t offset(uint32_t row) const {
    int64_t at = 0;
#pragma unroll 1
    for (int d = dims - 1; d > 0; --d) {
      const uint32_t outer = row / shape[d];  // 32 bits: a division of 64 is a call
      at += strides[d] * (row - outer * shape[d]);
      row = outer;
    }
    return dims ? at + strides[0] * row : at;
  }
#endif
};

// (batch, heads, seq, head_dim), the last dimension contiguous.
struct Heads {
  void* base = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tw::cuda
