// Integer arithmetic, and add, sub, mul, mad, fma, min, max, abs and neg for all types: each asks for its
// type first.
#include "arithmetic.h"
#include "lanes.h"

namespace ptx {
namespace {

template <class T>
using Bits = std::make_unsigned_t<T>;
template <class T>
constexpr T kMin = std::is_signed_v<T> ? static_cast<T>(Bits<T>{1} << (8 * sizeof(T) - 1)) : T{0};
template <class T>
constexpr T kMax = static_cast<T>(~kMin<T>);

template <class T>
using Wide = std::conditional_t<
    std::is_signed_v<T>,
    std::conditional_t<sizeof(T) == 2, int32_t, std::conditional_t<sizeof(T) == 4, int64_t, __int128>>,
    std::conditional_t<sizeof(T) == 2, uint32_t,
                       std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>>>;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Bits<T>>(a) + static_cast<Bits<T>>(b));
  }
};
struct AddSaturated {
  int32_t operator()(int32_t a, int32_t b) const {
    return static_cast<int32_t>(std::clamp<int64_t>(int64_t{a} + b, kMin<int32_t>, kMax<int32_t>));
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Bits<T>>(a) - static_cast<Bits<T>>(b));
  }
};
struct SubSaturated {
  int32_t operator()(int32_t a, int32_t b) const {
    return static_cast<int32_t>(std::clamp<int64_t>(int64_t{a} - b, kMin<int32_t>, kMax<int32_t>));
  }
};
struct MulLo {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct MulHi {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b) >> 8 * sizeof(T));
  }
};
struct MadLo {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(MulLo()(a, b), c);
  }
};
struct MadHi {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(MulHi()(a, b), c);
  }
};
struct MadHiSaturated {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const { return AddSaturated()(MulHi()(a, b), c); }
};
struct MulWide {
  template <class T>
  Wide<T> operator()(T a, T b) const {
    return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b));
  }
};
struct MadWide {
  template <class T>
  Wide<T> operator()(T a, T b, Wide<T> c) const {
    return Add()(MulWide()(a, b), c);
  }
};
// The low 24 bits of each: mul24.lo the low half of 48 bits, mul24.hi bits 16 to 47.
template <bool kHi>
struct Mul24 {
  template <class T>
  T operator()(T a, T b) const {
    const auto low = [](T x) {
      return static_cast<int64_t>(static_cast<T>(static_cast<Bits<T>>(x) << 8) >> 8);
    };
    return static_cast<T>(low(a) * low(b) >> (kHi ? 16 : 0));
  }
};
template <bool kHi>
struct Mad24 {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(Mul24<kHi>()(a, b), c);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Sub()(T{0}, a) : a;
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return Sub()(T{0}, a);
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(c, a < b ? Sub()(b, a) : Sub()(a, b));
  }
};

// Division by zero gives an unspecified value: here an undefined one, so that whoever uses it is told.
template <class T, bool kRemainder>
void run_divide(Warp& w, const Inst& i, Mask exec) {
  const Store<T>*a = w.lane<T>(i.a), *b = w.lane<T>(i.b);
  Mask by_zero = 0;
  for (int l = 0; l < kLanes; ++l) by_zero |= get<T>(b[l]) == 0 ? 1u << l : 0;
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b]);
  write_lanes<T>(w, i.d, exec, [&](int l) {
    const T x = get<T>(a[l]), y = get<T>(b[l]);
    if (y == 0) return put<T>(static_cast<T>(~T{0}));
    if (std::is_signed_v<T> && y == static_cast<T>(-1)) return put<T>(kRemainder ? T{0} : Neg()(x));
    return put<T>(static_cast<T>(kRemainder ? x % y : x / y));
  });
  for (Mask bad = by_zero & exec; bad; bad &= bad - 1)
    w.set_shadow(i.d, sizeof(T) == 8, first_lane(bad), ~0ull);
}

template <bool kRemainder>
Handler divide(Type t) {
#define RUN(T) run_divide<T, kRemainder>
  switch (t) { PTX_INTEGER_CASES(RUN) }
#undef RUN
}

// add.cc, addc, sub.cc, subc, mad.cc, madc: imm says which.
enum { kCarryIn = 1, kCarryOut = 2, kSubtract = 4, kMultiply = 8, kHigh = 16 };
template <class T>
void run_carry(Warp& w, const Inst& i, Mask exec) {
  using U = Bits<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    U a = static_cast<U>(w.lane<T>(i.a)[l]), b = static_cast<U>(w.lane<T>(i.b)[l]);
    if (i.imm & kMultiply) {
      const T x = static_cast<T>(a), y = static_cast<T>(b);
      a = static_cast<U>(i.imm & kHigh ? MulHi()(x, y) : MulLo()(x, y));
      b = static_cast<U>(w.lane<T>(i.c)[l]);
    }
    const unsigned __int128 in = i.imm & kCarryIn ? w.carry >> l & 1 : 0;
    const unsigned __int128 sum = i.imm & kSubtract ? static_cast<unsigned __int128>(a) - b - in
                                                    : static_cast<unsigned __int128>(a) + b + in;
    w.lane<T>(i.d)[l] = static_cast<Store<T>>(static_cast<U>(sum));
    if (i.imm & kCarryOut) w.carry = (w.carry & ~(1u << l)) | static_cast<Mask>(sum >> kBits & 1) << l;
  }
}

