// Integer activations: one kernel quantises x, the other multiplies codes by codes on tensor cores. Per
// output one accumulator, acc = fma(float(dot), s_w * s_x, acc) over 32 columns (16 where a group has no
// more) in ascending order and the offset as a second fma, as the CPU kernels do it, so that a row's bits
// depend on that row alone. Where a row of x and a row of w have one scale each, integers are summed over all
// of K instead.
//
// As in linear_gemm.cu, lane q of 4 takes 8 consecutive columns q * 8 of 32.
#include "linear_shape.h"
#include "linear_tile.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace tw::cuda {
namespace {

constexpr int kColumns = 128;  // of a step
constexpr int kBlocks = kColumns / 32;
constexpr int kStages = 3;

// --- x ---

// Quantised x, in the workspace. Columns are padded to whole steps, with zeros.
struct QuantisedX {
  int8_t* codes;  // (m, padded)
  float* scales;  // (steps, m, kBlocks): what a tile reads of a step lies together
  int32_t* sums;  // [part](steps, m, kBlocks): of 32 codes, or of both halves of 16
  int padded, blocks, parts;
  bool row_sums;  // block 0 has the sum of the row instead
};
__host__ __device__ QuantisedX quantised_x(void* workspace, int64_t m, int64_t k, int parts, bool row_sums) {
  QuantisedX x;
  x.padded = static_cast<int>((k + kColumns - 1) / kColumns * kColumns);
  x.blocks = x.padded / 32;
  x.codes = static_cast<int8_t*>(workspace);
  x.scales = reinterpret_cast<float*>(x.codes + m * x.padded);
  x.sums = reinterpret_cast<int32_t*>(x.scales + m * x.blocks);
  x.parts = parts, x.row_sums = row_sums;
  return x;
}

__device__ float size_of_number(float x) {  // |x|, infinity for NaN
  const float size = fabsf(x);
  return size < __int_as_float(0x7f800000) ? size : __int_as_float(0x7f800000);
}

// A warp takes 256 columns at once, 8 a lane. PER_TOKEN: a block takes a row.
template <class T, bool PER_TOKEN>
__global__ void __launch_bounds__(256)
    quantise_kernel(const T* x, int64_t x_stride, uint32_t m, int k, QuantisedX q) {
  __shared__ float tops[8];
  __shared__ int totals[8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stretches = (q.padded + 255) / 256;
  const uint32_t index = blockIdx.x * 8 + warp;
  const uint32_t row = PER_TOKEN ? blockIdx.x : index / stretches;
  if (!PER_TOKEN && row >= m) return;
  const int begin = PER_TOKEN ? warp : index - row * stretches, end = PER_TOKEN ? stretches : begin + 1;
  const T* from = x + row * x_stride;
  const bool whole = x_stride * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const auto load = [&](int at, float (&v)[8]) {
    if (whole && at + 8 <= k) {
      constexpr int kVec = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < 8; i += kVec)
        load_floats<kVec>(from + at + i, reinterpret_cast<float (&)[kVec]>(v[i]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = at + i < k ? to_float(from[at + i]) : 0.0f;
    }
  };
  const auto largest = [&](const float (&v)[8]) {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, size_of_number(v[i]));
    return top;
  };
  float v[8], top = 0.0f;
  if constexpr (PER_TOKEN) {
    for (int s = begin; s < end; s += 8) {
      load(s * 256 + lane * 8, v);
      top = fmaxf(top, largest(v));
    }
    top = block_reduce<256>(top, tops, Max{});
  }
  int total = 0;
  for (int s = begin; s < end; s += 8) {
    const int at = s * 256 + lane * 8;
    load(at, v);
    if constexpr (!PER_TOKEN) top = warp_reduce<4>(largest(v), Max{});
    const bool good = top < __int_as_float(0x7f800000);
    const float scale = __fdiv_rn(top, 127.0f);
    Vec<int8_t, 8> codes;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float ratio = good && scale > 0.0f ? __fdiv_rn(v[i], scale) : 0.0f;
      codes.v[i] = static_cast<int8_t>(fminf(fmaxf(rintf(ratio), -127.0f), 127.0f));
      sum += codes.v[i];
    }
    sum = warp_reduce<2>(sum, Sum{});
    const int other = __shfl_xor_sync(kAllLanes, sum, 2);
    if (at >= q.padded) continue;
    *reinterpret_cast<Vec<int8_t, 8>*>(q.codes + int64_t{row} * q.padded + at) = codes;
    const int64_t place = (int64_t{at / kColumns} * m + row) * kBlocks + at / 32 % kBlocks;
    if (lane % 4 == 0) {
      q.scales[place] = good ? scale : __int_as_float(0x7fc00000);
      total += sum + other;
      if (!q.row_sums) q.sums[place] = q.parts == 2 ? sum : sum + other;
    } else if (lane % 4 == 2 && q.parts == 2 && !q.row_sums) {
      q.sums[int64_t{m} * q.blocks + place] = sum;
    }
  }
  if constexpr (PER_TOKEN) {
    if (q.row_sums) {
      total = block_reduce<256>(total, totals, Sum{});
      if (threadIdx.x == 0) q.sums[int64_t{row} * kBlocks] = total;
    }
  }
}

// --- the product ---

template <class S, int BITS>
struct Layout {
  static constexpr int kCodeBytes = kColumns * BITS / 8;  // of a row of w
  static constexpr int kXBytes = S::BM * kColumns, kWBytes = S::BN * kCodeBytes,
                       kScaleBytes = S::BM * kBlocks * 4;
  static constexpr int kScaleRow = S::BN + 8;  // as in linear_gemm.cu

