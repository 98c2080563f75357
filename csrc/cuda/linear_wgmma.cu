// COMPILES; NEVER EXECUTED. x in bf16 or fp16 by the tensor cores of sm_90a, where a warpgroup multiplies
// operands of 64 rows: the transposed product, so that the weight is the operand that may come from
// registers, where codes become floats, and x the one in shared memory, which TMA brings with the swizzle
// that wgmma reads.
#include "linear_wgmma.h"

#ifndef TILEWRIGHT_CUDA_WGMMA  // a build without sm_90a

namespace tw::cuda {
cudaError_t linear_wgmma(const LinearArgs&, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace tw::cuda

#else
#include "hopper.cuh"
#include "linear_tile.cuh"

namespace tw::cuda {
namespace {

constexpr int kRows = 128, kOutputs = 128, kColumns = 64;  // of a tile, and of a step
constexpr int kStages = 4, kThreads = 256;                 // two warpgroups, 64 outputs each
constexpr int kXBytes = kRows * kColumns * 2;
constexpr int kScaleRow = kOutputs + 8, kScales = 4 * kScaleRow;  // as in linear_gemm.cu
constexpr int kSumRow = kOutputs + 4;  // floats; lanes of a warp write to 32 different banks

template <int BITS>
struct Layout {
  static constexpr int kCodeBytes = kColumns * BITS / 8;
  static constexpr int kStage = kXBytes + kOutputs * kCodeBytes;
  static constexpr int kBytes =
      kSwizzleBytes + kStages * kStage + 2 * kScales * int{sizeof(float2)} + kStages * 8;
  static_assert(kStages * kStage >= kRows * kSumRow * 4, "the results are exchanged where the stages were");
};

template <class T, int BITS>
__global__ void __launch_bounds__(kThreads, 2)
    wgmma_kernel(const __grid_constant__ LinearArgs a, const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap w_map, int tiles_m, int tiles_n) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<BITS>;
  extern __shared__ uint8_t memory[];
  uint8_t* const shared = aligned_to_swizzle(memory);
  float2* const scales = reinterpret_cast<float2*>(shared + kStages * L::kStage);
  uint64_t* const arrived = reinterpret_cast<uint64_t*>(scales + 2 * kScales);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, eighth = lane / 4, q = lane % 4;
  const Tile tile = tile_of(blockIdx.x, tiles_m, tiles_n);
  const TileRows rows = rows_of_tile<kRows>(a, tile.m);
  if (rows.first >= rows.end) return;
  const int first_n = tile.n * kOutputs, first_w = static_cast<int>(rows.weight) + first_n;
  const int64_t weight_rows = int64_t{a.n} * a.experts;
  const int steps = (a.k + kColumns - 1) / kColumns, parts = a.w.group == 16 ? 2 : 1;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) barrier_init(arrived + s, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const auto fetch = [&](int step) {  // by one thread
    uint8_t* const stage = shared + step % kStages * L::kStage;
    uint64_t* const barrier = arrived + step % kStages;
    barrier_expect(barrier, L::kStage);
    copy_tile(stage, &x_map, step * kColumns, rows.first, barrier);
    copy_tile(stage + kXBytes, &w_map, step * L::kCodeBytes, first_w, barrier);
  };
  constexpr int kMine = kOutputs * 4 / kThreads;
  float2 coming[kMine];
  const auto fetch_scales = [&](int step) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * kThreads, part = i / kOutputs, n = first_n + i % kOutputs;
      const int column = step * kColumns + part * (32 / parts);
      coming[j] = {0.0f, 0.0f};
      if (part < 2 * parts && n < a.n && column < a.k)
        coming[j] = scale_and_shift<BITS>(a.w, scale_at(a.w, weight_rows, rows.weight + n, column));
    }
  };
  const auto store_scales = [&](int step) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * kThreads, part = i / kOutputs;
      if (part < 2 * parts) scales[step % 2 * kScales + part * kScaleRow + i % kOutputs] = coming[j];
    }
  };

  fetch_scales(0);
  store_scales(0);
  fetch_scales(1);
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages - 1 && s < steps; ++s) fetch(s);
  float d[kRows / 8][4] = {};
  const int row = warp * 16 + eighth;  // of the tile's outputs, and the one 8 further
  for (int step = 0; step < steps; ++step) {
    barrier_wait(arrived + step % kStages, step / kStages % 2);
    __syncthreads();  // every product of the step before is done: its stage and scales may be overwritten
    store_scales(step + 1);
    fetch_scales(step + 2);
    if (threadIdx.x == 0 && step + kStages - 1 < steps) fetch(step + kStages - 1);
    const uint8_t* const stage = shared + step % kStages * L::kStage;
    const float2* const table = scales + step % 2 * kScales;
    uint32_t w[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {  // 16 columns
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int r = row + below * 8;
        const float2 scale = table[(parts == 2 ? s : s / 2) * kScaleRow + r];
        // The 16-byte pieces of a row lie in TMA's swizzle of 32 bytes, or of 64.
        const int piece = BITS == 4 ? (s % 2) ^ (r / 4 % 2) : s ^ (r / 2 % 4);
        const uint8_t* const codes = stage + kXBytes + r * L::kCodeBytes + piece * 16 + q * 2;
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          const uint32_t word = *reinterpret_cast<const uint16_t*>(codes + right * 8);
          const int first = BITS == 4 ? s / 2 : 0, second = BITS == 4 ? 2 + s / 2 : 1;
          w[s][below + right * 2] = pack_pair<T>(fmaf(scale.x, Codes<BITS>::value(word, first), scale.y),
                                                 fmaf(scale.x, Codes<BITS>::value(word, second), scale.y));
        }
      }
    }
    pin(d), pin(w);
    products_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s) multiply_registers<T, kRows, false>(d, w[s], descriptor(stage + s * 32));
    products_commit();
    products_wait<0>();
    pin(d), pin(w);
  }

  // Results change places, so that a warp writes neighbouring outputs.
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    const int token = i / 4 * 8 + q * 2 + i % 2, output = row + i / 2 % 2 * 8;
    sums[token * kSumRow + output] = d[i / 4][i % 4];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kOutputs / 2; i += kThreads) {
    const int token = i / (kOutputs / 2), output = i % (kOutputs / 2) * 2;
    const float* const two = sums + token * kSumRow + output;
    store_outputs(a, rows, rows.first + token, first_n + output, two[0], two[1]);
  }
