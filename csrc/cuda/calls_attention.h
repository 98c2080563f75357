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

// Attention to a quantised KV cache; k, v and what says where sequences lie are absent from `in`. How many
// tokens the cache holds, the kernels see: a mask or bias for another number gives NaN.
int64_t attention_quantised_workspace(int device, const TensorView& q, const QuantisedKvInputs& kv);
void attention_quantised(Where where, const AttentionInputs& in, const QuantisedKvInputs& kv,
                         const AttentionOptions& options, const TensorView& out, const TensorView& lse,
                         const TensorView& workspace);

// The gradient of `attention`: what is absent of grad_bias, grad_alibi and grad_sinks is not computed. delta
// and, for grad_alibi, slopes are memory like lse.
void attention_backward(Where where, const AttentionInputs& in, const AttentionOptions& options,
                        const AttentionGradients& gradients, const TensorView& slopes);

}  // namespace tilewright::cuda
