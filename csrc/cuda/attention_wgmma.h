// The kernel of attention's prefill for Hopper. COMPILES; NEVER EXECUTED: there was no such device to run it
// on, so it is taken only where TILEWRIGHT_CUDA_WGMMA=1 asks for it.
#pragma once
#include "attention_launch.h"

namespace tw::cuda {

// cudaErrorNotSupported where this call is not for it: another device, a build without sm_90a, up to 64
// queries, keys that are split, more to the scores than scale, causality and window, packed sequences, bounds
// of keys, pages, tensors that TMA does not take, or not asked for.
cudaError_t attention_wgmma(const AttentionLaunch& args, cudaStream_t stream);

}  // namespace tw::cuda
