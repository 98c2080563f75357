// The three passes over logits that sampling is made of; ops/sample.cpp puts them together.
//   max      the maximum of every block of 64 logits: one read of the row, at memory speed
//   gather   the few logits above a bound: only blocks whose maximum reaches it are read again
//   weights  exp((x - max) / temperature) of a stretch of logits
// The caller has checked shapes and dtypes. What is computed depends on the row alone.
#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

template <class T>
TW_INLINE const T* logits_of(const SampleArgs& a, int64_t row) {
  return static_cast<const T*>(a.logits) + row * a.row_stride;
}

template <class T>
void max_of_blocks(const SampleArgs& a, float* block_max, int64_t begin, int64_t end) {
  const F lowest = set1(-__builtin_inff());
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b % a.blocks * kSampleBlock;
    const T* x = logits_of<T>(a, b / a.blocks) + first;
    const int64_t n = a.n - first < kSampleBlock ? a.n - first : kSampleBlock;
    F m = lowest;
    bool nan = false;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const F v = load(x + i);
      nan |= any_nan(v);
      m = max(m, v);
    }
    if (i < n) {
      const F v = keep_below(load(x + i, int(n - i)), lowest, i, n);
      nan |= any_nan(v);
      m = max(m, v);
    }
    block_max[b] = nan ? __builtin_nanf("") : reduce_max(m);
  }
}

template <class T>
int64_t gather_above(const T* x, int64_t n, const float* block_max, int64_t block_begin, int64_t block_end,
                     float lower, float* values, int32_t* ids) {
  int64_t count = 0;
  for (int64_t b = block_begin; b < block_end; ++b) {
    if (!(block_max[b] >= lower)) continue;
    const int64_t last = (b + 1) * kSampleBlock < n ? (b + 1) * kSampleBlock : n;
    for (int64_t i = b * kSampleBlock; i < last; ++i) {  // branch-free: the slot is kept only if it counts
      const float v = to_float(x[i]);
      values[count] = v;
      ids[count] = int32_t(i);
      count += v >= lower && v > -__builtin_inff();
    }
  }
  return count;
}

template <class T>
float weights_of(const T* x, int64_t n, float max_logit, float temperature, float* weights) {
  const F m = set1(max_logit), t = set1(temperature);
  F sum = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F w = exp(div(sub(load(x + i), m), t));
    store(weights + i, w);
    sum = add(sum, w);
  }
  if (i < n) {
    const int c = int(n - i);
    const F w = keep_below(exp(div(sub(load(x + i, c), m), t)), zero(), i, n);
    store(weights + i, w, c);
    sum = add(sum, w);
  }
  return reduce_add(sum);
}

}  // namespace

void TW_KERNEL(sample_max)(const SampleArgs& a, float* block_max, int64_t begin, int64_t end) {
  with_storage(a.dtype, [&](auto x) { max_of_blocks<decltype(x)>(a, block_max, begin, end); });
}

void TW_KERNEL(sample_gather)(const SampleArgs& a, int64_t row, const float* block_max, int64_t block_begin,
                              int64_t block_end, float lower, float* values, int32_t* ids, int64_t* count) {
  with_storage(a.dtype, [&](auto x) {
    *count = gather_above(logits_of<decltype(x)>(a, row), a.n, block_max, block_begin, block_end, lower,
                          values, ids);
  });
}

void TW_KERNEL(sample_weights)(const SampleArgs& a, int64_t row, int64_t begin, int64_t end, float max_logit,
                               float temperature, float* weights, float* sum) {
  with_storage(a.dtype, [&](auto x) {
    *sum = weights_of(logits_of<decltype(x)>(a, row) + begin, end - begin, max_logit, temperature, weights);
  });
}

}  // namespace tilewright
