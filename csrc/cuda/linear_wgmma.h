// The kernel of `linear` for Hopper. COMPILES; NEVER EXECUTED: there was no such device to run it on, so it
// is taken only where TILEWRIGHT_CUDA_WGMMA=1 asks for it.
#pragma once
#include "linear.h"

namespace tw::cuda {

// cudaErrorNotSupported where this call is not for it: another device, a build without sm_90a, up to 64 rows,
// rows of x that do not begin at multiples of 16 bytes, or not asked for.
cudaError_t linear_wgmma(const LinearArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
