// One operation over the lanes of a warp. A functor takes and returns plain values of a type; registers of
// fewer than 32 bits are kept zero-extended.
#pragma once

#include <bit>

#include "decode.h"
#include "machine.h"

namespace ptx {

struct Half {  // bits of an f16
  uint16_t bits;
};
struct Brain {  // bits of a bf16
  uint16_t bits;
};

template <class T>
using Store = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
T get(Store<T> bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<T>(bits);
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    return T{static_cast<uint16_t>(bits)};
  }
}

template <class T>
Store<T> put(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<Store<T>>(value);
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<std::make_unsigned_t<T>>(value);
  } else {
    return value.bits;
  }
}

inline void mark(Warp& w, const Inst& i, Mask exec, Mask undefined) {
  if (undefined & exec) [[unlikely]]
    propagate(w, i, exec);
  else
    w.undefined[i.d] &= ~exec;
}

// Writes f(lane) to the lanes of the mask. f has no effect elsewhere, so that a part of a warp can compute it
// for all.
template <class D, class F>
void write_lanes(Warp& w, uint32_t slot, Mask exec, F f) {
  Store<D>* d = w.lane<D>(slot);
  if (exec == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) d[l] = f(l);
  } else {
    for (Mask left = exec; left; left &= left - 1) d[first_lane(left)] = f(first_lane(left));
  }
}

template <class D, class A, class Op>
void run1(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a]);
  const Store<A>* a = w.lane<A>(i.a);
  write_lanes<D>(w, i.d, exec, [&](int l) { return put<D>(Op()(get<A>(a[l]))); });
}

template <class D, class A, class B, class Op>
void run2(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b]);
  const Store<A>* a = w.lane<A>(i.a);
  const Store<B>* b = w.lane<B>(i.b);
  write_lanes<D>(w, i.d, exec, [&](int l) { return put<D>(Op()(get<A>(a[l]), get<B>(b[l]))); });
}

template <class D, class A, class B, class C, class Op>
void run3(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  const Store<A>* a = w.lane<A>(i.a);
  const Store<B>* b = w.lane<B>(i.b);
  const Store<C>* c = w.lane<C>(i.c);
  write_lanes<D>(w, i.d, exec, [&](int l) { return put<D>(Op()(get<A>(a[l]), get<B>(b[l]), get<C>(c[l]))); });
}

// The handler of a functor for an integer type; nullptr for any other. Bits are unsigned.
#define PTX_INTEGER_CASES(RUN) \
  case Type::kB16:             \
  case Type::kU16:             \
    return RUN(uint16_t);      \
  case Type::kB32:             \
  case Type::kU32:             \
    return RUN(uint32_t);      \
  case Type::kB64:             \
  case Type::kU64:             \
    return RUN(uint64_t);      \
  case Type::kS16:             \
    return RUN(int16_t);       \
  case Type::kS32:             \
    return RUN(int32_t);       \
  case Type::kS64:             \
    return RUN(int64_t);       \
  default:                     \
    return nullptr;

template <class Op>
Handler integer1(Type t) {
#define RUN(T) run1<T, T, Op>
  switch (t) { PTX_INTEGER_CASES(RUN) }
#undef RUN
}
template <class Op>
Handler integer2(Type t) {
#define RUN(T) run2<T, T, T, Op>
  switch (t) { PTX_INTEGER_CASES(RUN) }
#undef RUN
}
template <class Op>
Handler integer3(Type t) {
#define RUN(T) run3<T, T, T, T, Op>
  switch (t) { PTX_INTEGER_CASES(RUN) }
#undef RUN
}

inline Type unsigned_of(Type t) {
  switch (size_of(t)) {
    case 1:
      return Type::kU8;
    case 2:
      return Type::kU16;
    case 4:
      return Type::kU32;
    default:
      return Type::kU64;
  }
}

}  // namespace ptx
