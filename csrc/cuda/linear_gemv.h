// The kernel of `linear` for few rows.
#pragma once
#include "linear.h"

namespace tw::cuda {

constexpr int kGemvRows = 4;
cudaError_t linear_gemv(const LinearArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