  // Stages of x, w, scales of x and, with an offset, sums; then scales and offsets of w for two steps.
  __host__ __device__ static int stage(int parts, bool offset) {
    return kXBytes + kWBytes + kScaleBytes * (offset ? 1 + parts : 1);
  }
  static int bytes(int parts, bool offset) {
    return kStages * stage(parts, offset) + 2 * kBlocks * parts * kScaleRow * int{sizeof(float2)};
  }
};

// Bytes of x minus those of y, each by itself.
__device__ uint32_t subtract_bytes(uint32_t x, uint32_t y) {
  constexpr uint32_t kHigh = 0x80808080u;
  return ((x | kHigh) - (y & ~kHigh)) ^ ((x ^ ~y) & kHigh);
}

// ROW: one scale a row of x and of w.
template <int BITS, class S, bool ROW>
__global__ void __launch_bounds__(S::kThreads, 1)
    integer_kernel(const __grid_constant__ LinearArgs a, const __grid_constant__ QuantisedX x, int tiles_m,
                   int tiles_n) {
  using L = Layout<S, BITS>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int parts = x.parts;
  const bool offset = a.w.offset != Offset::none && !ROW;
  const int stage_bytes = L::stage(parts, offset);
  float2* const scales = reinterpret_cast<float2*>(shared + kStages * stage_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, eighth = lane / 4, q = lane % 4;
  const int warp_n = warp % S::kWarpsN, warp_m = warp / S::kWarpsN;
  const Tile tile = tile_of(blockIdx.x, tiles_m, tiles_n);
  const TileRows rows = rows_of_tile<S::BM>(a, tile.m);
  if (rows.first >= rows.end) return;
  const int first_n = tile.n * S::BN;
  const int64_t weight_rows = int64_t{a.n} * a.experts;
  const int steps = x.padded / kColumns;
  const uint32_t middle = static_cast<uint32_t>(a.w.middle) * 0x01010101u;

  const auto fetch = [&](int step) {
    uint8_t* const stage = shared + step % kStages * stage_bytes;
#pragma unroll
    for (int i = threadIdx.x; i < S::BM * 8; i += S::kThreads) {
      const int row = i / 8, piece = i % 8, m = min(rows.first + row, rows.end - 1);
      const int8_t* from = x.codes + int64_t{m} * x.padded + step * kColumns + piece * 16;
      copy_async_16(stage + row * 128 + (piece ^ (row % 4 * 2)) * 16, from);
    }
    constexpr int kPieces = L::kCodeBytes / 16;
#pragma unroll
    for (int i = threadIdx.x; i < S::BN * kPieces; i += S::kThreads) {
      const int row = i / kPieces, piece = i % kPieces, n = min(first_n + row, a.n - 1);
      const int swapped = piece ^ (BITS == 8 ? row % 4 * 2 : row / 2 % 2 * 2);
      const int64_t at = step * L::kCodeBytes + piece * 16;  // columns are padded to 64 only
      const bool inside = at < a.w.code_stride;
      copy_async_16(stage + L::kXBytes + row * L::kCodeBytes + swapped * 16,
                    a.w.codes + (rows.weight + n) * a.w.code_stride + (inside ? at : 0), inside ? 16 : 0);
    }
    if constexpr (!ROW) {
      for (int i = threadIdx.x; i < S::BM * (offset ? 1 + parts : 1); i += S::kThreads) {
        const int what = i / S::BM, row = i % S::BM, m = min(rows.first + row, rows.end - 1);
        const int64_t at = (int64_t{step} * a.m + m) * kBlocks;
        const void* from = what == 0 ? static_cast<const void*>(x.scales + at)
                                     : x.sums + int64_t{what - 1} * a.m * x.blocks + at;
        copy_async_16(stage + L::kXBytes + L::kWBytes + i * 16, from);
      }
    }
  };
  constexpr int kMine = (S::BN * kBlocks * 2 + S::kThreads - 1) / S::kThreads;
  float2 coming[kMine];
  const auto fetch_scales = [&](int step) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * S::kThreads, part = i / S::BN, n = first_n + i % S::BN;
      if (part >= kBlocks * parts) break;
      const int column = step * kColumns + part * (32 / parts);
      coming[j] = {0.0f, 0.0f};
      if (n < a.n && column < a.k) coming[j] = scale_at(a.w, weight_rows, rows.weight + n, column);
      if (a.w.offset == Offset::zero)
        coming[j].y = __int_as_float(a.w.middle - static_cast<int>(coming[j].y));
    }
  };
  const auto store_scales = [&](int step) {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = threadIdx.x + j * S::kThreads, part = i / S::BN;
      if (part < kBlocks * parts)
        scales[(step % 2 * kBlocks * parts + part) * L::kScaleRow + i % S::BN] = coming[j];
    }
  };

  float acc[S::MI][S::NI][4] = {};
  int32_t sums[ROW ? S::MI : 1][ROW ? S::NI : 1][4] = {};
  const auto multiply = [&](int step, int block) {
    const uint8_t* const stage = shared + step % kStages * stage_bytes;
    const float* const x_scales = reinterpret_cast<const float*>(stage + L::kXBytes + L::kWBytes);
    const int32_t* const x_sums = reinterpret_cast<const int32_t*>(x_scales + S::BM * kBlocks);
    uint32_t xs[S::MI][4];
    float x_scale[S::MI][2];
#pragma unroll
    for (int mi = 0; mi < S::MI; ++mi)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = (warp_m * S::MI + mi) * 16 + below * 8 + eighth;
        const uint2 raw =
            *reinterpret_cast<const uint2*>(stage + row * 128 + (block ^ (row % 4)) * 32 + q * 8);
        xs[mi][below] = raw.x, xs[mi][2 + below] = raw.y;
        if constexpr (!ROW) x_scale[mi][below] = x_scales[row * kBlocks + block];
      }
