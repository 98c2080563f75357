// Addressing of Rows inside kernels. Included after cpu/simd.h.
#pragma once
#include "cpu/kernels.h"

namespace tilewright {
namespace {

template <class T>
TW_INLINE T* row(const Rows& rows, int64_t r) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    offset += (r % rows.shape[d]) * rows.strides[d];
    r /= rows.shape[d];
  }
  if (rows.dims > 0) offset += r * rows.strides[0];
  return static_cast<T*>(rows.base) + offset;
}

// Calls f(T{}) with the storage type of `s`.
template <class Fn>
TW_INLINE void with_storage(Storage s, Fn&& f) {
  if (s == Storage::f32) f(float{});
  if (s == Storage::bf16) f(bf16{});
  if (s == Storage::f16) f(f16{});
}

// Calls f(i, Count<n>{}) over [begin, end): n is kMost as long as that many are left, then what is left.
template <int N>
struct Count {
  static constexpr int n = N;
};
template <int kMost, class Fn>
TW_INLINE void in_tiles(int64_t begin, int64_t end, Fn&& f) {
  for (; begin + kMost <= end; begin += kMost) f(begin, Count<kMost>{});
  if constexpr (kMost > 1) {
    if (begin < end) in_tiles<kMost - 1>(begin, end, f);
  }
}

// Calls f(Count<n>{}) for n in [1, kMost].
template <int kMost, class Fn>
TW_INLINE void with_count(int64_t n, Fn&& f) {
  if (n == kMost) return f(Count<kMost>{});
  if constexpr (kMost > 1) with_count<kMost - 1>(n, f);
}
// As in_tiles, with tiles as even as they can be: 4 and 4 for 8 rows, not 6 and 2.
template <int kMost, class Fn>
TW_INLINE void in_even_tiles(int64_t begin, int64_t end, Fn&& f) {
  for (int64_t left = (end - begin + kMost - 1) / kMost; left > 0; --left) {
    const int64_t n = (end - begin + left - 1) / left;
    with_count<kMost>(n, [&](auto rows) { f(begin, rows); });
    begin += n;
  }
}

}  // namespace
}  // namespace tilewright
