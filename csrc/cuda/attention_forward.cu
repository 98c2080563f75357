// Attention forward with keys and values tile by tile: out = softmax(scores) v without storing the scores
// (Milakov & Gimelshein, https://arxiv.org/abs/1805.02867; Dao, https://arxiv.org/abs/2307.08691).
//
// A block takes a tile of the folded rows of a KV head, a warp 16 or 32 of them; q stays in shared memory,
// tiles of k and v arrive by cp.async while the tile before is at work, with one barrier a tile. Tiles that
// every row sees whole are not masked. 4 * rows * keys * dim operations decide; few blocks split the keys
// between them.
#include <algorithm>

#include "attention_tiles.cuh"

namespace tw::cuda {
namespace {

// How a head_dim up to kDim is tiled: 16 * kRowTiles rows for each of kWarps warps, and kKeys keys.
template <int kDim_, int kRowTiles_, int kKeys_, bool kGeneral_>
struct Tiling {
  static constexpr int kDim = kDim_, kRowTiles = kRowTiles_, kKeys = kKeys_, kWarps = 4;
  static constexpr bool kGeneral = kGeneral_;  // more than scale, causality and window
  static constexpr int kRows = 16 * kRowTiles * kWarps, kThreads = 32 * kWarps;
  static constexpr int kSharedBytes = (kRows + 4 * kKeys) * kDim * 2;
  static constexpr int kBlocks = kGeneral ? 2 : 1;  // with 3 on a multiprocessor a general one spills
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attention_tiles_kernel(const __grid_constant__ AttentionLaunch a) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys, kM = Tile::kRowTiles, kRows = Tile::kRows;
  extern __shared__ __align__(128) uint16_t shared[];
  uint16_t *const q_tile = shared, *const kv_tiles = shared + kRows * kDim;

  int pid = blockIdx.x, b, tile;
  const int split = pid % a.splits;
  pid /= a.splits;
  const int slot = pid / a.tiles, reversed = a.tiles - 1 - pid % a.tiles;  // the last rows see the most keys
  int kv_head = slot;
  if (a.q_start) {
    const PackedTile p = packed_tile(a.q_start, int(a.batch), reversed, kRows, a.group);
    b = p.sequence, tile = p.tile;
  } else {
    b = slot / int(a.kv_heads), kv_head = slot % int(a.kv_heads), tile = reversed;
  }
  const Sequence s = sequence_of(a, b);
  const int row0 = tile * kRows, rows = s.count * a.group;
  if (row0 >= rows) return;
  const int low = folded(a, 0, row0).query, high = folded(a, 0, min(row0 + kRows, rows) - 1).query;
  Range range = {visible_keys(a, s, low).first, visible_keys(a, s, high).end};
  const Range whole = {visible_keys(a, s, high).first, visible_keys(a, s, low).end};
  if (a.splits > 1) range = {max(range.first, split * a.chunk), min(range.end, (split + 1) * a.chunk)};
  const int start = range.first / kKeys * kKeys;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp * 16 * kM;
  const auto row_of = [&](int m, int half) { return row0 + warp_row + m * 16 + half * 8 + g; };
  ScoreRow score[kM][2];
  if constexpr (Tile::kGeneral) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Folded f = folded(a, kv_head, min(row_of(m, half), rows - 1));
        score[m][half] = score_row(a, s, f.head, f.query);
      }
  }
  // What one unit of a score is worth: general scores are natural logits, because a bias near fp32's end
  // times log2(e) would overflow.
  const float unit = Tile::kGeneral ? kLog2e : a.scale * kLog2e;
  const float limit = drop_limit(a);

  float out[kM][kDim / 8][4] = {}, top[kM][2], sum[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) top[m][0] = top[m][1] = -kInfinity;

