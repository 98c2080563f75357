// COMPILES; NEVER EXECUTED. Attention forward for sm_90a: out = softmax(q k^T) v for 128 queries of a head a
// block, with FlashAttention-3's division of labour (Shah et al., https://arxiv.org/abs/2407.08608). One
// thread brings q, and tiles of k and v into rings, by TMA; two warpgroups of 64 queries each multiply them
// there by wgmma, their scores and results in registers that the warps of that thread gave up. While the
// tensor cores add a tile's weighted values, the exponentials of the next tile are computed.
//
// The maps of k and v hold the keys that some query sees, and nothing else: what lies outside reads as zero,
// so what no query sees is never read. 4 * queries * keys * dim operations decide.
#include "attention_wgmma.h"

#ifndef TILEWRIGHT_CUDA_WGMMA  // a build without sm_90a

namespace tw::cuda {
cudaError_t attention_wgmma(const AttentionLaunch&, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace tw::cuda

#else
#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace tw::cuda {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2 * kWarpgroup, kThreads = kConsumers + kWarpgroup;
constexpr int kRows = 128, kOwnRows = 64;  // of a block, and of a warpgroup
constexpr int kBox = 64, kBoxRow = 128;    // columns of a box, and their bytes
constexpr int kStages = 2;
constexpr int kBarriers = 1 + 4 * kStages;

template <int kDim, int kKeys>
struct Layout {
  static constexpr int kOwnQ = kOwnRows * kDim * 2, kTile = kKeys * kDim * 2;
  static constexpr int kBytes = kSwizzleBytes + 2 * kOwnQ + 2 * kStages * kTile + kBarriers * 8;
};

template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads)
    attention_wgmma_kernel(const __grid_constant__ AttentionLaunch a,
                           const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap v_map, int first_key) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kDim, kKeys>;
  extern __shared__ uint8_t memory[];
  uint8_t* const q_rows = aligned_to_swizzle(memory);  // of one warpgroup after the other
  uint8_t *const k_tiles = q_rows + 2 * L::kOwnQ, *const v_tiles = k_tiles + kStages * L::kTile;
  uint64_t* const q_here = reinterpret_cast<uint64_t*>(v_tiles + kStages * L::kTile);
  uint64_t *const k_here = q_here + 1, *const v_here = k_here + kStages;
  uint64_t *const k_free = v_here + kStages, *const v_free = k_free + kStages;

  const int slot = blockIdx.x / a.tiles, tile = a.tiles - 1 - blockIdx.x % a.tiles;  // the longest first
  const int b = slot / int(a.heads), head = slot % int(a.heads);
  const Sequence s = sequence_of(a, b);
  const int row0 = tile * kRows, high = min(row0 + kRows, s.count) - 1;
  const Range range = {visible_keys(a, s, row0).first, visible_keys(a, s, high).end};
  const Range whole = {visible_keys(a, s, high).first, visible_keys(a, s, row0).end};
  const int start = range.first / kKeys * kKeys;
  const int steps = range.first < range.end ? (range.end - start + kKeys - 1) / kKeys : 0;

  if (threadIdx.x == 0) {
    barrier_init(q_here, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(k_here + i, 1), barrier_init(v_here + i, 1);
      barrier_init(k_free + i, kConsumers / 32), barrier_init(v_free + i, kConsumers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x > kConsumers || steps == 0) return;
    barrier_expect(q_here, 2 * L::kOwnQ);
    for (int i = 0; i < 2; ++i)
      for (int c = 0; c < kDim; c += kBox)
        copy_tile(q_rows + i * L::kOwnQ + c / kBox * (kOwnRows * kBoxRow), &q_map, c, row0 + i * kOwnRows,
                  head, b, q_here);
    const int kv_head = head / a.group;
    for (int i = 0; i < steps; ++i) {
      const int stage = i % kStages, parity = (i / kStages + 1) % 2, from = start + i * kKeys - first_key;
      const auto fetch = [&](uint8_t* tiles, const CUtensorMap* map, uint64_t* here, uint64_t* free) {
        barrier_wait(free + stage, parity);
        barrier_expect(here + stage, L::kTile);
        for (int c = 0; c < kDim; c += kBox)
          copy_tile(tiles + stage * L::kTile + c / kBox * (kKeys * kBoxRow), map, c, from, kv_head, b,
                    here + stage);
      };
      fetch(k_tiles, &k_map, k_here, k_free);
      fetch(v_tiles, &v_map, v_here, v_free);
    }
    return;
  }
  take_registers<240>();

  const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = row0 + warp * 16;
  const uint8_t* const q = q_rows + warpgroup * L::kOwnQ;
  const float unit = a.scale * kLog2e;
  float scores[kKeys / 8][4], out[kDim / 8][4] = {};
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {}, shrink[2];
  uint32_t weights[kKeys / 16][4];

  const auto multiply_keys = [&](int i) {  // scores = q k^T of tile i
    barrier_wait(k_here + i % kStages, i / kStages % 2);
    const uint8_t* const k = k_tiles + i % kStages * L::kTile;
    pin(scores);
    products_begin();
#pragma unroll
    for (int c = 0; c < kDim; c += 16)
      multiply_shared<T, kKeys>(scores, descriptor(q + c / kBox * (kOwnRows * kBoxRow) + c % kBox * 2),
                                descriptor(k + c / kBox * (kKeys * kBoxRow) + c % kBox * 2), c > 0);
    products_commit();
  };
  const auto multiply_values = [&](int i) {  // out += weights v of tile i
    constexpr int kPart = kDim < 128 ? kDim : 128;
    barrier_wait(v_here + i % kStages, i / kStages % 2);
    const uint8_t* const v = v_tiles + i % kStages * L::kTile;
    pin(weights), pin(out);
    products_begin();
#pragma unroll
    for (int key = 0; key < kKeys; key += 16)
#pragma unroll
      for (int c = 0; c < kDim; c += kPart)
        multiply_registers<T, kPart, true>(
            out + c / 8, weights[key / 16],
            descriptor(v + c / kBox * (kKeys * kBoxRow) + key * kBoxRow, kKeys * kBoxRow));
    products_commit();
  };
  const auto take_in = [&](int i) {  // scores of tile i become weights
    const int from = start + i * kKeys;
    if (from < whole.first || from + kKeys > whole.end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Range seen = visible_keys(a, s, warp_row + g + half * 8);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = from + n * 8 + 2 * t + e;
            if (key < seen.first || key >= seen.end) scores[n][2 * half + e] = -kInfinity;
          }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      shrink[half] = soften<false>(scores, half, unit, top[half], sum[half], [](float&, int, int) {});
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) as_operand<T>(weights[i], scores, i);
  };
  const auto release = [&](uint64_t* free, int i) {  // each warp for itself
    if (lane == 0) barrier_arrive(free + i % kStages);
  };

