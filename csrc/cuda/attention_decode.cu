// Attention of few rows: reading keys and values decides. A block takes 16 folded rows of a KV head (queries
// times the heads of its group) and a part of the keys, its warps take blocks of 16 or 32 of them in turn,
// each with a softmax state of its own, which are merged at the end in a fixed order. Keys and values go from
// global memory into the operands of the products (attention_sources.cuh); shared memory holds q alone, and
// there is no barrier on the way.
#include <type_traits>

#include "attention_scores.cuh"
#include "attention_sources.cuh"

namespace tw::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// A warp's state: 16 rows, of which a lane has rows g and g + 8.
template <int kOut>
struct State {
  float out[kOut / 8][4] = {};
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // natural logits; sum: of the lane's columns
};

struct Rows16 {
  ScoreRow score[2];
  Range seen[2];
};

// The keys of `range`, a multiple of the block's size for all but the first and last: those of this warp.
template <class T, int kDim, int kOut, class Keys>
__device__ void walk(Keys& keys, const AttentionLaunch& a, const Rows16& rows, const uint4* q, Range range,
                     State<kOut>& state) {
  constexpr int kKeys = Keys::kKeys, kTiles = Keys::kTiles, kStride = kWarps / (kDim / kOut) * kKeys;
  constexpr bool kEarly = kDim <= 128;  // registers for a block of keys ahead
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 / (kDim / kOut);
  const float limit = drop_limit(a);
  int block = range.first / kKeys * kKeys + warp * kKeys;
  if (kEarly && block < range.end) keys.load_keys(block, range);
  for (; block < range.end; block += kStride) {
    if (!kEarly) keys.load_keys(block, range);
    keys.load_values(block, range);
    float p[kTiles][4] = {};
#pragma unroll Keys::kUnroll
    for (int j = 0; j < kDim / 16; ++j) {
      const uint4 x = q[j * 32 + lane];
      const uint32_t left[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t right[2];
        keys.key_operand(right, j, i);
        mma<T>(p[i], left, right[0], right[1]);
      }
    }
    uint32_t attended = 0;  // bit 2i + e: some row attends the key of tile i, column e
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = block + keys.key(i, e % 2);
        float slant, x = -kInfinity;
        if (key >= rows.seen[e / 2].first && key < rows.seen[e / 2].end)
          x = general_score(a, rows.score[e / 2], p[i][e] * keys.key_factor(i, e % 2), key,
                            score_terms(a, rows.score[e / 2], key), slant);
        p[i][e] = x;
        attended |= uint32_t(x != -kInfinity) << (2 * i + e % 2);
      }
#pragma unroll
    for (int o = 4; o < 32; o *= 2) attended |= __shfl_xor_sync(0xffffffff, attended, o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = state.top[half];
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        highest = max_nan(highest, max_nan(p[i][2 * half], p[i][2 * half + 1]));
      highest = max_nan(highest, __shfl_xor_sync(0xffffffff, highest, 1));
      highest = max_nan(highest, __shfl_xor_sync(0xffffffff, highest, 2));
      const float safe = highest == -kInfinity ? 0.0f : highest;
      const float shrink = exp2_fast((state.top[half] - safe) * kLog2e);
      state.top[half] = highest;
      float total = 0;
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x = exp2_fast((p[i][2 * half + e] - safe) * kLog2e);
          total += x;
          if (a.keep < 1.0f && !is_kept(rows.score[half], limit, block + keys.key(i, e))) x = 0.0f;
          // The scale of a value that nothing attends may be anything.
          p[i][2 * half + e] = attended >> (2 * i + e) & 1 ? x * keys.value_factor(i, e) : 0.0f;
        }
      state.sum[half] = state.sum[half] * shrink + total;
      if (__any_sync(0xffffffff, shrink != 1.0f)) {
#pragma unroll
        for (int n = 0; n < kOut / 8; ++n)
          state.out[n][2 * half] *= shrink, state.out[n][2 * half + 1] *= shrink;
      }
    }
#pragma unroll
    for (int h = 0; h < Keys::kSteps; ++h) {
      uint32_t left[Keys::kParts][4], keep[2];
#pragma unroll
      for (int two = 0; two < 2; ++two) {
        const int i = Keys::tile_of(h, 2 * two), e = Keys::column_of(h, 2 * two);
        const int i1 = Keys::tile_of(h, 2 * two + 1), e1 = Keys::column_of(h, 2 * two + 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = p[i][2 * half + e], y = p[i1][2 * half + e1];
          left[0][2 * two + half] = pack_pair<T>(x, y);
          if constexpr (Keys::kParts == 2)
            left[1][2 * two + half] = pack_pair<T>(x - rounded<T>(x), y - rounded<T>(y));
        }
        keep[two] =
            (attended >> (2 * i + e) & 1 ? 0xffffu : 0) | (attended >> (2 * i1 + e1) & 1 ? 0xffff0000u : 0);
      }
#pragma unroll
      for (int n = 0; n < kOut / 8; ++n) {
        uint32_t right[2];
        keys.value_operand(right, h, n, keep);
#pragma unroll
        for (int part = 0; part < Keys::kParts; ++part) mma<T>(state.out[n], left[part], right[0], right[1]);
      }
    }
    if (kEarly && block + kStride < range.end) keys.load_keys(block + kStride, range);
  }
}