  KeyRows keys{a, s, kv_head};
  KeyOrder order;
  if constexpr (Tile::kGeneral) order = key_order(a, kKeys, s.k_begin);
  if (start < range.end)
    load_tile<kRows, kDim, Tile::kThreads>(q_tile, int(a.head_dim), a.aligned, a.q.base, [&](int i) {
      const Folded f = folded(a, kv_head, min(row0 + i, rows - 1));
      return static_cast<const uint16_t*>(a.q.base) + s.q_outer * a.q.batch + f.head * a.q.head +
             int64_t(s.q_first + f.query) * a.q.token;
    });
  for (int next = start, from; (from = next - kKeys) < range.end; next += kKeys) {
    copy_async_wait<0>();
    __syncthreads();
    // Two pairs of tiles in turn: what this overwrites, all warps have left behind before the barrier.
    if (next < range.end) {
      uint16_t* to = kv_tiles + (next / kKeys) % 2 * (2 * kKeys * kDim);
      keys.load<kKeys, kDim, Tile::kThreads>(to, to + kKeys * kDim, next, range, order);
      copy_async_commit();
    }
    if (from < start) continue;
    const uint16_t* k_tile = kv_tiles + (from / kKeys) % 2 * (2 * kKeys * kDim);
    float p[kM][kKeys / 8][4] = {};
    multiply_transposed<T, kDim, kM, kKeys>(p, q_tile, warp_row, k_tile);

    const bool checked =
        from < whole.first || from + kKeys > min(whole.end, range.end) || row0 + kRows > rows;
    if (Tile::kGeneral || checked) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row_of(m, half);
          Range seen = visible_keys(a, s, folded(a, 0, min(row, rows - 1)).query);
          seen = {max(seen.first, range.first), row < rows ? min(seen.end, range.end) : 0};
          KeyTerms<kKeys / 4> terms;
          if constexpr (Tile::kGeneral)
            terms = tile_terms<kKeys / 4>(a, s, score[m][half], from, order, seen);
#pragma unroll
          for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int key = from + order.key(i, t, e);
              float& x = p[m][i][2 * half + e];
              const bool sees = key >= seen.first && key < seen.end;
              if constexpr (Tile::kGeneral) {
                float slant;
                if (sees) x = general_score(a, score[m][half], x, key, terms[2 * i + e], slant);
              }
              if (!sees) x = -kInfinity;
            }
        }
    }
    uint32_t attended = 0xffffffff;
    if constexpr (Tile::kGeneral) attended = attended_columns(p);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto drop = [&](float& weight, int i, int e) {
          if constexpr (Tile::kGeneral)
            if (a.keep < 1.0f && !is_kept(score[m][half], limit, from + order.key(i, t, e % 2)))
              weight = 0.0f;
        };
        const float shrink = soften<Tile::kGeneral>(p[m], half, unit, top[m][half], sum[m][half], drop);
        if (__any_sync(0xffffffff, shrink != 1.0f)) {  // after the first tiles, rarely
#pragma unroll
          for (int i = 0; i < kDim / 8; ++i) out[m][i][2 * half] *= shrink, out[m][i][2 * half + 1] *= shrink;
        }
      }
    multiply<T, kDim, Tile::kGeneral, kM, kKeys>(out, p, k_tile + kKeys * kDim, attended);
  }

  bool bad = !s.known;
  if (a.block_table) bad |= __syncthreads_or(keys.bad);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[m][half];
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      if (bad) total = __int_as_float(0x7fffffff);
      float natural = Tile::kGeneral ? top[m][half] : top[m][half] * a.scale;
      const int row = row_of(m, half);
      if (a.splits > 1) {
        if (row < rows && range.first < range.end) {
          const int64_t at = (int64_t(slot) * a.splits + split) * rows + row;
          if (t == 0) a.stats[at] = {natural, total};
          float* partial = a.partials + at * a.v_dim;
#pragma unroll
          for (int i = 0; i < kDim / 8; ++i) {
            const int column = i * 8 + 2 * t;
            const float2 x = {out[m][i][2 * half], out[m][i][2 * half + 1]};
            if (a.v_dim % 2 == 0) {
              if (column < a.v_dim) *reinterpret_cast<float2*>(partial + column) = x;
            } else {
              if (column < a.v_dim) partial[column] = x.x;
              if (column + 1 < a.v_dim) partial[column + 1] = x.y;
            }
          }
        }
        continue;
      }
      const Folded f = folded(a, kv_head, min(row, rows - 1));
      float shrink = 1.0f;
      if (a.sinks) join_sink(a.sinks[f.head], natural, total, shrink);
      factor[half] = end_factor(a, total) * shrink;
      if (a.lse && t == 0 && row < rows) a.lse[lse_index(a, s, f.head, f.query)] = log_sum(natural, total);
    }
    if (a.splits > 1) continue;
    // Only this warp reads its rows of q.
    store_rows<T, kDim>(out[m], factor, q_tile, warp_row + m * 16, int(a.v_dim), a.aligned_out, [&](int i) {
      const int row = row0 + warp_row + m * 16 + i;
      const Folded f = folded(a, kv_head, min(row, rows - 1));
      uint16_t* to = static_cast<uint16_t*>(a.out.base) + s.q_outer * a.out.batch + f.head * a.out.head +
                     int64_t(s.q_first + f.query) * a.out.token;
      return row < rows ? to : nullptr;
    });
  }
}

template <class T, class Tile>
cudaError_t launch_tiles(AttentionLaunch a, cudaStream_t stream) {
  const int64_t rows = a.seq_q * a.group;
  a.tiles = int(a.q_start ? rows / Tile::kRows + a.batch : ceil_div(rows, Tile::kRows));
  const int64_t blocks = int64_t(a.tiles) * a.kv_heads * (a.q_start ? 1 : a.batch) * a.splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = attention_tiles_kernel<T, Tile>;
  if (const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes))
    return e;
  kernel<<<unsigned(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(a);
  if (const cudaError_t e = cudaGetLastError()) return e;
  return a.splits > 1 ? attention_merge(a, stream) : cudaSuccess;
}

template <class T>
cudaError_t launch_typed(const AttentionLaunch& a, cudaStream_t stream) {
  const int64_t dim = std::max(a.head_dim, a.v_dim);
  const auto with = [&](auto tile) { return launch_tiles<T, decltype(tile)>(a, stream); };
  if (is_general(a)) {
    if (dim <= 64) return with(Tiling<64, 1, 64, true>{});
    if (dim <= 128) return with(Tiling<128, 1, 64, true>{});
    return with(Tiling<256, 1, 32, true>{});
  }
  if (dim <= 64) return with(Tiling<64, 2, 64, false>{});
  if (dim <= 80) return with(Tiling<80, 2, 64, false>{});
  if (dim <= 96) return with(Tiling<96, 2, 64, false>{});
  if (dim <= 128) return with(Tiling<128, 2, 32, false>{});
  return with(Tiling<256, 1, 32, false>{});
}

}  // namespace

cudaError_t attention_prefill(const AttentionLaunch& a, cudaStream_t stream) {
  return a.type == Type::bf16 ? launch_typed<bf16>(a, stream) : launch_typed<f16>(a, stream);
}

}  // namespace tw::cuda