#pragma unroll
    for (int ni = 0; ni < S::NI; ++ni) {
      const int row = (warp_n * S::NI + ni) * 8 + eighth;
      const uint8_t* codes = stage + L::kXBytes + row * L::kCodeBytes + q * 8;
      codes += BITS == 8 ? (block ^ (row % 4)) * 32 : (block / 2 ^ (row / 2 % 2)) * 32;
      uint2 w = *reinterpret_cast<const uint2*>(codes);
      if (BITS == 4) {
        w.x = w.x >> (block % 2 * 4) & 0x0f0f0f0fu;
        w.y = w.y >> (block % 2 * 4) & 0x0f0f0f0fu;
      }
      w.x = subtract_bytes(w.x, middle), w.y = subtract_bytes(w.y, middle);
      if constexpr (ROW) {
#pragma unroll
        for (int mi = 0; mi < S::MI; ++mi) mma_s8(sums[mi][ni], xs[mi], w.x, w.y);
      } else {
#pragma unroll 1
        for (int part = 0; part < parts; ++part) {
          const bool mine = parts == 1 || q / 2 == part;  // 16 columns lie with two of 4 lanes
          const uint32_t low = mine ? w.x : 0, high = mine ? w.y : 0;
          const float4 s = *reinterpret_cast<const float4*>(
              &scales[((step % 2 * kBlocks + block) * parts + part) * L::kScaleRow +
                      (warp_n * S::NI + ni) * 8 + q * 2]);
          const float scale[2] = {s.x, s.z}, other[2] = {s.y, s.w};
#pragma unroll
          for (int mi = 0; mi < S::MI; ++mi) {
            // A whole number below 2^22 added to the bits of 1.5 * 2^23 is that float plus the number.
            constexpr int32_t kMagic = 0x4b400000;
            int32_t dot[4] = {kMagic, kMagic, kMagic, kMagic};
            mma_s8(dot, xs[mi], low, high);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int below = i / 2;
              int32_t sum = 0;
              if (offset)
                sum = x_sums[(part * S::BM + (warp_m * S::MI + mi) * 16 + below * 8 + eighth) * kBlocks +
                             block];
              if (a.w.offset == Offset::zero) dot[i] += sum * __float_as_int(other[i % 2]);
              if (a.w.offset == Offset::min) dot[i] += sum * a.w.middle;
              const float whole = __int_as_float(dot[i]) - 12582912.0f;
              acc[mi][ni][i] = fmaf(whole, __fmul_rn(scale[i % 2], x_scale[mi][below]), acc[mi][ni][i]);
              if (a.w.offset == Offset::min)
                acc[mi][ni][i] =
                    fmaf(__fmul_rn(float(sum), x_scale[mi][below]), other[i % 2], acc[mi][ni][i]);
            }
          }
        }
      }
    }
  };

  if constexpr (!ROW) {
    fetch_scales(0);
    store_scales(0);
    fetch_scales(1);
  }
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if constexpr (!ROW) {
      store_scales(step + 1);
      fetch_scales(step + 2);
    }
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    copy_async_commit();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) multiply(step, block);
  }

