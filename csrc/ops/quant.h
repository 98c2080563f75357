// PackedWeight from tensors; shared by linear and the packing ops.
#pragma once
#include "cpu/kernels.h"
#include "tensor.h"

namespace tilewright {

// Checks that the tensor has the size that the description asks for. group_size -1: one group a row.
PackedWeight packed_weight(const char* op, const TensorView& packed, int64_t n, int64_t k, int bits,
                           int64_t group_size, int offset, int scale_bits);

// Row `row` of the weight, k floats: scale * (code - zero) or scale * code + min.
void dequantise_row(const PackedWeight& w, int64_t row, float* out);

}  // namespace tilewright
