// Copies the rows of k or v, (batch, heads, seq, head_dim), into their cache slots and converts the dtype,
// rounding half to even. The caller has checked every slot. Moves each value once in and once out. A call
// covers one head and a range of batch elements, tokens ascending: two tokens with one slot never race.
#include "cpu/simd.h"
//
#include "cpu/kernels/rows.h"

namespace tilewright {
namespace {

template <class From, class To>
TW_INLINE void convert_row(const From* x, To* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(x + i));
  if (i < n) store(y + i, load(x + i, int(n - i)), int(n - i));
}

template <class T>
TW_INLINE void convert_row(const T* x, T* y, int64_t n) {  // bits stay what they are, NaN payloads too
  std::memcpy(y, x, static_cast<size_t>(n) * sizeof(T));
}

template <class From, class To>
void append(const KvAppendArgs& a, int64_t head, int64_t begin, int64_t end) {
  To* cache = static_cast<To*>(a.cache) + head * a.head_stride;
  for (int64_t b = begin; b < end; ++b) {
    const From* in = static_cast<const From*>(a.in.base) + b * a.in.batch_stride + head * a.in.head_stride;
    const int64_t* offsets = a.offsets + b * a.seq;
    for (int64_t t = 0; t < a.seq; ++t) convert_row(in + t * a.in.seq_stride, cache + offsets[t], a.head_dim);
  }
}

}  // namespace

void TW_KERNEL(kv_append)(const KvAppendArgs& a, int64_t head, int64_t begin, int64_t end) {
  with_storage(a.in_dtype, [&](auto from) {
    with_storage(a.cache_dtype, [&](auto to) { append<decltype(from), decltype(to)>(a, head, begin, end); });
  });
}

}  // namespace tilewright