// The state of a warp joins that of another one.
template <int kOut>
__device__ void join(State<kOut>& to, const float4* out, const float2 (&stat)[2]) {
  const int lane = threadIdx.x % 32;
  float mine[2], other[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float top = max_nan(to.top[half], stat[half].x), safe = top == -kInfinity ? 0.0f : top;
    mine[half] = exp2_fast((to.top[half] - safe) * kLog2e),
    other[half] = exp2_fast((stat[half].x - safe) * kLog2e);
    to.top[half] = top;
    to.sum[half] = to.sum[half] * mine[half] + stat[half].y * other[half];
  }
#pragma unroll
  for (int n = 0; n < kOut / 8; ++n) {
    const float4 x = out[n * 32 + lane];
    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) to.out[n][e] = to.out[n][e] * mine[e / 2] + values[e] * other[e / 2];
  }
}

// kDim / kOut warps share a block of keys: each has a part of the output's channels. Two blocks a
// multiprocessor: on its own ptxas goes for three on sm_100, and spills; at 128 channels it does with two.
template <class T, int kDim, int kOut, class Keys>
__global__ void __launch_bounds__(kThreads, kDim == 128 ? 0 : 2)
    attention_few_kernel(const __grid_constant__ AttentionLaunch a) {
  // q as operands, then the states of two warps at a time.
  __shared__ __align__(16) uint4 q[kDim / 16 * 32];
  constexpr int kStride = kOut + kOut / 32 * 8 + 1;  // of a row of the output
  __shared__ __align__(16) float4 states[2][(16 * kStride + 3) / 4];
  __shared__ float2 stats[2][2][32];

  const int split = blockIdx.x % a.splits, tile = blockIdx.x / a.splits % a.tiles;
  const int slot = blockIdx.x / a.splits / a.tiles, b = slot / int(a.kv_heads),
            kv_head = slot % int(a.kv_heads);
  const Sequence s = sequence_of(a, b);
  const int row0 = tile * 16, rows = s.count * a.group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  Range range = {visible_keys(a, s, folded(a, 0, row0).query).first,
                 visible_keys(a, s, folded(a, 0, min(row0 + 16, rows) - 1).query).end};
  if (a.splits > 1) {
    range = {max(range.first, split * a.chunk), min(range.end, (split + 1) * a.chunk)};
    if (range.first >= range.end) return;
  }
  Rows16 own;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + g + 8 * half;
    const Folded f = folded(a, kv_head, min(row, rows - 1));
    own.score[half] = score_row(a, s, f.head, f.query);
    const Range seen = visible_keys(a, s, f.query);
    own.seen[half] = {max(seen.first, range.first), row < rows ? min(seen.end, range.end) : 0};
  }
  constexpr int kParts = kDim / kOut;
  Keys keys(a, s, kv_head, warp % kParts);
  for (int j = warp; j < kDim / 16; j += kWarps) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + g + i % 2 * 8, channel = keys.first_channel(j) + i / 2 * 2;
      const Folded f = folded(a, kv_head, min(row, rows - 1));
      const uint16_t* from = static_cast<const uint16_t*>(a.q.base) + s.q_outer * a.q.batch +
                             f.head * a.q.head + int64_t(s.q_first + f.query) * a.q.token + channel;
      const uint32_t low = row < rows && channel < a.head_dim ? from[0] : 0;
      const uint32_t high = row < rows && channel + 1 < a.head_dim ? from[1] : 0;
      word[i] = low | high << 16;
    }
    q[j * 32 + lane] = make_uint4(word[0], word[1], word[2], word[3]);
  }
  __syncthreads();

  State<kOut> state;
  Range coded = range;
  if constexpr (std::is_same_v<Keys, Int4Keys<T, kDim, kOut>>)
    coded.end = min(range.end, int(a.kv.counts[1]));
  walk<T, kDim, kOut>(keys, a, own, q, coded, state);
  if constexpr (std::is_same_v<Keys, Int4Keys<T, kDim, kOut>>) {
    TailKeys<T, kDim, kOut> tail(a, s, kv_head, warp % kParts);
    tail.first = int(a.kv.counts[1]);
    walk<T, kDim, kOut>(tail, a, own, q, {max(range.first, tail.first), range.end}, state);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.sum[half] += __shfl_xor_sync(0xffffffff, state.sum[half], 1);
    state.sum[half] += __shfl_xor_sync(0xffffffff, state.sum[half], 2);
  }

  // Warps 2 and 3 join 0 and 1, then 1 joins 0 unless it has channels of its own.
