// A copy: memory decides, so 16 bytes a thread where everything lies at multiples of 16.
#include <algorithm>

#include "gather.h"

namespace tw::cuda {
namespace {

constexpr int kThreads = 256;

// UNIT: what a thread moves, `size` elements.
template <class UNIT>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArgs a, int size) {
  const int64_t from_row = a.from_index ? a.from_index[blockIdx.x] : blockIdx.x;
  const int64_t to_row = a.to_index ? a.to_index[blockIdx.x] : blockIdx.x;
  if (from_row < 0 || from_row >= a.from_rows || to_row < 0 || to_row >= a.to_rows) return;
  const uint32_t per_token = a.dim / size, per_head = per_token * a.tokens, all = per_head * a.heads;
#pragma unroll 1
  for (uint32_t i = blockIdx.y * kThreads + threadIdx.x; i < all; i += gridDim.y * kThreads) {
    const uint32_t head = i / per_head, token = (i - head * per_head) / per_token;
    const uint32_t at = (i - head * per_head - token * per_token) * size;
    const int64_t from = from_row * a.from.batch + head * a.from.head + token * a.from.token + at;
    const int64_t to = to_row * a.to.batch + head * a.to.head + token * a.to.token + at;
    *reinterpret_cast<UNIT*>(static_cast<char*>(a.to.base) + to * a.item) =
        *reinterpret_cast<const UNIT*>(static_cast<const char*>(a.from.base) + from * a.item);
  }
}

template <class UNIT>
cudaError_t launch(const GatherArgs& a, cudaStream_t stream) {
  const int64_t units = int64_t{a.heads} * a.tokens * a.dim * a.item / int64_t{sizeof(UNIT)};
  if (units >= int64_t{1} << 31) return cudaErrorInvalidValue;
  // Some blocks a row, each with 8 units a thread, up to what fills a GPU.
  const unsigned parts = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(units, kThreads * 8), 1, 1024));
  gather_kernel<UNIT><<<dim3(static_cast<unsigned>(a.count), parts), kThreads, 0, stream>>>(
      a, static_cast<int>(sizeof(UNIT)) / a.item);
  return cudaGetLastError();
}

bool aligned(const Heads& h, int item) {
  return reinterpret_cast<uintptr_t>(h.base) % 16 == 0 && h.batch * item % 16 == 0 &&
         h.head * item % 16 == 0 && h.token * item % 16 == 0;
}

}  // namespace

cudaError_t gather(const GatherArgs& a, cudaStream_t stream) {
  if (a.count == 0 || a.heads == 0 || a.tokens == 0 || a.dim == 0) return cudaSuccess;
  if (a.dim * a.item % 16 == 0 && aligned(a.from, a.item) && aligned(a.to, a.item))
    return launch<uint4>(a, stream);
  if (a.item == 4) return launch<uint32_t>(a, stream);
  if (a.item == 2) return launch<uint16_t>(a, stream);
  return a.item == 1 ? launch<uint8_t>(a, stream) : cudaErrorInvalidValue;
}

}  // namespace tw::cuda
