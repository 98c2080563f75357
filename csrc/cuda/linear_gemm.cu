// x in bf16 or fp16 by tensor cores. Tiles of x and of the codes come through cp.async, kStages in flight;
// codes become floats in registers, exact but for the rounding to x's type. Per output one accumulator takes
// k in ascending steps of 16, whatever the tile; only the tile of 16 rows adds even and odd halves of 64
// columns apart.
//
// Tensor cores need of each lane two columns here and two there; which columns of a step those are does not
// matter if it is the same in x and w. Lane q of 4 takes 8 consecutive columns q * 8 of 32: 16 bytes of x, 4
// or 8 of codes.
#include "linear_gemv.h"
#include "linear_shape.h"
#include "linear_tile.cuh"
#include "linear_wgmma.h"
#include "mma.cuh"

namespace tw::cuda {
namespace {

constexpr int kColumns = 64;  // of a step
constexpr int kStages = 3;

template <class S, int BITS>
struct Layout {
  static constexpr int kCodeBytes = kColumns * BITS / 8;  // of a row
  static constexpr int kXBytes = S::BM * kColumns * 2, kWBytes = S::BN * kCodeBytes;
  static constexpr int kStage = kXBytes + kWBytes;
  // (scale, shift) of 16 or 32 columns and an output, for two steps; 8 more a row keep two rows in different
  // banks.
  static constexpr int kScaleRow = S::BN + 8, kScales = 4 * kScaleRow;
  static constexpr int kBytes = kStages * kStage + 2 * kScales * int{sizeof(float2)};
};

template <class T, int BITS, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_kernel(const __grid_constant__ LinearArgs a, int tiles_m, int tiles_n) {
  using L = Layout<S, BITS>;
  extern __shared__ __align__(128) uint8_t shared[];
  float2* const scales = reinterpret_cast<float2*>(shared + kStages * L::kStage);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, eighth = lane / 4, q = lane % 4;
  const int half = S::kHalves == 2 ? warp % 2 : 0, warp_n = warp / S::kHalves % S::kWarpsN;
  const int warp_m = warp / S::kHalves / S::kWarpsN;
  const Tile tile = tile_of(blockIdx.x, tiles_m, tiles_n);
  const TileRows rows = rows_of_tile<S::BM>(a, tile.m);
  if (rows.first >= rows.end) return;
  const int first_n = tile.n * S::BN;
  const int64_t weight_rows = int64_t{a.n} * a.experts;
  const T* const x = static_cast<const T*>(a.x);
  const bool whole = a.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  const int steps = (a.k + kColumns - 1) / kColumns;
  const int parts = a.w.group == 16 ? 2 : 1;  // scales within 32 columns

  // Step `step` of x and codes to its stage; zeros beyond the ends of x, anything beyond those of w.
  const auto fetch = [&](int step) {
    uint8_t* const stage = shared + step % kStages * L::kStage;
    const int column = step * kColumns;
#pragma unroll
    for (int i = threadIdx.x; i < S::BM * 8; i += S::kThreads) {
      const int row = i / 8, piece = i % 8, at = column + piece * 8;
      uint8_t* to = stage + row * 128 + (piece ^ (row % 2 * 4)) * 16;
      const int valid = rows.first + row < rows.end ? max(min(a.k - at, 8), 0) : 0;
      const T* from = x + (valid ? (rows.first + row) * a.x_stride + at : 0);
      if (whole) {
        copy_async_16(to, from, valid * 2);
      } else {
        Vec<T, 8> v;
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] = j < valid ? from[j] : from_float<T>(0.0f);
        *reinterpret_cast<Vec<T, 8>*>(to) = v;
      }
    }
    constexpr int kPieces = L::kCodeBytes / 16;
#pragma unroll
    for (int i = threadIdx.x; i < S::BN * kPieces; i += S::kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const int swapped = BITS == 8 ? piece ^ (row / 2 % 2 * 2) : piece;
      const bool inside = first_n + row < a.n;
      const int64_t from =
          (rows.weight + (inside ? first_n + row : 0)) * a.w.code_stride + step * L::kCodeBytes + piece * 16;
      copy_async_16(stage + L::kXBytes + row * L::kCodeBytes + swapped * 16, a.w.codes + from,
                    inside ? 16 : 0);
    }
  };
  // Scales come through registers: those of the next step are on their way while this one is computed.
  constexpr int kMine = (S::BN * 4 + S::kThreads - 1) / S::kThreads;
  float2 coming[kMine];
  const auto fetch_scales = [&](int step) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * S::kThreads, part = i / S::BN, n = first_n + i % S::BN;
      if (part >= 2 * parts) break;
      const int column = step * kColumns + part * (32 / parts);
      coming[j] = n < a.n && column < a.k
                      ? scale_and_shift<BITS>(a.w, scale_at(a.w, weight_rows, rows.weight + n, column))
                      : float2{0.0f, 0.0f};
    }
  };
  const auto store_scales = [&](int step) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * S::kThreads, part = i / S::BN;
      if (part < 2 * parts) scales[step % 2 * L::kScales + part * L::kScaleRow + i % S::BN] = coming[j];
    }
  };

  float acc[S::MI][S::NI][4] = {};
  // 32 columns of the warp's tile.
  const auto multiply = [&](int step, int h) {
    const uint8_t* const stage = shared + step % kStages * L::kStage;
    const float2* const table =
        scales + step % 2 * L::kScales + (h * parts + (parts == 2 ? q / 2 : 0)) * L::kScaleRow;
    uint4 xs[S::MI][2];
#pragma unroll
    for (int mi = 0; mi < S::MI; ++mi)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = (warp_m * S::MI + mi) * 16 + below * 8 + eighth;
        xs[mi][below] =
            *reinterpret_cast<const uint4*>(stage + row * 128 + ((h * 4 + q) ^ (row % 2 * 4)) * 16);
      }
