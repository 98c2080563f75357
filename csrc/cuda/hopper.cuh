// TMA and wgmma, for the kernels of sm_90a. COMPILES; NEVER EXECUTED. After NVIDIA's "PTX ISA": "Tensors",
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", "mbarrier".
//
// Tiles in shared memory have rows of 128 bytes, 64 elements, with the 128-byte swizzle that TMA writes and
// wgmma reads: the 16-byte pieces of row r trade places by r % 8, so 8 rows, 1,024 bytes, repeat. Wider tiles
// are such boxes one after the other. Tiles begin at multiples of 1,024 bytes.
#pragma once
#include <cuda.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "convert.cuh"
#include "memory.cuh"

namespace tw::cuda {

// A block asks for so much more shared memory, and begins at the first multiple of it: the swizzle goes by
// address.
constexpr int kSwizzleBytes = 1024;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint8_t* aligned_to_swizzle(uint8_t* memory) {
  return memory + (kSwizzleBytes - shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
}

// A barrier in shared memory: its phases 0, 1, 2, ... end when `count` arrivals and the expected bytes came.
__device__ inline void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// After the block's barrier_init, before its __syncthreads: TMA sees them.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and expects what copy_tile will bring.
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until a phase of this parity is over. The one before the first counts as odd, and as over.
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
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

// The four warps of a warpgroup wait for each other. number: 1 to 15.
__device__ inline void warpgroup_meet(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}
// A warpgroup leaves all but N registers a thread to the block, or takes N.
template <int N>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// A box of a matrix, or of a (batch, head, row, column) tensor, from its first element on; by one thread.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ inline void copy_tile(void* to, const CUtensorMap* map, int column, int row, int head, int batch,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], [%6];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

// An operand in shared memory, from `at` on: within a box at a column that is a multiple of 16, or at a row
// that is a multiple of 8. A transposed one takes its next 64 columns `box` bytes further.
__device__ inline uint64_t descriptor(const void* at, int box = 16) {
  const uint64_t address = (shared_address(at) & 0x3ffff) >> 4;
  return address | uint64_t(box >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Before products whose registers were written since the last fence, and after their wait: no other
// instruction that touches these registers passes.
template <int N>
__device__ inline void pin(float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(x[i][j])::"memory");
}
template <int N>
__device__ inline void pin(uint32_t (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(x[i][j])::"memory");
}
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `N` of the newest committed groups are under way.
template <int N>
__device__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The products. d, 64 rows by N columns, is kept as mma.cuh's c, 8 columns after 8 columns; a warp of the
// four has 16 rows. Registers 10 i to 10 i + 9 of d; the operands that 8 columns are:
#define TW_TEN(i) \
  "%" #i "0, %" #i "1, %" #i "2, %" #i "3, %" #i "4, %" #i "5, %" #i "6, %" #i "7, %" #i "8, %" #i "9, "
#define TW_THIRTY "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TW_TEN(1) TW_TEN(2)
#define TW_D64 "{" TW_THIRTY "%30, %31}"
#define TW_D128 "{" TW_THIRTY TW_TEN(3) TW_TEN(4) TW_TEN(5) "%60, %61, %62, %63}"
#define TW_EIGHT(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TW_OUT64 \
  TW_EIGHT(0), TW_EIGHT(1), TW_EIGHT(2), TW_EIGHT(3), TW_EIGHT(4), TW_EIGHT(5), TW_EIGHT(6), TW_EIGHT(7)
#define TW_OUT128                                                                                           \
  TW_OUT64, TW_EIGHT(8), TW_EIGHT(9), TW_EIGHT(10), TW_EIGHT(11), TW_EIGHT(12), TW_EIGHT(13), TW_EIGHT(14), \
      TW_EIGHT(15)
// `add`: the operand that says whether d counts, or it is overwritten.
#define TW_WGMMA(n, type, d, a, b, add, transposed)                                   \
  "{\n.reg .pred add;\nsetp.ne.u32 add, " add                                         \
  ", 0;\n"                                                                            \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " d ", " a ", " b \
  ", add, 1, 1, " transposed ";\n}"
#define TW_REGISTERS_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1), "n"(kTransposed)
#define TW_SHARED_A "l"(a), "l"(b), "r"(int(add))

// d += a b, asynchronously, with a, 64 x 16, in registers. b's descriptor is of its transpose, or with
// kTransposed of b itself.
template <class T, int N, bool kTransposed>
__device__ inline void multiply_registers(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
  static_assert((N == 64 || N == 128) && (std::is_same_v<T, bf16> || std::is_same_v<T, f16>));
#define TW_MULTIPLY(type)                                                                  \
  if constexpr (N == 64)                                                                   \
    asm volatile(TW_WGMMA(64, type, TW_D64, "{%32, %33, %34, %35}", "%36", "%37", "%38")   \
                 : TW_OUT64                                                                \
                 : TW_REGISTERS_A);                                                        \
  else                                                                                     \
    asm volatile(TW_WGMMA(128, type, TW_D128, "{%64, %65, %66, %67}", "%68", "%69", "%70") \
                 : TW_OUT128                                                               \
                 : TW_REGISTERS_A)
  if constexpr (std::is_same_v<T, bf16>) {
    TW_MULTIPLY("bf16");
  } else {
    TW_MULTIPLY("f16");
  }
#undef TW_MULTIPLY
}

// d = [d +] a b with both in shared memory, b as its transpose.
template <class T, int N>
__device__ inline void multiply_shared(float (*d)[4], uint64_t a, uint64_t b, bool add) {
  static_assert((N == 64 || N == 128) && (std::is_same_v<T, bf16> || std::is_same_v<T, f16>));
#define TW_MULTIPLY(type)                                                                           \
  if constexpr (N == 64)                                                                            \
    asm volatile(TW_WGMMA(64, type, TW_D64, "%32", "%33", "%34", "0, 0") : TW_OUT64 : TW_SHARED_A); \
  else                                                                                              \
    asm volatile(TW_WGMMA(128, type, TW_D128, "%64", "%65", "%66", "0, 0") : TW_OUT128 : TW_SHARED_A)
  if constexpr (std::is_same_v<T, bf16>) {
    TW_MULTIPLY("bf16");
  } else {
    TW_MULTIPLY("f16");
  }
#undef TW_MULTIPLY
}

#endif

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
inline Encode encoder() {
  static const Encode found = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result);
    return e == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(f) : nullptr;
  }();
  return found;
}

