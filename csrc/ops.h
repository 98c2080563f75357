// The seam: one entry point per op. Each validates once, returns early on empty input, picks an
// implementation and runs it on the team. Errors: std::invalid_argument (ValueError in Python),
// NotSupported (NotImplementedError).
#pragma once
#include <optional>
#include <string>

#include "tensor.h"

namespace tilewright {

// An absent tensor is a default TensorView.
void norm(const char* op, const TensorView& x, const TensorView& residual, const TensorView& weight,
          const TensorView& bias, const TensorView& out, const TensorView& sum, float eps, bool centred);

// rotary_dim absent: twice the last dimension of cos. In place where the outputs are q and k.
void rope(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
          const TensorView& positions, const TensorView& out_q, const TensorView& out_k, bool interleaved,
          std::optional<int64_t> rotary_dim);

// activation: "silu", "gelu", "gelu_tanh"
void act_mul(const TensorView& gate, const TensorView& up, const TensorView& out,
             const std::string& activation);

void kv_append(const TensorView& cache_k, const TensorView& cache_v, const TensorView& k, const TensorView& v,
               const TensorView& positions, const TensorView& block_table, const TensorView& cache_seqlens);

// temperature 0: the first maximum of each row, without uniform.
void sample(const TensorView& logits, const TensorView& uniform, const TensorView& out, double temperature,
            int64_t top_k, double top_p, double min_p);

}  // namespace tilewright
