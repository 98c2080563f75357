// Calls of the CUDA kernels with tensors: each validates once, returns early on empty input and launches.
// Nothing here allocates, synchronises or reads a tensor's values, so a CUDA graph can capture every call.
// Errors are those of ops.h, and std::runtime_error with the runtime's message where a launch fails.
#pragma once
#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "tensor.h"

namespace tilewright::cuda {

// Where a call runs: the device of its tensors, and torch's current stream there.
struct Where {
  int device = 0;
  cudaStream_t stream = nullptr;
};

// DLPack's number of the devices whose tensors are taken: 2. Tests run the kernels on memory of the CPU, 1.
extern int device_type;

void norm(Where where, const char* op, const TensorView& x, const TensorView& residual,
          const TensorView& weight, const TensorView& bias, const TensorView& out, const TensorView& total,
          float eps, bool centred);
void act_mul(Where where, const TensorView& gate, const TensorView& up, const TensorView& out,
             const std::string& activation);

// What tokens are written to: dense caches, (batch, kv_heads, max_len, head_dim), or pages with a
// block_table.
struct CacheInputs {
  const TensorView &cache_k, &cache_v, &positions, &block_table, &cache_seqlens;
};
void kv_append(Where where, const CacheInputs& caches, const TensorView& k, const TensorView& v);

// The values of positions, of block_table and of cache_seqlens are looked at by the kernels: rope.h says what
// becomes of those that do not exist.
struct RopeInputs {
  const TensorView &cos, &sin;
  bool interleaved = false;
  std::optional<int64_t> rotary_dim;
};
// In place where the outputs are q and k.
void rope(Where where, const TensorView& q, const TensorView& k, const RopeInputs& rope,
          const TensorView& positions, const TensorView& out_q, const TensorView& out_k);
// out = q rotated; k, rotated, and v go to the caches. A token's angle is that of its position in them.
void rope_append(Where where, const TensorView& q, const TensorView& k, const TensorView& v,
                 const RopeInputs& rope, const CacheInputs& caches, const TensorView& out);

}  // namespace tilewright::cuda