// A tensor of kRank dimensions, the contiguous one first, in boxes of `rows` of the second by `columns` of
// the first; strides (in bytes) are of the second dimension and on, any of a dimension of one. What lies
// outside, on either side, reads as zero. False where TMA does not take it.
template <int kRank>
bool map_tensor(CUtensorMap& map, CUtensorMapDataType type, const void* data, const int64_t (&sizes)[kRank],
                const int64_t (&strides)[kRank - 1], int columns, int rows, CUtensorMapSwizzle swizzle) {
  cuuint64_t size[kRank], stride[kRank - 1];
  cuuint32_t box[kRank], step[kRank];
  for (int i = 0; i < kRank; ++i) size[i] = static_cast<cuuint64_t>(sizes[i]), box[i] = step[i] = 1;
  for (int i = 0; i < kRank - 1; ++i) {
    if (sizes[i + 1] > 1 && strides[i] <= 0) return false;
    stride[i] = sizes[i + 1] > 1 ? static_cast<cuuint64_t>(strides[i]) : 16;
  }
  box[0] = static_cast<cuuint32_t>(columns), box[1] = static_cast<cuuint32_t>(rows);
  const Encode encode = encoder();
  return encode && encode(&map, type, kRank, const_cast<void*>(data), size, stride, box, step,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline CUtensorMapDataType map_type(Type type) {
  return type == Type::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Whether these kernels were asked for, as long as nobody has run them, on a device that has them.
inline bool hopper_asked_for() {
  static const bool asked = [] {
    const char* value = std::getenv("TILEWRIGHT_CUDA_WGMMA");
    return value && std::strcmp(value, "1") == 0;
  }();
  int device = 0, major = 0, minor = 0;
  return asked && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

}  // namespace tw::cuda