void emit_carry(Decoder& d, Type t, uint32_t what) {
  if (d.take("cc")) what |= kCarryOut;
  d.i.imm = what;
  const bool wide = size_of(t) == 8;
  if (size_of(t) < 4) d.unsupported();
  const Handler run = wide ? (t == Type::kS64 ? run_carry<int64_t> : run_carry<uint64_t>)
                           : (t == Type::kS32 ? run_carry<int32_t> : run_carry<uint32_t>);
  if (what & kMultiply)
    d.emit(run, t, {t, t, t});
  else
    d.emit(run, t, {t, t});
}

// Numbers, not bits: add.b32 does not exist.
Type number_type(Decoder& d) {
  const Type t = d.type();
  if (t < Type::kU16 || t > Type::kS64 || t == Type::kS8) d.unsupported();
  return t;
}

template <bool kSubtracts>
void decode_add(Decoder& d) {
  const bool carries = d.take("cc");
  if (!carries && decode_float2(d, kSubtracts ? Float2::kSub : Float2::kAdd)) return;
  const bool saturated = d.take("sat");
  const Type t = number_type(d);
  if (carries) return emit_carry(d, t, (kSubtracts ? kSubtract : 0) | kCarryOut);
  if (saturated) {
    if (t != Type::kS32) d.unsupported();
    return d.emit(kSubtracts ? run2<int32_t, int32_t, int32_t, SubSaturated>
                             : run2<int32_t, int32_t, int32_t, AddSaturated>,
                  t, {t, t});
  }
  const Type u = unsigned_of(t);
  d.emit(kSubtracts ? integer2<Sub>(u) : integer2<Add>(u), u, {u, u}, Rule::kAdd);
}

template <bool kSubtracts>
void decode_addc(Decoder& d) {
  const Type t = number_type(d);
  emit_carry(d, t, kCarryIn | (kSubtracts ? kSubtract : 0));
}

template <class Op>
Handler wide2(Type t) {
  switch (t) {
    case Type::kU16:
      return run2<uint32_t, uint16_t, uint16_t, Op>;
    case Type::kS16:
      return run2<int32_t, int16_t, int16_t, Op>;
    case Type::kU32:
      return run2<uint64_t, uint32_t, uint32_t, Op>;
    case Type::kS32:
      return run2<int64_t, int32_t, int32_t, Op>;
    default:
      return nullptr;
  }
}
template <class Op>
Handler wide3(Type t) {
  switch (t) {
    case Type::kU16:
      return run3<uint32_t, uint16_t, uint16_t, uint32_t, Op>;
    case Type::kS16:
      return run3<int32_t, int16_t, int16_t, int32_t, Op>;
    case Type::kU32:
      return run3<uint64_t, uint32_t, uint32_t, uint64_t, Op>;
    case Type::kS32:
      return run3<int64_t, int32_t, int32_t, int64_t, Op>;
    default:
      return nullptr;
  }
}

Type widened(Type t) { return size_of(t) == 2 ? Type::kU32 : Type::kU64; }

void decode_mul(Decoder& d) {
  const std::string_view part = d.take_any({"lo", "hi", "wide"});
  if (part.empty()) {
    if (!decode_float2(d, Float2::kMul)) d.unsupported();
    return;
  }
  const Type t = number_type(d);
  if (part == "wide") return d.emit(wide2<MulWide>(t), widened(t), {t, t});
  if (part == "lo") return d.emit(integer2<MulLo>(t), t, {t, t}, Rule::kAdd);
  d.emit(integer2<MulHi>(t), t, {t, t});
}

void decode_mad(Decoder& d) {
  const bool carries = d.take("cc");
  const std::string_view part = d.take_any({"lo", "hi", "wide"});
  if (part.empty()) {
    if (carries || !decode_float3(d)) d.unsupported();
    return;
  }
  const bool saturated = d.take("sat");
  const Type t = number_type(d);
  if (carries) {
    if (part == "wide") d.unsupported();
    return emit_carry(d, t, kMultiply | kCarryOut | (part == "hi" ? kHigh : 0));
  }
  if (saturated) {
    if (part != "hi" || t != Type::kS32) d.unsupported();
    return d.emit(run3<int32_t, int32_t, int32_t, int32_t, MadHiSaturated>, t, {t, t, t});
  }
  if (part == "wide") return d.emit(wide3<MadWide>(t), widened(t), {t, t, widened(t)});
  if (part == "lo") return d.emit(integer3<MadLo>(t), t, {t, t, t}, Rule::kAdd);
  d.emit(integer3<MadHi>(t), t, {t, t, t});
}

