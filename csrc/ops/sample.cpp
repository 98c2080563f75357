// Sampling: max -> bound -> gather -> weights -> walk.
//
// Nothing is sorted. Each filter is turned into a bound on the logit that nearly all of the row fails, so
// that top-k, top-p and min-p work on the few candidates above it; blocks whose maximum is lower are not read
// twice.
//   top-k  the k-th largest block maximum: k logits reach it, so no logit of the top k is smaller.
//   top-p  tokens with weight <= (1 - p) Z / n together weigh at most (1 - p) Z: all of them are cut.
//   min-p  max + temperature * log(min_p).
// The walk goes over the kept tokens in ascending order of their ids, in float64. Every sum has a fixed
// order, so a result depends on the row and its uniform number alone.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <string>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "sample";
constexpr int64_t kMaxGrain = 512;             // blocks: 32k logits are read in about the time of a wake-up
constexpr int64_t kChunk = 16 * kSampleBlock;  // logits whose weights are summed at once
constexpr int64_t kChunkGrain = 8;
constexpr double kSlack = 1e-3;  // keeps rounding of a bound, about 1e-6, on the safe side

struct Candidates {
  float *values, *weights;
  int32_t* ids;
  int64_t count;

  // Drops those for which keep(i) is false; the order stays.
  template <class Keep>
  void filter(Keep keep) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!keep(i)) continue;
      values[kept] = values[i], weights[kept] = weights[i], ids[kept] = ids[i];
      ++kept;
    }
    count = kept;
  }
};

struct Ranked {
  float value, weight;
  int32_t id;
};
// Descending; of equal logits the higher id comes first, as when torch sorts ascending and cuts from below.
bool before(const Ranked& a, const Ranked& b) {
  return a.value > b.value || (a.value == b.value && a.id > b.id);
}

// The last of the most probable tokens whose weights together reach `mass`, in linear time: one pass by value
// finds the thousandth of the range that holds it, selection inside does the rest.
Ranked last_within(const Candidates& c, double mass) {
  constexpr int kBuckets = 1024;
  const auto [low, high] = std::minmax_element(c.values, c.values + c.count);
  const double top = *high, scale = *high > *low ? (kBuckets - 1) / (top - *low) : 0;
  const auto bucket_of = [&](float value) { return static_cast<int>((top - value) * scale); };
  double buckets[kBuckets] = {};
  for (int64_t i = 0; i < c.count; ++i) buckets[bucket_of(c.values[i])] += c.weights[i];
  double sum = 0;  // of what ranks before the bucket, then before `first`
  int bucket = 0;
  while (bucket + 1 < kBuckets && sum + buckets[bucket] < mass) sum += buckets[bucket++];

  auto* first = static_cast<Ranked*>(scratch(Scratch::panel, c.count * int64_t{sizeof(Ranked)}));
  Ranked* last = first;
  for (int64_t i = 0; i < c.count; ++i)
    if (bucket_of(c.values[i]) == bucket) *last++ = {c.values[i], c.weights[i], c.ids[i]};
  if (first == last) return {*low, 0.0f, 0};  // the weights do not reach the mass: nothing is cut
  while (last - first > 1) {
    Ranked* middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, before);
    double upper = sum;
    for (const Ranked* r = first; r != middle; ++r) upper += r->weight;
    if (upper >= mass)
      last = middle;
    else
      sum = upper, first = middle;
  }
  return *first;
}

struct Sampler {
  SampleArgs args;
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  const float* block_max;   // (batch, args.blocks)
  const float* row_max;     // (batch,)
  const float* chunk_sums;  // (batch, chunks), where the weights of all tokens are needed
  int64_t chunks;

  bool by_k() const { return top_k > 0 && top_k < args.n; }
  bool by_p() const { return top_p < 1; }
  bool needs_sums() const { return !by_k() && (by_p() || min_p <= 0); }

  void chunk_sum(int64_t index, float* sums) const {
    float weights[kChunk];
    const int64_t row = index / chunks, begin = index % chunks * kChunk;
    table().sample_weights.fn(args, row, begin, std::min(begin + kChunk, args.n), row_max[row],
                              float(temperature), weights, sums + index);
  }

  double total(int64_t row) const {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += chunk_sums[row * chunks + c];
    return sum;
  }

  float lower_bound(int64_t row) const {
    const float* maxima = block_max + row * args.blocks;
    if (by_k()) {
      if (args.blocks < top_k) return -INFINITY;
      float* copy = static_cast<float*>(scratch(Scratch::operands, args.blocks * 4));
      std::copy(maxima, maxima + args.blocks, copy);
      std::nth_element(copy, copy + top_k - 1, copy + args.blocks, std::greater<float>());
      return copy[top_k - 1];
    }
    double log_weight = -INFINITY;
    if (by_p()) log_weight = std::log((1 - top_p) * total(row) / double(args.n));
    if (min_p > 0) log_weight = std::max(log_weight, std::log(min_p));
    const double bound = row_max[row] + temperature * (log_weight - kSlack);
    return std::nextafter(float(std::max<double>(bound, -FLT_MAX)), -INFINITY);
  }

