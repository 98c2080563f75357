// Up to 4 rows of x by plain multiply-adds: the bytes of w decide. A block computes 16 outputs. A warp reads
// 16 rows of w, 32 bytes of each, so that whole sectors are read of codes and scales, and x is shared by the
// rows; the warps of a block split K, and their sums are added in order. The bits do not depend on the number
// of rows.
#include "linear_gemv.h"
#include "linear_tile.cuh"
#include "reduce.cuh"

namespace tw::cuda {
namespace {

constexpr int kOutputs = 16, kWarps = 8;

template <class T, int BITS, int ROWS>
__global__ void __launch_bounds__(32 * kWarps) gemv_kernel(const __grid_constant__ LinearArgs a) {
  __shared__ float partial[kWarps][ROWS][kOutputs];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = lane % 2;
  const int row = min(blockIdx.x * kOutputs + lane / 2, a.n - 1);
  // Of 4 bits 16 bytes are two runs of 16 columns, 32 apart; of 8 bits one.
  constexpr int kRuns = 8 / BITS, kStep = 32 * kRuns;
  const uint8_t* codes = a.w.codes + row * a.w.code_stride;
  const T* x = static_cast<const T*>(a.x);
  const bool whole = a.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  float sums[ROWS] = {};
#pragma unroll 2
  for (int first = warp * kStep; first < a.k; first += kWarps * kStep) {
    const int64_t byte = first / kRuns + side * 16;
    if (byte >= a.w.code_stride) continue;
    const uint4 raw = load_once(reinterpret_cast<const uint4*>(codes + byte));
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int at = first + side * 16 + 32 * run;
      if (at >= a.k) continue;
      const float2 s = scale_and_shift<BITS>(a.w, scale_at(a.w, a.n, row, at));
      float value[ROWS][16];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const T* from = x + min(r, a.m - 1) * a.x_stride + at;
        if (whole && at + 16 <= a.k) {
          load_floats<8>(from, reinterpret_cast<float (&)[8]>(value[r][0]));
          load_floats<8>(from + 8, reinterpret_cast<float (&)[8]>(value[r][8]));
        } else {
#pragma unroll
          for (int i = 0; i < 16; ++i) value[r][i] = at + i < a.k ? to_float(from[i]) : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        // Nibbles of a byte are columns 32 apart.
        const float w =
            BITS == 4 ? Codes<4>::value(words[i / 4], i % 4 * 2 + run) : Codes<8>::value(words[i / 4], i % 4);
        const float exact = fmaf(s.x, w, s.y);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r] = fmaf(exact, value[r][i], sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = warp_reduce<2>(sums[r], Sum{});
    if (side == 0) partial[warp][r][lane / 2] = sums[r];
  }
  __syncthreads();
  const int output = threadIdx.x % kOutputs, r = threadIdx.x / kOutputs, n = blockIdx.x * kOutputs + output;
  if (r >= ROWS || r >= a.m || n >= a.n) return;
  float sum = partial[0][r][output];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += partial[w][r][output];
  if (a.bias) sum += a.bias[n];
  store_float(a.out, a.out_type, int64_t{r} * a.n + n, sum);
}

template <class T, int BITS>
cudaError_t launch(const LinearArgs& a, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(a.n, kOutputs));
  if (a.m == 1)
    gemv_kernel<T, BITS, 1><<<blocks, 32 * kWarps, 0, stream>>>(a);
  else if (a.m == 2)
    gemv_kernel<T, BITS, 2><<<blocks, 32 * kWarps, 0, stream>>>(a);
  else
    gemv_kernel<T, BITS, 4><<<blocks, 32 * kWarps, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t linear_gemv(const LinearArgs& a, cudaStream_t stream) {
  if (a.type == Type::bf16) return a.w.bits == 4 ? launch<bf16, 4>(a, stream) : launch<bf16, 8>(a, stream);
  return a.w.bits == 4 ? launch<f16, 4>(a, stream) : launch<f16, 8>(a, stream);
}

}  // namespace tw::cuda
