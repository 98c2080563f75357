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

}  // namespace
}  // namespace tilewright