  int64_t pick(int64_t row, double uniform) const {
    if (needs_sums() && !by_p()) return pick_from_all(row, uniform);
    const float lower = lower_bound(row);
    const int64_t room = (args.n + 15) / 16 * 16;
    auto* memory = static_cast<float*>(scratch(Scratch::operands, room * 12));
    Candidates c{memory, memory + room, reinterpret_cast<int32_t*>(memory + 2 * room), 0};
    table().sample_gather.fn(args, row, block_max + row * args.blocks, 0, args.blocks, lower, c.values, c.ids,
                             &c.count);
    if (by_k() && c.count > top_k) {
      auto* copy = static_cast<float*>(scratch(Scratch::panel, c.count * 4));
      std::copy(c.values, c.values + c.count, copy);
      std::nth_element(copy, copy + top_k - 1, copy + c.count, std::greater<float>());
      const float kth = copy[top_k - 1];
      c.filter([&](int64_t i) { return c.values[i] >= kth; });
    }
    SampleArgs kept;
    kept.logits = c.values;
    kept.n = c.count;
    float sum;
    double mass = 0;
    for (int64_t i = 0; i < c.count; i += kChunk) {
      table().sample_weights.fn(kept, 0, i, std::min(i + kChunk, c.count), row_max[row], float(temperature),
                                c.weights + i, &sum);
      mass += sum;
    }
    if (by_p()) {
      const Ranked last = last_within(c, top_p * (by_k() ? mass : total(row)));
      c.filter([&](int64_t i) { return !before(last, {c.values[i], 0.0f, c.ids[i]}); });
    }
    if (min_p > 0) c.filter([&](int64_t i) { return c.weights[i] >= float(min_p); });
    mass = 0;
    for (int64_t i = 0; i < c.count; ++i) mass += c.weights[i];
    return c.ids[walk(c.weights, c.count, 0, uniform * mass)];
  }

  int64_t pick_from_all(int64_t row, double uniform) const {
    const double target = uniform * total(row);
    double sum = 0;
    int64_t chunk = 0;
    for (; chunk + 1 < chunks; ++chunk) {
      const double next = sum + chunk_sums[row * chunks + chunk];
      if (next > target) break;
      sum = next;
    }
    float weights[kChunk], ignored;
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, args.n);
    table().sample_weights.fn(args, row, begin, end, row_max[row], float(temperature), weights, &ignored);
    return begin + walk(weights, end - begin, sum, target);
  }

  // The first index at which the running sum passes the target; a token without weight is never chosen.
  static int64_t walk(const float* weights, int64_t n, double sum, double target) {
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (weights[i] == 0) continue;
      sum += weights[i];
      last = i;
      if (sum > target) break;
    }
    return last;
  }
};

}  // namespace

void sample(const TensorView& logits, const TensorView& uniform, const TensorView& out, double temperature,
            int64_t top_k, double top_p, double min_p) {
  expect_cpu(kOp, "logits", logits);
  expect_storage(kOp, "logits", logits);
  TW_EXPECT(logits.ndim == 2 && logits.dim(1) > 0 && logits.dim(1) <= INT32_MAX, kOp,
            "logits must be (batch, vocab) with at least one token, got " + shape_of(logits));
  expect_unit_stride(kOp, "logits", logits);
  const int64_t batch = logits.dim(0), n = logits.dim(1);
  const bool greedy = temperature == 0;
  TW_EXPECT(greedy || (uniform.ndim == 1 && uniform.dim(0) == batch && uniform.dtype == DType::f64), kOp,
            "uniform must be float64 of shape (" + std::to_string(batch) + ",)");
  record(kOp, table().sample_max.isa);
  if (batch == 0) return;

  Sampler s{};
  s.args.logits = logits.data;
  s.args.row_stride = logits.stride(0), s.args.n = n;
  s.args.blocks = (n + kSampleBlock - 1) / kSampleBlock;
  s.args.dtype = storage_of(logits.dtype);
  s.temperature = std::clamp<double>(temperature, FLT_MIN, FLT_MAX);  // kernels take a float
  s.top_k = top_k, s.top_p = top_p, s.min_p = min_p;
  s.chunks = (n + kChunk - 1) / kChunk;
  const int64_t blocks = s.args.blocks;
  auto* memory = static_cast<float*>(
      scratch(Scratch::partial, batch * (blocks + s.chunks + 1) * int64_t{sizeof(float)}));
  float *block_max = memory, *chunk_sums = block_max + batch * blocks,
        *row_max = chunk_sums + batch * s.chunks;
  s.block_max = block_max, s.chunk_sums = chunk_sums, s.row_max = row_max;

  parallel_ranges(batch * blocks, kMaxGrain,
                  [&](int64_t begin, int64_t end) { table().sample_max.fn(s.args, block_max, begin, end); });
  auto* tokens = out.as<int64_t>();
  for (int64_t row = 0; row < batch; ++row) {
    const float* maxima = block_max + row * blocks;
    int64_t at = 0;
    for (int64_t b = 0; b < blocks && maxima[at] == maxima[at]; ++b)
      if (!(maxima[b] <= maxima[at])) at = b;  // the first maximum, or NaN
    const float m = maxima[at];
    const auto here = [&] { return "row " + std::to_string(row) + " of logits "; };
    if (m != m) fail(kOp, here() + "holds NaN");
    if (m == -INFINITY) fail(kOp, here() + "is -inf throughout: no token may be chosen");
    if (m == INFINITY && !greedy) fail(kOp, here() + "holds +inf, which has no probability");
    row_max[row] = m;
    if (!greedy) continue;
    float values[kSampleBlock];
    int32_t ids[kSampleBlock];
    int64_t count;
    table().sample_gather.fn(s.args, row, maxima, at, at + 1, m, values, ids, &count);
    tokens[row * out.strides[0]] = ids[0];
  }
  if (greedy) return;
  if (s.needs_sums())
    parallel_ranges(batch * s.chunks, kChunkGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) s.chunk_sum(i, chunk_sums);
    });
  const auto* numbers = uniform.as<const double>();
  parallel_ranges(batch, (kMaxGrain + blocks - 1) / blocks, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      tokens[row * out.strides[0]] = s.pick(row, numbers[row * uniform.strides[0]]);
  });
}

}  // namespace tilewright