void decode_madc(Decoder& d) {
  const std::string_view part = d.take_any({"lo", "hi"});
  if (part.empty()) d.unsupported();
  const bool out = d.take("cc");
  const Type t = number_type(d);
  emit_carry(d, t, kMultiply | kCarryIn | (part == "hi" ? kHigh : 0) | (out ? kCarryOut : 0));
}

template <template <bool> class Op, bool kThree>
void decode_24(Decoder& d) {
  const std::string_view part = d.take_any({"lo", "hi"});
  const Type t = number_type(d);
  if (part.empty() || (t != Type::kU32 && t != Type::kS32)) d.unsupported();
  if constexpr (kThree)
    d.emit(part == "hi" ? integer3<Op<true>>(t) : integer3<Op<false>>(t), t, {t, t, t});
  else
    d.emit(part == "hi" ? integer2<Op<true>>(t) : integer2<Op<false>>(t), t, {t, t});
}

template <bool kIsMax>
void decode_extreme(Decoder& d) {
  if (decode_float2(d, kIsMax ? Float2::kMax : Float2::kMin)) return;
  const Type t = number_type(d);
  d.emit(kIsMax ? integer2<Max>(t) : integer2<Min>(t), t, {t, t});
}

template <bool kNegates>
void decode_sign(Decoder& d) {
  if (decode_float1(d, kNegates ? Float1::kNeg : Float1::kAbs)) return;
  const Type t = number_type(d);
  if (t != Type::kS16 && t != Type::kS32 && t != Type::kS64) d.unsupported();
  d.emit(kNegates ? integer1<Neg>(t) : integer1<Abs>(t), t, {t}, kNegates ? Rule::kAdd : Rule::kAll);
}

template <bool kRemainder>
void decode_divide(Decoder& d) {
  if (!kRemainder && decode_float2(d, Float2::kDiv)) return;
  const Type t = number_type(d);
  d.emit(divide<kRemainder>(t), t, {t, t});
}

// dp4a and dp2a: bytes of a times bytes (halves of a times bytes) of b, plus c. imm: 1 a signed, 2 b signed,
// 4 the upper bytes of b.
template <bool kFour>
void run_dot(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  write_lanes<uint32_t>(w, i.d, exec, [&](int l) {
    const uint32_t a = w.lane<uint32_t>(i.a)[l], b = w.lane<uint32_t>(i.b)[l];
    uint32_t sum = w.lane<uint32_t>(i.c)[l];
    for (uint32_t k = 0; k < (kFour ? 4u : 2u); ++k) {
      const uint32_t bits = kFour ? 8 : 16;
      const uint32_t x = a >> bits * k & (kFour ? 0xffu : 0xffffu),
                     y = b >> 8 * (k + (i.imm & 4 ? 2 : 0)) & 0xff;
      const int32_t sx = kFour ? static_cast<int8_t>(x) : static_cast<int16_t>(x);
      sum += (i.imm & 1 ? static_cast<uint32_t>(sx) : x) *
             (i.imm & 2 ? static_cast<uint32_t>(static_cast<int8_t>(y)) : y);
    }
    return sum;
  });
}

template <bool kFour>
void decode_dot(Decoder& d) {
  if (!kFour) {
    const std::string_view part = d.take_any({"lo", "hi"});
    if (part.empty()) d.unsupported();
    if (part == "hi") d.i.imm |= 4;
  }
  const Type a = d.type(), b = d.type();
  for (const Type t : {a, b})
    if (t != Type::kU32 && t != Type::kS32) d.unsupported();
  d.i.imm |= (a == Type::kS32) | (b == Type::kS32) << 1;
  d.emit(run_dot<kFour>, Type::kB32, {Type::kB32, Type::kB32, Type::kB32});
}

}  // namespace

void add_integer(Opcodes& o) {
  o["add"] = decode_add<false>;
  o["sub"] = decode_add<true>;
  o["addc"] = decode_addc<false>;
  o["subc"] = decode_addc<true>;
  o["mul"] = decode_mul;
  o["mad"] = decode_mad;
  o["madc"] = decode_madc;
  o["mul24"] = decode_24<Mul24, false>;
  o["mad24"] = decode_24<Mad24, true>;
  o["min"] = decode_extreme<false>;
  o["max"] = decode_extreme<true>;
  o["abs"] = decode_sign<false>;
  o["neg"] = decode_sign<true>;
  o["div"] = decode_divide<false>;
  o["rem"] = decode_divide<true>;
  o["sad"] = [](Decoder& d) {
    const Type t = number_type(d);
    d.emit(integer3<Sad>(t), t, {t, t, t});
  };
  o["dp4a"] = decode_dot<true>;
  o["dp2a"] = decode_dot<false>;
}

}  // namespace ptx