  if (steps > 0) {
    barrier_wait(q_here, 0);
    multiply_keys(0);
    products_wait<0>();
    pin(scores);
    release(k_free, 0);
    take_in(0);
    round_weights();
    for (int i = 1; i < steps; ++i) {
      multiply_keys(i);
      multiply_values(i - 1);
      products_wait<1>();
      pin(scores);
      release(k_free, i);
      take_in(i);
      products_wait<0>();
      pin(out), pin(weights);
      release(v_free, i - 1);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (__any_sync(0xffffffff, shrink[half] != 1.0f)) {  // after the first tiles, rarely
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n)
            out[n][2 * half] *= shrink[half], out[n][2 * half + 1] *= shrink[half];
        }
      round_weights();
    }
    multiply_values(steps - 1);
    products_wait<0>();
    pin(out), pin(weights);
  }

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + g + half * 8;
    float total = sum[half], natural = top[half] * a.scale, last = 1.0f;
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    if (a.sinks) join_sink(a.sinks[head], natural, total, last);
    factor[half] = end_factor(a, total) * last;
    if (a.lse && t == 0 && row < s.count) a.lse[lse_index(a, s, head, row)] = log_sum(natural, total);
  }
  // The warpgroup is done with its rows of q; results take their place.
  warpgroup_meet(1 + warpgroup);
  uint16_t* const results = reinterpret_cast<uint16_t*>(q_rows) + warp * 16 * kDim;
  store_rows<T, kDim>(out, factor, results, 0, int(a.v_dim), a.aligned_out, [&](int i) {
    const int row = warp_row + i;
    uint16_t* to =
        static_cast<uint16_t*>(a.out.base) + b * a.out.batch + head * a.out.head + row * a.out.token;
    return row < s.count ? to : nullptr;
  });
#endif
}

template <class T, int kDim, int kKeys>
cudaError_t launch(AttentionLaunch a, cudaStream_t stream) {
  Sequence s = {};
  s.keys = int(a.capacity);
  s.shift = a.causal == CausalMask::top_left ? 0 : int(a.capacity - a.seq_q);
  const int first = visible_keys(a, s, 0).first, end = visible_keys(a, s, int(a.seq_q) - 1).end;
  if (first >= end) return cudaErrorNotSupported;
  const auto map = [&](CUtensorMap& to, const Heads& t, int64_t dim, int64_t rows, int64_t heads, int from,
                       int box_rows) {
    return map_tensor<4>(to, map_type(a.type), static_cast<const uint16_t*>(t.base) + from * t.token,
                         {dim, rows, heads, a.batch}, {t.token * 2, t.head * 2, t.batch * 2}, kBox, box_rows,
                         CU_TENSOR_MAP_SWIZZLE_128B);
  };
  CUtensorMap q_map, k_map, v_map;
  if (!map(q_map, a.q, a.head_dim, a.seq_q, a.heads, 0, kOwnRows) ||
      !map(k_map, a.k, a.head_dim, end - first, a.kv_heads, first, kKeys) ||
      !map(v_map, a.v, a.v_dim, end - first, a.kv_heads, first, kKeys))
    return cudaErrorNotSupported;
  a.tiles = int(ceil_div(a.seq_q, kRows));
  const int64_t blocks = a.tiles * a.heads * a.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = attention_wgmma_kernel<T, kDim, kKeys>;
  constexpr int kBytes = Layout<kDim, kKeys>::kBytes;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return e;
  // clang-format off: it takes the launch apart
  kernel<<<unsigned(blocks), kThreads, kBytes, stream>>>(a, q_map, k_map, v_map, first);
  // clang-format on
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_typed(const AttentionLaunch& a, cudaStream_t stream) {
  const int64_t dim = std::max(a.head_dim, a.v_dim);
  if (dim <= 64) return launch<T, 64, 128>(a, stream);
  if (dim <= 128) return launch<T, 128, 128>(a, stream);
  return launch<T, 256, 64>(a, stream);
}

}  // namespace

cudaError_t attention_wgmma(const AttentionLaunch& a, cudaStream_t stream) {
  if (is_general(a) || a.splits > 1 || a.seq_q <= 64 || !a.aligned || a.q_start || a.k_start || a.k_end ||
      a.k_batch || a.block_table || !hopper_asked_for())
    return cudaErrorNotSupported;
  return a.type == Type::bf16 ? launch_typed<bf16>(a, stream) : launch_typed<f16>(a, stream);
}

}  // namespace tw::cuda
#endif
