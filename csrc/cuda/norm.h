// RMS norm and layer norm of rows, with the residual sum before them.
#pragma once
#include "types.h"

namespace tw::cuda {

// out = (t - mean) * rstd * weight + bias over rows of n, t = x + residual rounded to `type`, which is also
// written to total. mean = 0 unless centred. residual.base null: t = x, and total is unused.
struct NormArgs {
  Rows x, residual, out, total;
  const void* weight = nullptr;
  const void* bias = nullptr;
  uint32_t rows = 0;
  int64_t n = 0;
  float eps = 0;
  float per_column = 0;                            // 1 / n, set by norm(): a division in the kernel is a call
  Type type = Type::f32, weight_type = Type::f32;  // weight_type: float32 or `type`
  bool centred = false;
  bool whole_weights = false;  // weight and bias can be read in pieces of 16 bytes; set by norm()
};
cudaError_t norm(const NormArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
