// Sampling without a sort: a block takes a row. Filters become a bound on the logit, found digit by digit
// (256 bins of 8 bits of the float's order): by counting for top-k (https://arxiv.org/abs/1904.09751 for
// top-p, by weight). The draw walks over the kept tokens in ascending order of their ids, narrowing 32-fold a
// pass.
//
// Weights are exp((logit - max) / temperature) in fixed point, 2^-40, so that sums are exact integers:
// atomics and any order of threads give the same bits.
#include "convert.cuh"
#include "reduce.cuh"
#include "sample.h"

namespace tw::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr float kOne = 1099511627776.0f;  // 2^40
constexpr uint32_t kNan = 0xffffffffu;    // the keys of numbers, in their order, and of NaN
constexpr uint32_t kInfinity = 0xff800000u, kMinusInfinity = 0x007fffffu;

using Mass = unsigned long long;

struct Shared {
  Mass bins[256];
  Mass sums[2][kWarps];
  unsigned counts[2][kWarps];
  // What warp 0 found.
  uint32_t prefix;
  Mass above;
};

template <class T>
struct Row {
  const T* logits;
  int n;
  float max, temperature;

  __device__ float at(int i) const { return to_float(logits[i]); }
  static __device__ uint32_t key(float x) {
    if (x != x) return kNan;
    const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  }
  __device__ float weight(float x) const { return expf((x - max) / temperature); }
  __device__ Mass mass(float x) const { return __float2ull_rn(weight(x) * kOne); }
};

// The key at which the tokens, taken in descending order of keys, reach `target`: in number, or BY_MASS in
// mass. `lowest`: smaller keys do not take part. Also what the larger keys have together. If they do not
// reach it all, the smallest key that has any.
struct Bound {
  uint32_t key;
  Mass above;
};
template <bool BY_MASS, class T>
__device__ Bound find_bound(const Row<T>& row, double target, uint32_t lowest, Shared& shared) {
  uint32_t prefix = 0;
  Mass above = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) shared.bins[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < row.n; i += kThreads) {
      const float x = row.at(i);
      const uint32_t key = row.key(x);
      // Shifts of 32 are not defined, so in two steps.
      if (key >= lowest && key >> shift >> 8 == prefix)
        atomicAdd(&shared.bins[key >> shift & 255], BY_MASS ? row.mass(x) : Mass{1});
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane 0 has the 8 highest bins
      const int lane = threadIdx.x, first = 255 - lane * 8;
      Mass mine = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) mine += shared.bins[first - i];
      Mass before = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const Mass other = __shfl_up_sync(kAllLanes, before, step);
        if (lane >= step) before += other;
      }
      before += above - mine;
      const bool reached = mine > 0 && double(before + mine) >= target;
      const unsigned who = __ballot_sync(kAllLanes, reached), any = __ballot_sync(kAllLanes, mine > 0);
      const int winner = who ? __ffs(who) - 1 : 31 - __clz(any);
      if (lane == winner) {
        int bin = first, last = first;
        Mass at_last = before;
#pragma unroll 1
        for (; bin > first - 8; --bin) {
          const Mass here = shared.bins[bin];
          if (here > 0) last = bin, at_last = before;
          if (here > 0 && double(before + here) >= target) break;
          before += here;
        }
        shared.prefix = prefix << 8 | static_cast<uint32_t>(last);
        shared.above = at_last;
      }
    }
    __syncthreads();
    prefix = shared.prefix;
    above = shared.above;
  }
  return {prefix, above};
}

