// out = x @ w.T + bias with w quantised to 4 or 8 bits.
#pragma once
#include "types.h"

namespace tw::cuda {

enum class Offset : int {
  none,
  zero,
  min
};  // w = scale * (code - middle), (code - zero), scale * code + min

// The GPU's order of a weight (triton_kernels/weight.py). codes: a row of w is code_stride
// bytes, its columns padded to a multiple of 64; 8 bits: a byte a column; 4 bits: byte i of 32 bytes is
// column i of 64 in its low nibble and column i + 32 in the high one. scales, offsets: (groups, rows of w).
struct GpuWeight {
  const uint8_t* codes = nullptr;
  int64_t code_stride = 0;
  int bits = 4;
  const void* scales = nullptr;
  const void* offsets = nullptr;  // zero: uint8; min: as the scales
  Type scale_type = Type::f16;
  Offset offset = Offset::none;
  int middle = 8;
  int group = 32;  // columns that share a scale, 16 or a multiple of 32; 0: all of a row
  int groups = 0;
};

struct LinearArgs {
  const void* x = nullptr;  // (m, k) of `type`
  int64_t x_stride = 0;
  GpuWeight w;
  const float* bias = nullptr;
  void* out = nullptr;     // (m, n), contiguous
  Type type = Type::bf16;  // of x
  Type out_type = Type::bf16;
  int m = 0, n = 0, k = 0;
  // A mixture of experts: the weight holds `experts` matrices of n rows each, and so many rows of x in turn
  // are multiplied by each. Rows beyond the sum become NaN.
  const int64_t* group_sizes = nullptr;
  int experts = 1;
};
// type: bf16 or f16. The weight is rounded to it for tensor cores; up to 4 rows without experts it is not.
cudaError_t linear(const LinearArgs& args, cudaStream_t stream);

// Integer activations: x is quantised per row and 32 columns, or per row (per_token), and codes are
// multiplied exactly; see QuantiseArgs in csrc/cpu/kernels.h. type: any. The workspace needs no initial
// values.
struct IntegerLinearArgs {
  LinearArgs linear;
  bool per_token = false;
  void* workspace = nullptr;  // 16-byte aligned
};
int64_t integer_linear_workspace_bytes(int64_t m, int64_t k);
cudaError_t integer_linear(const IntegerLinearArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
