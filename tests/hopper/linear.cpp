#include "linear_wgmma.cu"  // as model.py rewrites it

using namespace tw::cuda;

// numbers: m, n, k, x's stride, code_stride, bits, the scales' type, offset, middle, group, groups, f16,
// experts.
TW_C int hopper_linear(const void* x, const uint8_t* codes, const void* scales, const void* offsets,
                       const float* bias, const int64_t* group_sizes, void* out, const int64_t* numbers) {
  LinearArgs a;
  a.x = x, a.bias = bias, a.group_sizes = group_sizes, a.out = out;
  a.m = int(numbers[0]), a.n = int(numbers[1]), a.k = int(numbers[2]), a.x_stride = numbers[3];
  a.w = {codes,           numbers[4],       int(numbers[5]),    scales,
         offsets,         Type(numbers[6]), Offset(numbers[7]), int(numbers[8]),
         int(numbers[9]), int(numbers[10])};
  a.type = a.out_type = numbers[11] ? Type::f16 : Type::bf16;
  a.experts = int(numbers[12]);
  return linear_wgmma(a, nullptr);
}