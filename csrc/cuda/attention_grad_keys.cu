// Gradients of k and v: a block takes 64 keys of a KV head, a warp 16 of them, and walks over all folded rows
// that see one of them. The scores are computed as k q^T, so that what a product leaves is the next one's
// operand.
#include "attention_gradient.cuh"

namespace tw::cuda {
namespace {

// Wide heads have registers for one of the two gradients.
template <int kDim_, int kRows_, bool kGeneral_, bool kOfKeys_, bool kOfValues_>
struct KeyTiling {
  static constexpr int kDim = kDim_, kRows = kRows_, kKeys = 64, kThreads = 128;
  static constexpr bool kGeneral = kGeneral_, kOfKeys = kOfKeys_, kOfValues = kOfValues_;
  static constexpr int kTileBytes = (2 * kKeys + 4 * kRows) * kDim * 2;
  static constexpr int kSharedBytes = kTileBytes + 2 * kRows * int(sizeof(GradientRow));
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_grad_keys_kernel(const __grid_constant__ GradientLaunch a) {
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  extern __shared__ __align__(128) uint16_t shared[];
  uint16_t *const k_tile = shared, *const v_tile = k_tile + kKeys * kDim,
                  *const row_tiles = v_tile + kKeys * kDim;
  auto* const infos = reinterpret_cast<GradientRow*>(reinterpret_cast<char*>(shared) + Tile::kTileBytes);

  const int slot = blockIdx.x / a.tiles;
  int b = slot / int(a.kv_heads), kv_head = slot % int(a.kv_heads), tile = blockIdx.x % a.tiles;
  if (a.packed_keys && a.k_start) {
    const PackedTile p = packed_tile(a.k_start, int(a.batch), tile, kKeys, 1);
    b = p.sequence, tile = p.tile, kv_head = slot;
  }
  const Sequence s = sequence_of(a, b);
  const int key0 = tile * kKeys, rows = s.count * a.group;
  if (key0 >= s.keys) return;
  const Range queries = seeing_queries(a, s, key0, min(key0 + kKeys, s.keys) - 1);
  const int start = queries.first * a.group / kRows * kRows, end = queries.end * a.group;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float dk[1][Tile::kOfKeys ? kDim / 8 : 1][4] = {}, dv[1][Tile::kOfValues ? kDim / 8 : 1][4] = {};
  // A lane's two keys lie side by side: the rows g and g + 8 of a warp's 16.
  const auto key_at = [](int row) { return row / 16 * 16 + row % 8 * 2 + row % 16 / 8; };
  const bool pairs = Tile::kGeneral && key_order(a, kKeys, s.k_begin).whole;
  const auto load = [&](uint16_t* to, const Heads& x, int dim) {
    load_tile<kKeys, kDim, Tile::kThreads>(to, dim, a.aligned, x.base, [&](int i) -> const uint16_t* {
      const int key = key0 + key_at(i);
      return key < s.keys ? key_of(s, x, kv_head, key) : nullptr;
    });
  };
  if (start < end) {
    load(k_tile, a.k, int(a.head_dim));
    load(v_tile, a.v, int(a.v_dim));
  }
  for (int next = start, from; (from = next - kRows) < end; next += kRows) {
    copy_async_wait<0>();
    __syncthreads();
    if (next < end) {
      const int buffer = next / kRows % 2;
      uint16_t* to = row_tiles + buffer * (2 * kRows * kDim);
      const auto load_rows_of = [&](uint16_t* tile_of, const Heads& x, int dim) {
        load_tile<kRows, kDim, Tile::kThreads>(
            tile_of, dim, a.aligned, x.base, [&](int i) -> const uint16_t* {
              return next + i < rows ? row_of(a, s, x, kv_head, next + i) : nullptr;
            });
      };
      load_rows_of(to, a.q, int(a.head_dim));
      load_rows_of(to + kRows * kDim, a.grad_out, int(a.v_dim));
      copy_async_commit();
      if (threadIdx.x < kRows)
        infos[buffer * kRows + threadIdx.x] =
            gradient_row<Tile::kGeneral>(a, s, kv_head, next + threadIdx.x, rows);
    }
    if (from < start) continue;
    const int buffer = from / kRows % 2;
    const uint16_t *q_tile = row_tiles + buffer * (2 * kRows * kDim), *g_tile = q_tile + kRows * kDim;
    float p[1][kRows / 8][4] = {}, ds[1][kRows / 8][4] = {};  // (keys, rows)
    multiply_transposed<T, kDim, 1, kRows>(p, k_tile, warp * 16, q_tile);
    if constexpr (Tile::kOfKeys) multiply_transposed<T, kDim, 1, kRows>(ds, v_tile, warp * 16, g_tile);
    const int first_key = key0 + warp * 16 + 2 * g;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const GradientRow& row = infos[buffer * kRows + i * 8 + 2 * t + column];
        KeyTerms<2> terms;
        if constexpr (Tile::kGeneral) terms.read<2>(a, s, row.score, 0, first_key, pairs, row.seen);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = first_key + half, e = 2 * half + column;
          const ScoreGradient x = score_gradient<Tile::kGeneral>(
              a, row, p[0][i][e], ds[0][i][e], key, key >= row.seen.first && key < row.seen.end, terms[half]);
          p[0][i][e] = x.weight, ds[0][i][e] = x.product;
        }
      }
    if constexpr (Tile::kOfValues) multiply<T, kDim, false, 1, kRows>(dv, p, g_tile);
    if constexpr (Tile::kOfKeys) multiply<T, kDim, false, 1, kRows>(dk, ds, q_tile);
  }