#pragma unroll
  for (int others = kWarps / 2; others >= kParts; others /= 2) {
    if (warp >= others && warp < 2 * others) {
#pragma unroll
      for (int n = 0; n < kOut / 8; ++n)
        states[warp - others][n * 32 + lane] =
            make_float4(state.out[n][0], state.out[n][1], state.out[n][2], state.out[n][3]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        stats[warp - others][half][lane] = {state.top[half], state.sum[half]};
    }
    __syncthreads();
    if (warp < others) {
      const float2 stat[2] = {stats[warp][0][lane], stats[warp][1][lane]};
      join(state, states[warp], stat);
    }
    if (others > kParts) __syncthreads();
  }
  bool bad = !s.known;
  if (a.block_table) bad |= __syncthreads_or(keys.bad);
  if (warp >= kParts) return;

  // Through the memory of the states, so that rows are written in one piece.
  auto* const tile_out = reinterpret_cast<float*>(states[warp]);
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + g + 8 * half;
    float sum = bad ? __int_as_float(0x7fffffff) : state.sum[half], top = state.top[half], factor = 1.0f;
    const Folded f = folded(a, kv_head, min(row, rows - 1));
    const bool writes = row < rows && t == 0 && warp == 0;
    if (a.splits > 1) {
      if (writes) a.stats[(int64_t(slot) * a.splits + split) * rows + row] = {top, sum};
    } else {
      float shrink = 1.0f;
      if (a.sinks) join_sink(a.sinks[f.head], top, sum, shrink);
      factor = end_factor(a, sum) * shrink;
      if (a.lse && writes) a.lse[lse_index(a, s, f.head, f.query)] = log_sum(top, sum);
    }
#pragma unroll
    for (int n = 0; n < kOut / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        tile_out[(g + 8 * half) * kStride + Keys::place(keys.channel(n, e) % kOut)] =
            state.out[n][2 * half + e] * (factor * (1 / Keys::kUnit));
  }
  __syncwarp();
  for (int r = 0; r < min(16, rows - row0); ++r) {
    const Folded f = folded(a, kv_head, row0 + r);
    T* out = static_cast<T*>(a.out.base) + s.q_outer * a.out.batch + f.head * a.out.head +
             int64_t(s.q_first + f.query) * a.out.token;
    float* partial = a.partials + ((int64_t(slot) * a.splits + split) * rows + row0 + r) * a.v_dim;
    for (int i = lane; i < kOut; i += 32) {
      const int channel = warp * kOut + i;
      if (channel >= a.v_dim) break;
      if (a.splits > 1)
        partial[channel] = tile_out[r * kStride + Keys::place(i)];
      else
        out[channel] = from_float<T>(tile_out[r * kStride + Keys::place(i)]);
    }
  }
}

template <class T, int kDim, int kOut>
cudaError_t launch_dim(AttentionLaunch a, cudaStream_t stream) {
  const int64_t rows = a.seq_q * a.group;
  a.tiles = int(ceil_div(rows, 16));
  const int64_t blocks = a.batch * a.kv_heads * a.tiles * a.splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = !a.kv.k_codes    ? attention_few_kernel<T, kDim, kOut, DenseKeys<T, kDim, kOut>>
                      : a.kv.bits == 8 ? attention_few_kernel<T, kDim, kOut, Int8Keys<T, kDim, kOut>>
                                       : attention_few_kernel<T, kDim, kOut, Int4Keys<T, kDim, kOut>>;
  kernel<<<unsigned(blocks), kThreads, 0, stream>>>(a);
  if (const cudaError_t e = cudaGetLastError()) return e;
  return a.splits > 1 ? attention_merge(a, stream) : cudaSuccess;
}

template <class T>
cudaError_t launch_typed(const AttentionLaunch& a, cudaStream_t stream) {
  const int64_t dim = std::max(a.head_dim, a.v_dim);
  return dim <= 64    ? launch_dim<T, 64, 64>(a, stream)
         : dim <= 128 ? launch_dim<T, 128, 128>(a, stream)
                      : launch_dim<T, 256, 128>(a, stream);
}

}  // namespace

cudaError_t attention_decode(const AttentionLaunch& a, cudaStream_t stream) {
  return a.type == Type::bf16 ? launch_typed<bf16>(a, stream) : launch_typed<f16>(a, stream);
}

}  // namespace tw::cuda
