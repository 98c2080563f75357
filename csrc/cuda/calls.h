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

}  // namespace tilewright::cuda
