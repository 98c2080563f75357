// What the dispatch table and the kernels share: plain argument structs and one declaration per op and ISA
// level. Included by files compiled with ISA flags, so no STL here.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace tilewright {

enum class Storage : uint8_t { f32, bf16, f16 };  // what kernels read and write; arithmetic is fp32

constexpr int kMaxRowDims = 5;

// Rows of a tensor whose last dimension is contiguous: row r, counted over the leading dimensions, starts at
// base + offset(r) elements.
struct Rows {
  void* base = nullptr;
  int dims = 0;
  int64_t shape[kMaxRowDims] = {};
  int64_t strides[kMaxRowDims] = {};
};

// y = (x - mean) * rstd * weight + bias over the last dimension, with x + residual in place of x where given.
struct NormArgs {
  Rows x, residual, out, sum;  // residual.base == nullptr: none, and sum is unused
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t n = 0;  // length of the last dimension
  float eps = 0;
  Storage dtype = Storage::f32, weight_dtype = Storage::f32;
  bool centred = false;  // layer norm; otherwise mean = 0
};
using NormKernel = void (*)(const NormArgs&, int64_t row_begin, int64_t row_end);

#define TW_DECLARE(op, ...)      \
  void op##_scalar __VA_ARGS__;  \
  void op##_avx2 __VA_ARGS__;    \
  void op##_avxvnni __VA_ARGS__; \
  void op##_avx512 __VA_ARGS__;  \
  void op##_avx512bf16 __VA_ARGS__;

TW_DECLARE(norm, (const NormArgs&, int64_t, int64_t))

}  // namespace tilewright
