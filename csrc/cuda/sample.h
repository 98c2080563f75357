// The next token of each row of logits.
#pragma once
#include "types.h"

namespace tw::cuda {

// As tilewright.sample. A row that holds NaN, is -inf throughout, or holds +inf with a temperature gives -1.
struct SampleArgs {
  const void* logits = nullptr;  // (batch, n)
  int64_t row_stride = 0;
  const double* uniform = nullptr;  // (batch,); null: the first maximum of each row
  int64_t uniform_stride = 0;
  int64_t* out = nullptr;  // (batch,)
  int64_t out_stride = 0;
  int batch = 0, n = 0;
  Type type = Type::f32;
  float temperature = 1;
  int64_t top_k = 0;  // 0: all
  double top_p = 1, min_p = 0;
};
cudaError_t sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
