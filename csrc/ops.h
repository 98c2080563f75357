// The seam: one entry point per op. Each validates once, returns early on empty input, picks an
// implementation and runs it on the team. Errors: std::invalid_argument (ValueError in Python),
// NotSupported (NotImplementedError).
#pragma once
#include "tensor.h"

namespace tilewright {

// An absent tensor is a default TensorView.
void norm(const char* op, const TensorView& x, const TensorView& residual, const TensorView& weight,
          const TensorView& bias, const TensorView& out, const TensorView& sum, float eps, bool centred);

}  // namespace tilewright