// Which tokens are kept: keys above `key`, and of those at it the ones of the highest ids, without the first
// `skip`.
struct Kept {
  uint32_t key;
  unsigned skip;
  float min_weight;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleArgs a) {
  __shared__ Shared shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Row<T> row{static_cast<const T*>(a.logits) + blockIdx.x * a.row_stride, a.n, 0.0f, a.temperature};
  int64_t* const out = a.out + blockIdx.x * a.out_stride;

  Mass best = 0;  // the largest key, and of those the first token
#pragma unroll 1
  for (int i = threadIdx.x; i < a.n; i += kThreads) {
    const Mass mine = Mass{row.key(row.at(i))} << 32 | (0xffffffffu - static_cast<uint32_t>(i));
    best = mine > best ? mine : best;
  }
  best = block_reduce<kThreads>(best, shared.sums[0], Max{});
  const uint32_t top = static_cast<uint32_t>(best >> 32);
  const bool greedy = a.uniform == nullptr;
  if (top == kNan || top <= kMinusInfinity || (top >= kInfinity && !greedy) || greedy) {
    if (threadIdx.x == 0)
      *out = top == kNan || top <= kMinusInfinity || (top >= kInfinity && !greedy)
                 ? -1
                 : int64_t{0xffffffffu - static_cast<uint32_t>(best)};
    return;
  }
  row.max = row.at(static_cast<int>(0xffffffffu - static_cast<uint32_t>(best)));

  Kept kept{0, 0, a.min_p > 0 ? static_cast<float>(a.min_p) : 0.0f};
  if (a.top_k > 0 && a.top_k < a.n) kept.key = find_bound<false>(row, double(a.top_k), 0, shared).key;
  if (a.top_p < 1) {
    Mass mass = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < a.n; i += kThreads) {
      const float x = row.at(i);
      if (row.key(x) >= kept.key) mass += row.mass(x);
    }
    mass = block_reduce<kThreads>(mass, shared.sums[1], Sum{});
    const double target = a.top_p * double(mass);
    const Bound bound = find_bound<true>(row, target, kept.key, shared);
    kept.key = bound.key;
    unsigned equal = 0;
    Mass one = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < a.n; i += kThreads) {
      const float x = row.at(i);
      if (row.key(x) == bound.key) ++equal, one = row.mass(x);
    }
    equal = block_reduce<kThreads>(equal, shared.counts[0], Sum{});
    one = block_reduce<kThreads>(one, shared.sums[0], Max{});
    // A token is kept if those before it do not reach the target.
    const double wanted = ceil((target - double(bound.above)) / double(one));
    if (wanted < equal) kept.skip = equal - (wanted > 1 ? static_cast<unsigned>(wanted) : 1u);
  }

  // The sum over [begin, end) of what is kept, and how many keys are at the bound, for each of 32 parts.
  // `skipped`: tokens at the bound before `begin`.
  int begin = 0, end = a.n;
  unsigned skipped = 0;
  Mass before = 0, target = 0;
  bool first = true;
#pragma unroll 1
  do {
    const int length = (end - begin + kWarps - 1) / kWarps;
    const int from = min(begin + warp * length, end), to = min(from + length, end);
    Mass sum = 0, tie = 0;  // tie: of one token at the bound
    unsigned ties = 0;
#pragma unroll 1
    for (int i = from + lane; i < to; i += 32) {
      const float x = row.at(i);
      const uint32_t key = row.key(x);
      if (key < kept.key || row.weight(x) < kept.min_weight) continue;
      if (key > kept.key)
        sum += row.mass(x);
      else
        ++ties, tie = row.mass(x);
    }
    sum = warp_reduce(sum, Sum{});
    ties = warp_reduce(ties, Sum{});
    tie = warp_reduce(tie, Max{});
    __syncthreads();  // what the last pass left there is read
    if (lane == 0) shared.sums[0][warp] = sum, shared.sums[1][warp] = tie, shared.counts[0][warp] = ties;
    __syncthreads();
    const auto part = [&](int w, unsigned done) {  // of w's mass, `done` ties lying before it
      const unsigned count = shared.counts[0][w], lost = kept.skip > done ? min(kept.skip - done, count) : 0;
      return shared.sums[0][w] + (count - lost) * shared.sums[1][w];
    };
    if (first) {
      Mass total = 0;
      unsigned done = skipped;
#pragma unroll 1
      for (int w = 0; w < kWarps; ++w) total += part(w, done), done += shared.counts[0][w];
      target = static_cast<Mass>(a.uniform[blockIdx.x * a.uniform_stride] * double(total));
      if (target >= total) target = total - 1;
      first = false;
    }
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      const Mass here = part(w, skipped);
      if (before + here > target) {
        begin = min(begin + w * length, end), end = min(begin + length, end);
        break;
      }
      before += here;
      skipped += shared.counts[0][w];
    }
  } while (end - begin > 1);
  if (threadIdx.x == 0) *out = begin;
}

}  // namespace

cudaError_t sample(const SampleArgs& a, cudaStream_t stream) {
  if (a.batch == 0) return cudaSuccess;
  if (a.n <= 0) return cudaErrorInvalidValue;
  return with_type(a.type, [&](auto type) {
    sample_kernel<decltype(type)><<<a.batch, kThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

}  // namespace tw::cuda