#pragma unroll
    for (int ni = 0; ni < S::NI; ++ni) {
      const int row = (warp_n * S::NI + ni) * 8 + eighth;
      const uint8_t* codes = stage + L::kXBytes + row * L::kCodeBytes + q * 8;
      if (BITS == 8) codes += (h ^ (row / 2 % 2)) * 32;
      const uint2 raw = *reinterpret_cast<const uint2*>(codes);
      const float2 s = table[row];
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = i < 2 ? raw.x : raw.y;
        const auto one = [&](int j) {
          if constexpr (BITS == 4)
            return fmaf(s.x, Codes<4>::value(h ? word >> 4 : word, j * 2), s.y);
          else
            return fmaf(s.x, Codes<8>::value(word, j), s.y);
        };
        w[i] = pack_pair<T>(one(i % 2 * 2), one(i % 2 * 2 + 1));
      }
#pragma unroll
      for (int mi = 0; mi < S::MI; ++mi) {
        const uint4 &top = xs[mi][0], &low = xs[mi][1];
        mma<T>(acc[mi][ni], {top.x, low.x, top.y, low.y}, w[0], w[1]);
        mma<T>(acc[mi][ni], {top.z, low.z, top.w, low.w}, w[2], w[3]);
      }
    }
  };

  fetch_scales(0);
  store_scales(0);
  fetch_scales(1);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    store_scales(step + 1);
    fetch_scales(step + 2);
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    copy_async_commit();
    if constexpr (S::kHalves == 2) {
      multiply(step, half);
    } else {
      multiply(step, 0);
      multiply(step, 1);
    }
  }

  if constexpr (S::kHalves == 2) {  // odd halves hand their sums to the even ones
    // Nobody reads this stage any more: the step before the last two was its last.
    auto* const sums = reinterpret_cast<float (*)[4]>(shared + steps % kStages * L::kStage);
#pragma unroll
    for (int mi = 0; mi < S::MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < S::NI; ++ni)
        if (half == 1) store_floats<4>(sums[((warp / 2 * S::MI + mi) * S::NI + ni) * 32 + lane], acc[mi][ni]);
    __syncthreads();
    if (half == 1) return;
#pragma unroll
    for (int mi = 0; mi < S::MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < S::NI; ++ni) {
        float more[4];
        load_floats<4>(&sums[((warp / 2 * S::MI + mi) * S::NI + ni) * 32 + lane][0], more);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[mi][ni][i] += more[i];
      }
  }
#pragma unroll
  for (int mi = 0; mi < S::MI; ++mi)
    store_product(a, rows, rows.first + (warp_m * S::MI + mi) * 16 + eighth, first_n + warp_n * S::NI * 8,
                  acc[mi]);
}

template <class T, int BITS, class S>
cudaError_t launch_shape(const LinearArgs& a, cudaStream_t stream) {
  constexpr int kBytes = Layout<S, BITS>::kBytes;
  const auto kernel = gemm_kernel<T, BITS, S>;
  if (kBytes > 48 << 10) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (e != cudaSuccess) return e;
  }
  // Each expert may have one tile that is not full; blocks without a tile end at once.
  const int64_t tiles_m = ceil_div(a.m, S::BM) + (a.group_sizes ? a.experts : 0),
                tiles_n = ceil_div(a.n, S::BN);
  kernel<<<static_cast<unsigned>(tiles_m * tiles_n), S::kThreads, kBytes, stream>>>(
      a, static_cast<int>(tiles_m), static_cast<int>(tiles_n));
  return cudaGetLastError();
}

template <class T, int BITS>
cudaError_t launch(const LinearArgs& a, cudaStream_t stream) {
  const int64_t rows = a.group_sizes ? ceil_div(a.m, a.experts) : a.m;  // of an expert, about
  if (rows <= 16) return launch_shape<T, BITS, Shape<16, 32, 1, 2, 2>>(a, stream);
  if (rows <= 32) return launch_shape<T, BITS, Shape<32, 64, 1, 4>>(a, stream);
  if (rows <= 64) return launch_shape<T, BITS, Shape<64, 64, 2, 2>>(a, stream);
  return launch_shape<T, BITS, Shape<128, 128, 2, 4>>(a, stream);
}

}  // namespace

cudaError_t linear(const LinearArgs& a, cudaStream_t stream) {
  if (a.m == 0 || a.n == 0) return cudaSuccess;
  if (a.type == Type::f32 || (a.w.bits != 4 && a.w.bits != 8)) return cudaErrorInvalidValue;
  if (a.m <= kGemvRows && !a.group_sizes) return linear_gemv(a, stream);
  if (const cudaError_t e = linear_wgmma(a, stream); e != cudaErrorNotSupported) return e;
  if (a.type == Type::bf16) return a.w.bits == 4 ? launch<bf16, 4>(a, stream) : launch<bf16, 8>(a, stream);
  return a.w.bits == 4 ? launch<f16, 4>(a, stream) : launch<f16, 8>(a, stream);
}

}  // namespace tw::cuda