#endif
}

template <class T, int BITS>
cudaError_t launch(const LinearArgs& a, cudaStream_t stream) {
  CUtensorMap x_map, w_map;
  const CUtensorMapSwizzle swizzle = BITS == 4 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_64B;
  if (!map_tensor<2>(x_map, map_type(a.type), a.x, {a.k, a.m}, {a.x_stride * 2}, kColumns, kRows,
                     CU_TENSOR_MAP_SWIZZLE_128B) ||
      !map_tensor<2>(w_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.codes,
                     {a.w.code_stride, int64_t{a.n} * a.experts}, {a.w.code_stride}, Layout<BITS>::kCodeBytes,
                     kOutputs, swizzle))
    return cudaErrorNotSupported;
  const auto kernel = wgmma_kernel<T, BITS>;
  constexpr int kBytes = Layout<BITS>::kBytes;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (e != cudaSuccess) return e;
  const int64_t tiles_m = ceil_div(a.m, kRows) + (a.group_sizes ? a.experts : 0),
                tiles_n = ceil_div(a.n, kOutputs);
  const auto blocks = static_cast<unsigned>(tiles_m * tiles_n);
  // clang-format off: it takes the launch apart
  kernel<<<blocks, kThreads, kBytes, stream>>>(a, x_map, w_map, static_cast<int>(tiles_m), static_cast<int>(tiles_n));
  // clang-format on
  return cudaGetLastError();
}

}  // namespace

cudaError_t linear_wgmma(const LinearArgs& a, cudaStream_t stream) {
  const int64_t rows = a.group_sizes ? ceil_div(a.m, a.experts) : a.m;
  if (rows <= 64 || a.x_stride % 8 || reinterpret_cast<uintptr_t>(a.x) % 16 || !hopper_asked_for())
    return cudaErrorNotSupported;
  if (a.type == Type::bf16) return a.w.bits == 4 ? launch<bf16, 4>(a, stream) : launch<bf16, 8>(a, stream);
  return a.w.bits == 4 ? launch<f16, 4>(a, stream) : launch<f16, 8>(a, stream);
}

}  // namespace tw::cuda
#endif
