// out = act(gate) * up, elementwise (https://arxiv.org/abs/2002.05202).
#pragma once
#include "types.h"

namespace tw::cuda {

enum class Activation : int { silu, gelu, gelu_tanh };
struct ActMulArgs {
  Rows gate, up, out;
  uint32_t rows = 0;
  int64_t n = 0;  // length of a row; rows * n vectors of 16 bytes must number less than 2^31
  Type type = Type::f32;
  Activation activation = Activation::silu;
};
cudaError_t act_mul(const ActMulArgs& args, cudaStream_t stream);

}  // namespace tw::cuda
