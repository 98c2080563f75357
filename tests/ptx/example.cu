// Kernels for the interpreter's tests, of the kinds that the library has: a tiled matrix product with
// cp.async, ldmatrix and mma.sync, a softmax with shuffles, sums by atomics and by the last block, and their
// host launchers.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kTileM = 64, kTileN = 64, kTileK = 32, kThreads = 128;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, zeros where the predicate is false.
__device__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A piece of 8 elements of a row of kWidth, spread so that ldmatrix's eight rows lie in different banks.
template <int kWidth>
__device__ int place(int row, int column) {
  constexpr int kPieces = kWidth / 8;
  const int shift = kPieces >= 8 ? row : row * kPieces / 8;
  return row * kWidth + ((column / 8) ^ (shift % kPieces)) * 8;
}

}  // namespace

// C (M x N, f32) = A (M x K, bf16, row major) B (K x N, bf16, row major); K and N are multiples of 8.
__global__ void __launch_bounds__(kThreads)
    gemm(const __nv_bfloat16* __restrict__ a, const __nv_bfloat16* __restrict__ b, float* __restrict__ c,
         int m, int n, int k) {
  __shared__ alignas(128) __nv_bfloat16 tile_a[2][kTileM * kTileK], tile_b[2][kTileK * kTileN];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row0 = blockIdx.y * kTileM, column0 = blockIdx.x * kTileN;
  float sum[8][4] = {};

  const auto fetch = [&](int step) {
    const int k0 = step * kTileK, buffer = step % 2;
#pragma unroll
    for (int part = 0; part < kTileM * kTileK / 8 / kThreads; ++part) {
      const int piece = part * kThreads + thread;
      const int row = piece / (kTileK / 8), column = piece % (kTileK / 8) * 8;
      const bool inside = row0 + row < m && k0 + column < k;
      copy_async(&tile_a[buffer][place<kTileK>(row, column)],
                 a + (inside ? static_cast<int64_t>(row0 + row) * k + k0 + column : 0), inside);
    }
#pragma unroll
    for (int part = 0; part < kTileK * kTileN / 8 / kThreads; ++part) {
      const int piece = part * kThreads + thread;
      const int row = piece / (kTileN / 8), column = piece % (kTileN / 8) * 8;
      const bool inside = k0 + row < k && column0 + column < n;
      copy_async(&tile_b[buffer][place<kTileN>(row, column)],
                 b + (inside ? static_cast<int64_t>(k0 + row) * n + column0 + column : 0), inside);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  const int steps = (k + kTileK - 1) / kTileK;
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      fetch(step + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    const int buffer = step % 2;
#pragma unroll
    for (int kk = 0; kk < kTileK; kk += 16) {
      uint32_t fragment_a[4];
      load_matrices(fragment_a, &tile_a[buffer][place<kTileK>(warp * 16 + lane % 16, kk + lane / 16 * 8)]);
#pragma unroll
      for (int column = 0; column < kTileN; column += 16) {
        uint32_t fragment_b[4];
        load_matrices_transposed(fragment_b,
                                 &tile_b[buffer][place<kTileN>(kk + lane % 16, column + lane / 16 * 8)]);
        multiply(sum[column / 8], fragment_a, fragment_b[0], fragment_b[1]);
        multiply(sum[column / 8 + 1], fragment_a, fragment_b[2], fragment_b[3]);
      }
    }
    __syncthreads();
  }
  for (int part = 0; part < 8; ++part)
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + warp * 16 + lane / 4 + e / 2 * 8,
                column = column0 + part * 8 + lane % 4 * 2 + e % 2;
      if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = sum[part][e];
    }
}

// A row of softmax for each block, in place of the usual library call.
__global__ void softmax(const float* __restrict__ x, float* __restrict__ out, int columns) {
  __shared__ float partial[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x += static_cast<int64_t>(blockIdx.x) * columns, out += static_cast<int64_t>(blockIdx.x) * columns;
  const auto reduce = [&](float v, auto op) {
    for (int o = 16; o; o /= 2) v = op(v, __shfl_xor_sync(0xffffffff, v, o));
    if (lane == 0) partial[warp] = v;
    __syncthreads();
    v = partial[lane < warps ? lane : 0];
    for (int o = 16; o; o /= 2) v = op(v, __shfl_xor_sync(0xffffffff, v, o));
    __syncthreads();
    return v;
  };
  float top = -INFINITY;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) top = fmaxf(top, x[i]);
  top = reduce(top, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += __expf(x[i] - top);
  // Lanes beyond the number of warps repeat the first one's part: each warp's sum counts once.
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(0xffffffff, sum, o);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  sum = lane < warps ? partial[lane] : 0;
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(0xffffffff, sum, o);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[i] = __expf(x[i] - top) / sum;
}

// The sum of x: each block adds its part to one word.
__global__ void sum_by_atomics(const float* __restrict__ x, float* __restrict__ out, int n) {
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffff, v, o);
  if (threadIdx.x % 32 == 0) atomicAdd(out, v);
}

// The same in a fixed order: the block that ends last adds the parts up.
__global__ void sum_by_last_block(const float* __restrict__ x, float* parts, unsigned* count, float* out,
                                  int n) {
  __shared__ bool is_last;
  float v = 0;
  for (int i = blockIdx.x * 32 + threadIdx.x; i < n; i += gridDim.x * 32) v += x[i];
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffff, v, o);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = v;
    __threadfence();
    is_last = atomicAdd(count, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
    *out = sum;
  }
}

