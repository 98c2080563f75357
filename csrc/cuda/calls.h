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

// A weight in the GPU's order (triton_kernels/weight.py). offset: "none", "zero", "min".
struct GpuWeightInputs {
  const TensorView &codes, &scales, &offsets;
  int bits = 4, middle = 8;
  int64_t group = 0, k = 0;
  const std::string& offset;
};
// x (m, k), out (m, n), bias float32. activation: "float", which multiplies in x's type, bf16 or fp16;
// "int8", "int8_token", which need a workspace of linear_workspace_bytes(m, k). group_sizes, int64 (experts):
// the weight's rows are those of so many matrices.
void linear(Where where, const TensorView& x, const GpuWeightInputs& weight, const TensorView& bias,
            const TensorView& group_sizes, const std::string& activation, const TensorView& workspace,
            const TensorView& out);
int64_t linear_workspace_bytes(int64_t m, int64_t k);

// The tensors and numbers of a QuantizedKV. Its counts stay on the device: a call without room writes
// nothing.
struct QuantisedCacheInputs {
  const TensorView &k_codes, &v_codes, &k_scales, &v_scales, &k_tail, &v_tail, &counts;
  int64_t bits = 8, group_size = 32, residual = 32, max_len = 0, head_dim = 0;
};
void kv_append_quantised(Where where, const QuantisedCacheInputs& kv, const TensorView& k,
                         const TensorView& v);
// to[to_index[i]] = from[from_index[i]], both (rows, heads, tokens, dim) of one dtype; an absent index
// counts.
void gather(Where where, const TensorView& from, const TensorView& from_index, const TensorView& to_index,
            const TensorView& to);

// temperature 0: the first maximum, without uniform. A row from which nothing can be drawn gives -1.
void sample(Where where, const TensorView& logits, const TensorView& uniform, const TensorView& out,
            double temperature, int64_t top_k, double top_p, double min_p);

}  // namespace tilewright::cuda
