// Whether tensors that an op writes share memory. Exact for the layouts that torch's views make of each other
// (slices, transposes, parts of a fused projection); where it cannot tell it says yes.
#pragma once
#include <algorithm>

#include "tensor.h"

namespace tilewright {
namespace detail {

// The dimensions of a view larger than 1, widest stride first, in bytes.
struct Layout {
  int n = 0;
  int64_t item = 0, size[kMaxDims] = {}, stride[kMaxDims] = {};

  explicit Layout(const TensorView& t) : item(size_of(t.dtype)) {
    for (int i = 0; i < t.ndim; ++i) {
      if (t.shape[i] == 1) continue;
      int at = n++;
      for (; at > 0 && stride[at - 1] < t.strides[i] * item; --at)
        size[at] = size[at - 1], stride[at] = stride[at - 1];
      size[at] = t.shape[i], stride[at] = t.strides[i] * item;
    }
  }
  // Bytes from the first to the end of the last element, over the dimensions from d on.
  int64_t extent(int d) const {
    int64_t bytes = item;
    for (; d < n; ++d) bytes += (size[d] - 1) * stride[d];
    return bytes;
  }
};

// a lies at 0, b at `delta`, both without their first d dimensions.
inline bool meet(const Layout& a, const Layout& b, int d, int64_t delta) {
  if (delta >= a.extent(d) || delta + b.extent(d) <= 0) return false;
  if (d >= a.n || d >= b.n || a.stride[d] != b.stride[d]) return true;
  const int64_t step = a.stride[d], inner_a = a.extent(d + 1), inner_b = b.extent(d + 1);
  if (inner_a > step || inner_b > step) return true;
  // Copies of both repeat every `step` bytes: only index differences m that bring them together matter, and
  // those are within one of -delta / step.
  const int64_t nearest = -delta / step;
  for (int64_t m = nearest - 1; m <= nearest + 1; ++m)
    if (m > -a.size[d] && m < b.size[d] && meet(a, b, d + 1, delta + m * step)) return true;
  return false;
}

}  // namespace detail

// Two indices may stand for one address, as in an expanded tensor.
inline bool overlaps_itself(const TensorView& t) {
  if (t.numel() == 0) return false;
  const detail::Layout layout(t);
  for (int d = 0; d < layout.n; ++d)
    if (layout.stride[d] < layout.extent(d + 1)) return true;
  return false;
}

inline bool overlaps(const TensorView& a, const TensorView& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  return detail::meet(detail::Layout(a), detail::Layout(b), 0, b.as<char>() - a.as<char>());
}

}  // namespace tilewright