  // Only this warp reads its rows of k.
  const auto store = [&](const auto& c, float factor, const Heads& x, int dim) {
    const float factors[2] = {factor, factor};
    store_rows<T, kDim>(c, factors, k_tile, warp * 16, dim, a.aligned_out, [&](int i) {
      const int key = key0 + warp * 16 + key_at(i);
      return key < s.keys ? key_of(s, x, kv_head, key) : nullptr;
    });
  };
  if constexpr (Tile::kOfKeys) store(dk[0], a.scale, a.grad_k, int(a.head_dim));
  if constexpr (Tile::kOfKeys && Tile::kOfValues) __syncwarp();
  if constexpr (Tile::kOfValues) store(dv[0], 1.0f, a.grad_v, int(a.v_dim));
}

template <class T, class Tile>
cudaError_t launch_tiling(GradientLaunch a, cudaStream_t stream) {
  const bool packed = a.packed_keys && a.k_start;
  a.tiles = int(packed ? a.capacity / Tile::kKeys + a.batch : ceil_div(a.capacity, Tile::kKeys));
  return launch_shared(attention_grad_keys_kernel<T, Tile>,
                       int64_t(a.tiles) * a.kv_heads * (packed ? 1 : a.batch), Tile::kThreads,
                       Tile::kSharedBytes, a, stream);
}

template <class T, bool kGeneral>
cudaError_t launch_typed(const GradientLaunch& a, cudaStream_t stream) {
  const int64_t dim = std::max(a.head_dim, a.v_dim);
  if (dim <= 64) return launch_tiling<T, KeyTiling<64, 32, kGeneral, true, true>>(a, stream);
  if (dim <= 128) return launch_tiling<T, KeyTiling<128, 32, kGeneral, true, true>>(a, stream);
  if (const cudaError_t e = launch_tiling<T, KeyTiling<256, 16, kGeneral, true, false>>(a, stream)) return e;
  return launch_tiling<T, KeyTiling<256, 16, kGeneral, false, true>>(a, stream);
}

}  // namespace

cudaError_t gradient_of_keys(const GradientLaunch& a, cudaStream_t stream) {
  if (is_general(a))
    return a.type == Type::bf16 ? launch_typed<bf16, true>(a, stream) : launch_typed<f16, true>(a, stream);
  return a.type == Type::bf16 ? launch_typed<bf16, false>(a, stream) : launch_typed<f16, false>(a, stream);
}

}  // namespace tw::cuda
