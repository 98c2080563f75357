// Calls of the CUDA kernels of attention; rules and errors as in calls.h, operands and options as in ops.h.
#pragma once
#include "cuda/calls.h"
#include "ops.h"

namespace tilewright::cuda {

// Where, and uint8 memory of the size that attention_workspace says, for what runs on that device at the
// time.
int64_t attention_workspace(int device, const AttentionInputs& in);
// The values of q_start to k_batch, and of block_table, are looked at by the kernels: rows whose bounds or
// pages do not exist become NaN. q_start must ascend.
void attention(Where where, const AttentionInputs& in, const AttentionOptions& options, const TensorView& out,
               const TensorView& lse, const TensorView& workspace);

}  // namespace tilewright::cuda
