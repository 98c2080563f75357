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
#include <cuda.h>

#include <cstdlib>
#include <cstring>

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
  static constexpr int kBytes = 1024 + kStages * kStage + 2 * kScales * int{sizeof(float2)} + kStages * 8;
  static_assert(kStages * kStage >= kRows * kSumRow * 4, "the results are exchanged where the stages were");
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void copy_tile(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// 64 columns of x, rows of 128 bytes with the 128-byte swizzle: 8 rows are 1,024 bytes. `column`: a multiple
// of 16.
__device__ uint64_t descriptor(const void* x, int column) {
  const uint64_t address = (shared_address(x) + column * 2) >> 4;
  return (address & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Registers 10 i to 10 i + 9 of d.
#define TW_TEN(i) \
  "%" #i "0, %" #i "1, %" #i "2, %" #i "3, %" #i "4, %" #i "5, %" #i "6, %" #i "7, %" #i "8, %" #i "9, "
#define TW_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TW_SIXTEEN(i) TW_FOUR(i), TW_FOUR(i + 4), TW_FOUR(i + 8), TW_FOUR(i + 12)
#define TW_WGMMA(type)                                                                     \
  asm volatile(                                                                            \
      "{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TW_TEN(1) TW_TEN(2) TW_TEN(3) TW_TEN(4) \
          TW_TEN(5) "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"     \
      : TW_SIXTEEN(0), TW_SIXTEEN(16), TW_SIXTEEN(32), TW_SIXTEEN(48)                      \
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x))

// d += w x for 64 x 16 by 16 x 128, asynchronously.
template <class T>
__device__ void multiply(float (&d)[64], const uint32_t (&w)[4], uint64_t x);
template <>
__device__ inline void multiply<bf16>(float (&d)[64], const uint32_t (&w)[4], uint64_t x) {
  TW_WGMMA("bf16");
}
template <>
__device__ inline void multiply<f16>(float (&d)[64], const uint32_t (&w)[4], uint64_t x) {
  TW_WGMMA("f16");
}

#endif

template <class T, int BITS>
__global__ void __launch_bounds__(kThreads)
    wgmma_kernel(const __grid_constant__ LinearArgs a, const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap w_map, int tiles_m, int tiles_n) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<BITS>;
  extern __shared__ uint8_t memory[];
  // The swizzle goes by address.
  uint8_t* const shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
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
    for (int s = 0; s < kStages; ++s) barrier_init(arrived + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
  float d[64] = {};
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
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < 4; ++s) multiply<T>(d, w[s], descriptor(stage, s * 16));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");  // not read before the wait
  }

  // Results change places, so that a warp writes neighbouring outputs.
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int token = i / 4 * 8 + q * 2 + i % 2, output = row + i / 2 % 2 * 8;
    sums[token * kSumRow + output] = d[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kOutputs / 2; i += kThreads) {
    const int token = i / (kOutputs / 2), output = i % (kOutputs / 2) * 2;
    const float* const two = sums + token * kSumRow + output;
    store_outputs(a, rows, rows.first + token, first_n + output, two[0], two[1]);
  }
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
Encode encoder() {
  static const Encode found = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result);
    return e == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(f) : nullptr;
  }();
  return found;
}

// A matrix in pieces of `rows` rows of `columns` elements; what lies outside reads as zero.
bool map_matrix(CUtensorMap& map, CUtensorMapDataType type, const void* data, int64_t width, int64_t height,
                int64_t stride_bytes, int columns, int rows, CUtensorMapSwizzle swizzle) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(height)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(stride_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows)},
                   step[2] = {1, 1};
  const Encode encode = encoder();
  return encode && encode(&map, type, 2, const_cast<void*>(data), size, stride, box, step,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool asked_for() {
  static const bool asked = [] {
    const char* value = std::getenv("TILEWRIGHT_CUDA_WGMMA");
    return value && std::strcmp(value, "1") == 0;
  }();
  return asked;
}

bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

template <class T, int BITS>
cudaError_t launch(const LinearArgs& a, CUtensorMapDataType type, cudaStream_t stream) {
  CUtensorMap x_map, w_map;
  const CUtensorMapSwizzle swizzle = BITS == 4 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_64B;
  if (!map_matrix(x_map, type, a.x, a.k, a.m, a.x_stride * 2, kColumns, kRows, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !map_matrix(w_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w.codes, a.w.code_stride, int64_t{a.n} * a.experts,
                  a.w.code_stride, Layout<BITS>::kCodeBytes, kOutputs, swizzle))
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
  if (!asked_for() || rows <= 64 || a.x_stride % 8 || reinterpret_cast<uintptr_t>(a.x) % 16 || !is_hopper())
    return cudaErrorNotSupported;
  if (a.type == Type::bf16)
    return a.w.bits == 4 ? launch<bf16, 4>(a, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, stream)
                         : launch<bf16, 8>(a, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, stream);
  return a.w.bits == 4 ? launch<f16, 4>(a, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, stream)
                       : launch<f16, 8>(a, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, stream);
}

}  // namespace tw::cuda
#endif
