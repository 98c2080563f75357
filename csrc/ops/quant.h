// PackedWeight from tensors; shared by linear and the packing ops.
#pragma once
#include "cpu/kernels.h"
#include "ops.h"
#include "tensor.h"

namespace tilewright {

// Checks that the tensor has the size that the format asks for.
PackedWeight packed_weight(const char* op, const TensorView& packed, const WeightFormat& format);

// Row `row` of the weight, k floats.
void dequantise_row(const PackedWeight& w, int64_t row, float* out);

// Column k of a block of rows, 32 floats; rows past n are 0.
void dequantise_column(const PackedWeight& w, int64_t block, int64_t k, float* out);

// 32 consecutive columns of one row on the way into a packed weight. Scales and offsets are those of columns
// 0-15 and 16-31, the same where a group is longer. With two-level scales they are factors (whole numbers) of
// the supers of the 256 columns around.
struct Chunk {
  uint8_t codes[32];
  float scale[2], offset[2];
  float super_scale, super_min;
};

}  // namespace tilewright
