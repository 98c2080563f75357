// Gradient of q, and each row's part of the slopes': a block takes 64 folded rows of a KV head, a warp 16 of
// them, and walks over the keys that they see.
#include "attention_gradient.cuh"

namespace tw::cuda {
namespace {

template <int kDim_, int kKeys_, bool kGeneral_>
struct RowTiling {
  static constexpr int kDim = kDim_, kKeys = kKeys_, kRows = 64, kThreads = 128;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kSharedBytes = (2 * kRows + 4 * kKeys) * kDim * 2;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_grad_rows_kernel(const __grid_constant__ GradientLaunch a) {
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  extern __shared__ __align__(128) uint16_t shared[];
  uint16_t *const q_tile = shared, *const g_tile = q_tile + kRows * kDim,
                  *const kv_tiles = g_tile + kRows * kDim;

  const int slot = blockIdx.x / a.tiles, reversed = a.tiles - 1 - blockIdx.x % a.tiles;
  int b = slot / int(a.kv_heads), kv_head = slot % int(a.kv_heads), tile = reversed;
  if (a.q_start) {
    const PackedTile p = packed_tile(a.q_start, int(a.batch), reversed, kRows, a.group);
    b = p.sequence, tile = p.tile, kv_head = slot;
  }
  const Sequence s = sequence_of(a, b);
  const int row0 = tile * kRows, rows = s.count * a.group;
  if (row0 >= rows) return;
  const Range range = {visible_keys(a, s, folded(a, 0, row0).query).first,
                       visible_keys(a, s, folded(a, 0, min(row0 + kRows, rows) - 1).query).end};
  const int start = range.first / kKeys * kKeys;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  GradientRow own[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    own[half] = gradient_row<Tile::kGeneral>(a, s, kv_head, row0 + warp * 16 + half * 8 + g, rows);

  float dq[1][kDim / 8][4] = {}, slope[2] = {};
  KeyRows keys{a, s, kv_head};
  KeyOrder order;
  if constexpr (Tile::kGeneral) order = key_order(a, kKeys, s.k_begin);
  if (start < range.end) {
    const auto load = [&](uint16_t* to, const Heads& x, int dim) {
      load_tile<kRows, kDim, Tile::kThreads>(to, dim, a.aligned, x.base, [&](int i) -> const uint16_t* {
        return row0 + i < rows ? row_of(a, s, x, kv_head, row0 + i) : nullptr;
      });
    };
    load(q_tile, a.q, int(a.head_dim));
    load(g_tile, a.grad_out, int(a.v_dim));
  }
  for (int next = start, from; (from = next - kKeys) < range.end; next += kKeys) {
    copy_async_wait<0>();
    __syncthreads();
    if (next < range.end) {
      uint16_t* to = kv_tiles + next / kKeys % 2 * (2 * kKeys * kDim);
      keys.load<kKeys, kDim, Tile::kThreads>(to, to + kKeys * kDim, next, range, order);
      copy_async_commit();
    }
    if (from < start) continue;
    const uint16_t *k_tile = kv_tiles + from / kKeys % 2 * (2 * kKeys * kDim),
                   *v_tile = k_tile + kKeys * kDim;
    float p[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {};
    multiply_transposed<T, kDim, 1, kKeys>(p, q_tile, warp * 16, k_tile);
    multiply_transposed<T, kDim, 1, kKeys>(ds, g_tile, warp * 16, v_tile);
    KeyTerms<kKeys / 4> terms[2];
    if constexpr (Tile::kGeneral) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        terms[half] = tile_terms<kKeys / 4>(a, s, own[half].score, from, order, own[half].seen);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const GradientRow& row = own[e / 2];
        const int key = from + order.key(i, t, e % 2);
        const ScoreGradient x = score_gradient<Tile::kGeneral>(a, row, p[0][i][e], ds[0][i][e], key,
                                                               key >= row.seen.first && key < row.seen.end,
                                                               terms[e / 2][2 * i + e % 2]);
        ds[0][i][e] = x.product;
        if constexpr (Tile::kGeneral) {
          if (a.slopes) slope[e / 2] -= x.score * fabsf(float(key - row.score.diagonal));
          p[0][i][e] = x.weight == 0.0f && x.product == 0.0f ? -kInfinity : 0.0f;
        }
      }
    uint32_t attended = 0xffffffff;
    if constexpr (Tile::kGeneral) attended = attended_columns(p);
    multiply<T, kDim, Tile::kGeneral, 1, kKeys>(dq, ds, k_tile, attended);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (!Tile::kGeneral) break;
    float total = slope[half];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    const int row = row0 + warp * 16 + half * 8 + g;
    const Folded f = folded(a, kv_head, min(row, rows - 1));
    if (a.slopes && t == 0 && row < rows) a.slopes[lse_index(a, s, f.head, f.query)] = total;
  }
  const float factor = s.known ? a.scale : __int_as_float(0x7fffffff), factors[2] = {factor, factor};
  // Only this warp reads its rows of q.
  store_rows<T, kDim>(dq[0], factors, q_tile, warp * 16, int(a.head_dim), a.aligned_out, [&](int i) {
    const int row = row0 + warp * 16 + i;
    return row < rows ? row_of(a, s, a.grad_q, kv_head, row) : nullptr;
  });
}

template <class T, class Tile>
cudaError_t launch_tiling(GradientLaunch a, cudaStream_t stream) {
  const int64_t rows = a.seq_q * a.group;
  a.tiles = int(a.q_start ? rows / Tile::kRows + a.batch : ceil_div(rows, Tile::kRows));
  return launch_shared(attention_grad_rows_kernel<T, Tile>,
                       int64_t(a.tiles) * a.kv_heads * (a.q_start ? 1 : a.batch), Tile::kThreads,
                       Tile::kSharedBytes, a, stream);
}

template <class T, bool kGeneral>
cudaError_t launch_typed(const GradientLaunch& a, cudaStream_t stream) {
  const int64_t dim = std::max(a.head_dim, a.v_dim);
  return dim <= 64    ? launch_tiling<T, RowTiling<64, 64, kGeneral>>(a, stream)
         : dim <= 128 ? launch_tiling<T, RowTiling<128, 32, kGeneral>>(a, stream)
                      : launch_tiling<T, RowTiling<256, 16, kGeneral>>(a, stream);
}

}  // namespace

cudaError_t gradient_of_queries(const GradientLaunch& a, cudaStream_t stream) {
  if (is_general(a))
    return a.type == Type::bf16 ? launch_typed<bf16, true>(a, stream) : launch_typed<f16, true>(a, stream);
  return a.type == Type::bf16 ? launch_typed<bf16, false>(a, stream) : launch_typed<f16, false>(a, stream);
}

}  // namespace tw::cuda