__constant__ float scale_of[2];
__device__ int calls = 0;

__device__ __noinline__ float scaled(float x, int which) {
  float table[4];
  for (int i = 0; i < 4; ++i) table[i] = x * scale_of[i % 2] + i;
  return table[which & 3];
}

__global__ void scale(float* x, int n) {
  extern __shared__ float staged[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) atomicAdd(&calls, 1);
  staged[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) x[i] = scaled(staged[threadIdx.x ^ (i + 1 < n || threadIdx.x % 2 ? 1 : 0)], i);
}

// Host code with its choices, as it runs on a GPU.
extern "C" int launch_gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k,
                           cudaStream_t stream) {
  if (m == 0 || n == 0) return cudaSuccess;
  const dim3 grid((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM);
  gemm<<<grid, kThreads, 0, stream>>>(a, b, c, m, n, k);
  return cudaGetLastError();
}

extern "C" int launch_scale(float* x, int n, float even, float odd, int bytes, cudaStream_t stream) {
  int device, processors;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return e;
  const float scales[] = {even, odd};
  if (const cudaError_t e = cudaMemcpyToSymbol(scale_of, scales, sizeof scales)) return e;
  if (bytes > 48 << 10)
    if (const cudaError_t e = cudaFuncSetAttribute(scale, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
      return e;
  const int threads = n > 64 * processors ? 128 : 64;
  scale<<<(n + threads - 1) / threads, threads, bytes, stream>>>(x, n);
  return cudaGetLastError();
}

extern "C" int launch_sum(const float* x, float* out, int n, cudaStream_t stream) {
  const int blocks = 5;
  float* parts;
  unsigned* count;
  if (const cudaError_t e = cudaMallocAsync(&parts, blocks * sizeof(float), stream)) return e;
  if (const cudaError_t e = cudaMallocAsync(&count, sizeof(unsigned), stream)) return e;
  if (const cudaError_t e = cudaMemsetAsync(count, 0, sizeof(unsigned), stream)) return e;
  sum_by_last_block<<<blocks, 32, 0, stream>>>(x, parts, count, out, n);
  if (const cudaError_t e = cudaGetLastError()) return e;
  if (const cudaError_t e = cudaFreeAsync(parts, stream)) return e;
  return cudaFreeAsync(count, stream);
}
