// Gradient of an additive bias: a block takes a tile of it and walks over all batch elements, heads, rows and
// keys that share it.
#include "attention_gradient.cuh"

namespace tw::cuda {
namespace {

template <int kDim_, int kKeys_>
struct BiasTiling {
  static constexpr int kDim = kDim_, kKeys = kKeys_, kRows = 64, kThreads = 128;
  static constexpr int kSharedBytes = (2 * kRows + 2 * kKeys) * kDim * 2;
  static_assert(kRows * (kKeys + 8) * 4 <= kSharedBytes, "the tile of the gradient goes there at the end");
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_grad_bias_kernel(const __grid_constant__ GradientLaunch a) {
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  extern __shared__ __align__(128) uint16_t shared[];
  uint16_t *const q_tile = shared, *const g_tile = q_tile + kRows * kDim,
                  *const k_tile = g_tile + kRows * kDim, *const v_tile = k_tile + kKeys * kDim;
  __shared__ GradientRow infos[kRows];
  const int sizes[4] = {int(a.bias_sizes[0]), int(a.bias_sizes[1]), int(a.bias_sizes[2]),
                        int(a.bias_sizes[3])};
  const int tiles_n = (sizes[3] + kKeys - 1) / kKeys, tiles_m = (sizes[2] + kRows - 1) / kRows;
  int pid = blockIdx.x;
  const int tile_n = pid % tiles_n, tile_m = pid / tiles_n % tiles_m;
  pid /= tiles_n * tiles_m;
  const int own_head = pid % sizes[1], own_batch = pid / sizes[1];
  // What the bias has one of, all of the call's are summed into.
  const auto range = [](int size, int own, int step, int all) {
    return size == 1 ? Range{0, all} : Range{own, own + step};
  };
  const Range batches = range(sizes[0], own_batch, 1, int(a.batch)),
              heads = range(sizes[1], own_head, 1, int(a.heads));
  const Range queries = range(sizes[2], tile_m * kRows, kRows, int(a.seq_q));
  const Range columns = range(sizes[3], tile_n * kKeys, kKeys, int(a.capacity));

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const KeyOrder order = key_order(a, kKeys, 0);  // tiles are of the bias's columns, wherever keys begin
  float total[kKeys / 8][4] = {};
  for (int b = batches.first; b < batches.end; ++b) {
    const Sequence s = sequence_of(a, b);
    const int rows = s.count * a.group;
    for (int h = heads.first; h < heads.end; ++h) {
      const int kv_head = h / a.group;
      const auto row_at = [&](int query) { return query * a.group + h % a.group; };
      for (int query0 = queries.first; query0 < queries.end; query0 += kRows) {
        __syncthreads();
        const auto load = [&](uint16_t* to, const Heads& x, int dim) {
          load_tile<kRows, kDim, Tile::kThreads>(to, dim, a.aligned, x.base, [&](int i) -> const uint16_t* {
            return query0 + i < s.count ? row_of(a, s, x, kv_head, row_at(query0 + i)) : nullptr;
          });
        };
        load(q_tile, a.q, int(a.head_dim));
        load(g_tile, a.grad_out, int(a.v_dim));
        if (threadIdx.x < kRows) {
          const int query = query0 + threadIdx.x;
          GradientRow& row = infos[threadIdx.x];
          row = gradient_row<true>(a, s, kv_head, row_at(min(query, s.count - 1)), rows);
          if (query >= s.count) row.seen.end = 0;
        }
        for (int column = columns.first; column < columns.end; column += kKeys) {
          const int key0 = column - s.k_begin;
          __syncthreads();
          KeyRows{a, s, kv_head}.load<kKeys, kDim, Tile::kThreads>(k_tile, v_tile, key0, {0, s.keys}, order);
          copy_async_commit();
          copy_async_wait<0>();
          __syncthreads();
          float p[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {};
          multiply_transposed<T, kDim, 1, kKeys>(p, q_tile, warp * 16, k_tile);
          multiply_transposed<T, kDim, 1, kKeys>(ds, g_tile, warp * 16, v_tile);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const GradientRow& row = infos[warp * 16 + g + half * 8];
            const auto terms = tile_terms<kKeys / 4>(a, s, row.score, key0, order, row.seen);
#pragma unroll
            for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int key = key0 + order.key(i, t, e), at = 2 * half + e;
                total[i][at] +=
                    score_gradient<true>(a, row, p[0][i][at], ds[0][i][at], key,
                                         key >= row.seen.first && key < row.seen.end, terms[2 * i + e])
                        .score;
              }
          }
        }
      }
    }
  }
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(shared);
  const int stride = order.run == 2 ? kKeys + 8 : kKeys + 1;  // lanes that write at once use different banks
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sums[(warp * 16 + g + e / 2 * 8) * stride + order.key(i, t, e % 2)] = total[i][e];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kKeys; i += Tile::kThreads) {
    const int row = tile_m * kRows + i / kKeys, column = tile_n * kKeys + i % kKeys;
    if (row >= sizes[2] || column >= sizes[3]) continue;
    float sum = 0;
    for (int m = i / kKeys; m < (sizes[2] == 1 ? kRows : i / kKeys + 1); ++m)
      for (int n = i % kKeys; n < (sizes[3] == 1 ? kKeys : i % kKeys + 1); ++n) sum += sums[m * stride + n];
    a.grad_bias[((int64_t(own_batch) * sizes[1] + own_head) * sizes[2] + row) * sizes[3] + column] = sum;
  }
}

template <class T, class Tile>
cudaError_t launch_tiling(const GradientLaunch& a, cudaStream_t stream) {
  const int64_t* n = a.bias_sizes;
  const int64_t blocks = n[0] * n[1] * ceil_div(n[2], Tile::kRows) * ceil_div(n[3], Tile::kKeys);
  return launch_shared(attention_grad_bias_kernel<T, Tile>, blocks, Tile::kThreads, Tile::kSharedBytes, a,
                       stream);
}

template <class T>
cudaError_t launch_typed(const GradientLaunch& a, cudaStream_t stream) {
  const int64_t dim = std::max(a.head_dim, a.v_dim);
  return dim <= 64    ? launch_tiling<T, BiasTiling<64, 32>>(a, stream)
         : dim <= 128 ? launch_tiling<T, BiasTiling<128, 32>>(a, stream)
                      : launch_tiling<T, BiasTiling<256, 16>>(a, stream);
}

}  // namespace

cudaError_t gradient_of_bias(const GradientLaunch& a, cudaStream_t stream) {
  return a.type == Type::bf16 ? launch_typed<bf16>(a, stream) : launch_typed<f16>(a, stream);
}

}  // namespace tw::cuda