#pragma unroll
  for (int mi = 0; mi < S::MI; ++mi) {
    const int first_row = rows.first + (warp_m * S::MI + mi) * 16 + eighth;
    const int first_column = first_n + warp_n * S::NI * 8;
    if constexpr (ROW) {
#pragma unroll
      for (int ni = 0; ni < S::NI; ++ni)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int row = first_row + below * 8, column = first_column + ni * 8 + q * 2;
          if (row >= rows.end) continue;
          const float scale = x.scales[int64_t{row} * kBlocks];
          const int32_t sum = a.w.offset == Offset::none ? 0 : x.sums[int64_t{row} * kBlocks];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (column + i >= a.n) continue;
            const float2 s = scale_at(a.w, weight_rows, rows.weight + column + i, 0);
            int32_t dot = sums[mi][ni][below * 2 + i];
            if (a.w.offset == Offset::zero) dot += sum * (a.w.middle - static_cast<int>(s.y));
            float y = float(dot) * __fmul_rn(s.x, scale);
            if (a.w.offset == Offset::min)
              y = fmaf(__fmul_rn(float(sum), scale), s.y,
                       float(dot + sum * a.w.middle) * __fmul_rn(s.x, scale));
            acc[mi][ni][below * 2 + i] = y;
          }
        }
    }
    store_product(a, rows, first_row, first_column, acc[mi]);
  }
}

template <int BITS, class S, bool ROW>
cudaError_t launch_shape(const LinearArgs& a, const QuantisedX& x, cudaStream_t stream) {
  const int bytes = Layout<S, BITS>::bytes(x.parts, a.w.offset != Offset::none && !ROW);
  const auto kernel = integer_kernel<BITS, S, ROW>;
  if (bytes > 48 << 10) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return e;
  }
  const int64_t tiles_m = ceil_div(a.m, S::BM) + (a.group_sizes ? a.experts : 0),
                tiles_n = ceil_div(a.n, S::BN);
  kernel<<<static_cast<unsigned>(tiles_m * tiles_n), S::kThreads, bytes, stream>>>(
      a, x, static_cast<int>(tiles_m), static_cast<int>(tiles_n));
  return cudaGetLastError();
}

template <int BITS, bool ROW>
cudaError_t launch(const LinearArgs& a, const QuantisedX& x, cudaStream_t stream) {
  const int64_t rows = a.group_sizes ? ceil_div(a.m, a.experts) : a.m;
  if (rows <= 16) return launch_shape<BITS, Shape<16, 32, 1, 4>, ROW>(a, x, stream);
  if (rows <= 32) return launch_shape<BITS, Shape<32, 64, 1, 4>, ROW>(a, x, stream);
  if (rows <= 64 || x.parts == 2) return launch_shape<BITS, Shape<64, 64, 2, 2>, ROW>(a, x, stream);
  return launch_shape<BITS, Shape<128, 64, 4, 2>, ROW>(a, x, stream);
}

}  // namespace

int64_t integer_linear_workspace_bytes(int64_t m, int64_t k) {
  const int64_t padded = ceil_div(k, kColumns) * kColumns;
  return m * (padded + padded / 32 * 3 * 4);
}

cudaError_t integer_linear(const IntegerLinearArgs& args, cudaStream_t stream) {
  const LinearArgs& a = args.linear;
  if (a.m == 0 || a.n == 0) return cudaSuccess;
  if (a.w.bits != 4 && a.w.bits != 8) return cudaErrorInvalidValue;
  // 127 * 255 a column fit an int32 up to here.
  const bool row = args.per_token && a.w.group == 0 && a.k <= 1 << 16;
  const QuantisedX x = quantised_x(args.workspace, a.m, a.k, a.w.group == 16 ? 2 : 1, row);
  const cudaError_t e = with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(a.x);
    const auto m = static_cast<uint32_t>(a.m);
    if (args.per_token)
      quantise_kernel<T, true><<<m, 256, 0, stream>>>(from, a.x_stride, m, a.k, x);
    else
      quantise_kernel<T, false>
          <<<static_cast<unsigned>(ceil_div(int64_t{m} * ceil_div(x.padded, 256), 8)), 256, 0, stream>>>(
              from, a.x_stride, m, a.k, x);
    return cudaGetLastError();
  });
  if (e != cudaSuccess) return e;
  if (a.w.bits == 4) return row ? launch<4, true>(a, x, stream) : launch<4, false>(a, x, stream);
  return row ? launch<8, true>(a, x, stream) : launch<8, false>(a, x, stream);
}

}  // namespace tw::cuda
