// Tensor core products of one warp (sm_80 and later) and the loads that feed them, as in NVIDIA's "PTX ISA",
// "Warp Level Matrix Multiply-Accumulate Instructions". With g = lane / 4 and t = lane % 4:
//   c  float[4] or int[4], 16 x 8: (row g, columns 2t and 2t + 1), (row g + 8, the same columns)
//   a  16 x 16 of two bytes: (row g, columns 2t..), (row g + 8, columns 2t..), (g, 2t + 8..), (g + 8, 2t
//   + 8..) b  16 x 8 of two bytes, its columns contiguous: (rows 2t and 2t + 1, column g), (rows 2t + 8..,
//   column g) of one byte, 16 x 32 and 32 x 8: the same with 4t, 4t + 16 and four elements a register
// So what a product leaves in c becomes, rounded, the a of the next one without moving between lanes.
#pragma once
#include "convert.cuh"
#include "memory.cuh"

namespace tw::cuda {

// c += a b with fp32 accumulators. T: bf16 or f16.
template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b of signed bytes, 16 x 32 by 32 x 8.
__device__ inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of two-byte elements from shared memory: lane i gives the address of row i % 8 of
// matrix i / 8 (16 bytes, aligned); r[m] is matrix m, (row g, columns 2t and 2t + 1), transposed (rows 2t..,
// column g).
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Where element (row, column) of a tile lies whose rows have kWidth two-byte elements, a multiple of 16: the
// pieces of 8 elements of a row trade places, so that the same piece of 8 consecutive rows lies in 8
// different groups of banks, and ldmatrix as well as 16-byte stores are free of conflicts. column: a multiple
// of 8.
template <int kWidth>
__device__ inline int swizzled(int row, int column) {
  static_assert(kWidth % 16 == 0, "pieces are swapped in pairs at least");
  constexpr int kPieces = kWidth / 8;
  constexpr int kShift = kPieces % 8 == 0   ? 0
                         : kPieces % 4 == 0 ? 1
                                            : 2;  // rows that lie apart by themselves
  constexpr int kMask = kPieces % 8 == 0 ? 7 : kPieces % 4 == 0 ? 3 : 1;
  return row * kWidth + ((column / 8) ^ ((row >> kShift) & kMask)) * 8;
}

}  // namespace tw::cuda
