// Rope (https://arxiv.org/abs/2104.09864) and appending to a cache, dense or paged
// (https://arxiv.org/abs/2309.06180). Each element is read and written once, so memory decides: 16 bytes a
// load, a block takes one token. Each product and sum is rounded by itself, as on the CPU.
#include <utility>

#include "convert.cuh"
#include "rope.h"

namespace tw::cuda {
namespace {

constexpr int kThreads = 256;

struct Place {
  int64_t position, page, slot;  // page -1: nowhere
};
__device__ Place place_of(const SlotArgs& a, uint32_t b, uint32_t t) {
  Place p;
  if (a.positions) {
    p.position = a.positions[b * a.positions_batch + t * a.positions_token];
  } else if (a.seqlens) {
    const int64_t at = b * a.seqlens_stride;
    p.position = t + (a.seqlens_64 ? static_cast<const int64_t*>(a.seqlens)[at]
                                   : static_cast<const int32_t*>(a.seqlens)[at]);
  } else {
    p.position = t;
  }
  // No cache has 2^31 slots, and a division of 64 bits is a call.
  const bool far = p.position < 0 || p.position > INT32_MAX;
  const uint32_t position = far ? 0 : static_cast<uint32_t>(p.position),
                 slots = static_cast<uint32_t>(a.slots);
  p.page = -1;
  p.slot = position;
  if (!a.table) {
    if (!far && position < slots) p.page = b;
  } else if (slots > 0) {
    const uint32_t index = position / slots;
    p.slot = position - index * slots;
    if (!far && index < a.table_blocks) p.page = a.table[b * a.table_batch + index * a.table_block];
    if (p.page >= a.pages) p.page = -1;
  }
  return p;
}

// Whether a later token goes to the same place.
__device__ bool taken_later(const SlotArgs& a, const Place& place, uint32_t token, uint32_t tokens,
                            uint32_t seq) {
  if (place.page < 0 || (!a.positions && !a.table)) return false;
  // Without positions those of one sequence differ.
  const uint32_t first = a.positions ? token + 1 : (token / seq + 1) * seq;
  for (uint32_t other = first + threadIdx.x; other < tokens; other += kThreads) {
    const Place p = place_of(a, other / seq, other % seq);
    if (p.page == place.page && p.slot == place.slot) return true;
  }
  return false;
}

template <int P>
__device__ void store_as(Type type, void* base, int64_t at, const float (&x)[P]) {
  switch (type) {
    case Type::f32:
      return store_floats<P>(static_cast<float*>(base) + at, x);
    case Type::bf16:
      return store_floats<P>(static_cast<bf16*>(base) + at, x);
    case Type::f16:
      return store_floats<P>(static_cast<f16*>(base) + at, x);
  }
}

// A thread moves P pairs of channels, or P channels where nothing is rotated.
template <class T, int P>
__global__ void __launch_bounds__(kThreads) move_kernel(const __grid_constant__ TokenArgs a) {
  const uint32_t seq = static_cast<uint32_t>(a.seq), token = blockIdx.x;
  const uint32_t b = token / seq, t = token - b * seq;
  const Place place = place_of(a.slot, b, t);
  const bool cached = a.parts[a.count - 1].to_cache;
  const bool write =
      !(cached && __syncthreads_or(taken_later(a.slot, place, token, gridDim.x, seq))) && place.page >= 0;

  int item = blockIdx.y * kThreads + threadIdx.x;
  for (int i = 0; i < a.count; ++i) {
    const TokenPart& part = a.parts[i];
    const int pairs = part.rotate ? a.half / P : 0, rest = part.dim / P - 2 * pairs;
    const int per_head = pairs + rest;
    if (item >= part.heads * per_head) {
      item -= part.heads * per_head;
      continue;
    }
    if (part.to_cache && !write) return;
    const int head = item / per_head, chunk = item - head * per_head;
    const T* in =
        static_cast<const T*>(part.in.base) + b * part.in.batch + head * part.in.head + t * part.in.token;
    const int64_t to = part.to_cache
                           ? place.page * part.out.batch + head * part.out.head + place.slot * part.out.token
                           : b * part.out.batch + head * part.out.head + t * part.out.token;
    float x[P], y[P];
    if (chunk >= pairs) {  // as it is
      const int channel = (chunk + pairs) * P;
      load_floats<P>(in + channel, x);
      store_as<P>(part.out_type, part.out.base, to + channel, x);
      return;
    }
    const int pair = chunk * P;
    const int first = a.interleaved ? 2 * pair : pair, second = a.interleaved ? first + P : a.half + pair;
    load_floats<P>(in + first, x);
    load_floats<P>(in + second, y);
    const bool known = place.position >= 0 && place.position < a.max_positions;
    const int64_t row = place.position;
    const float nan = __int_as_float(0x7fc00000);
    float both[2 * P];
#pragma unroll
    for (int j = 0; j < P; ++j) both[j] = x[j], both[P + j] = y[j];
    float cosines[P], sines[P];
    if (known) {
      load_floats<P>(a.cos + row * a.cos_stride + pair, cosines);
      load_floats<P>(a.sin + row * a.sin_stride + pair, sines);
    }
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float c = known ? cosines[j] : nan, s = known ? sines[j] : nan;
      const float u = a.interleaved ? both[2 * j] : x[j], v = a.interleaved ? both[2 * j + 1] : y[j];
      const float p = rounded<T>(__fsub_rn(__fmul_rn(u, c), __fmul_rn(v, s)));
      const float q = rounded<T>(__fadd_rn(__fmul_rn(v, c), __fmul_rn(u, s)));
      x[j] = p, y[j] = q;
    }
    if (a.interleaved) {
#pragma unroll
      for (int j = 0; j < P; ++j) both[2 * j] = x[j], both[2 * j + 1] = y[j];
#pragma unroll
      for (int j = 0; j < P; ++j) x[j] = both[j], y[j] = both[P + j];
    }
    store_as<P>(part.out_type, part.out.base, to + first, x);
    store_as<P>(part.out_type, part.out.base, to + second, y);
    return;
  }
}

bool aligned(const Heads& h, int64_t bytes, int64_t item) {
  return reinterpret_cast<uintptr_t>(h.base) % bytes == 0 && h.batch * item % bytes == 0 &&
         h.head * item % bytes == 0 && h.token * item % bytes == 0;
}

template <class T, int P>
cudaError_t launch(const TokenArgs& a, cudaStream_t stream) {
  int64_t items = 0;
  for (int i = 0; i < a.count; ++i)
    items += int64_t{a.parts[i].heads} * (a.parts[i].dim / P - (a.parts[i].rotate ? a.half / P : 0));
  if (items == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(a.batch * a.seq), static_cast<unsigned>(ceil_div(items, kThreads)));
  move_kernel<T, P><<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t move_tokens(const TokenArgs& a, cudaStream_t stream) {
  if (a.batch * a.seq == 0) return cudaSuccess;
  return with_type(a.type, [&](auto type) {
    using T = decltype(type);
    // A lane's angles are 16 bytes, so whole sectors are read of them, too.
    constexpr int kVec = 4;
    bool whole = a.half % kVec == 0;
    for (const auto& [angles, stride] : {std::pair{a.cos, a.cos_stride}, std::pair{a.sin, a.sin_stride}})
      whole &= reinterpret_cast<uintptr_t>(angles) % 16 == 0 && stride % kVec == 0;
    for (int i = 0; i < a.count; ++i) {
      const TokenPart& part = a.parts[i];
      const int64_t item = bytes_of(part.out_type);
      whole &= part.dim % kVec == 0 && aligned(part.in, kVec * sizeof(T), sizeof(T)) &&
               aligned(part.out, kVec * item, item);
    }
    return whole ? launch<T, kVec>(a, stream) : launch<T, 1>(a, stream);
  });
}

}  // namespace tw::cuda
