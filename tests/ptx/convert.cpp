// cvt, between all sizes of integers and floats.
#include <algorithm>
#include <cfenv>

#include "formats.h"
#include "lanes.h"

namespace ptx {
namespace {

struct Conversion {
  Type to, from;
  Rounding rounding = kNearestEven;
  bool integral = false;  // to an integral value: rni, rzi, rmi, rpi
  bool saturate = false, flush = false, relu = false, finite = false;
};
// In Inst::imm.
uint32_t pack(const Conversion& c) {
  return static_cast<uint32_t>(c.to) | static_cast<uint32_t>(c.from) << 8 | c.rounding << 16 |
         c.integral << 20 | c.saturate << 21 | c.flush << 22 | c.relu << 23 | c.finite << 24;
}
Conversion unpack(uint32_t u) {
  return {static_cast<Type>(u & 0xff),
          static_cast<Type>(u >> 8 & 0xff),
          static_cast<Rounding>(u >> 16 & 0xf),
          (u >> 20 & 1) != 0,
          (u >> 21 & 1) != 0,
          (u >> 22 & 1) != 0,
          (u >> 23 & 1) != 0,
          (u >> 24 & 1) != 0};
}

bool is_signed(Type t) { return t >= Type::kS8 && t <= Type::kS64; }
bool is_integer(Type t) { return t >= Type::kU8 && t <= Type::kS64; }

const Format& format_of(Type t) {
  switch (t) {
    case Type::kF16:
    case Type::kF16x2:
      return kHalf;
    case Type::kBF16:
    case Type::kBF16x2:
      return kBrain;
    case Type::kTF32:
      return kTensorFloat;
    case Type::kF64:
      return kDouble;
    default:
      return kSingle;
  }
}

using Int = __int128;

Int integer_value(uint64_t bits, Type t) {
  const uint32_t n = 8 * static_cast<uint32_t>(size_of(t));
  if (is_signed(t)) return static_cast<int64_t>(bits << (64 - n)) >> (64 - n);
  return static_cast<Int>(n == 64 ? bits : bits & ((1ull << n) - 1));
}

double float_value(uint64_t bits, Type t) {
  switch (t) {
    case Type::kF16:
      return half_to_float(static_cast<uint16_t>(bits));
    case Type::kBF16:
      return brain_to_float(static_cast<uint16_t>(bits));
    case Type::kF64:
      return std::bit_cast<double>(bits);
    default:
      return std::bit_cast<float>(static_cast<uint32_t>(bits));
  }
}

Int lowest(Type t) { return is_signed(t) ? -(Int{1} << (8 * size_of(t) - 1)) : 0; }
Int highest(Type t) { return (Int{1} << (8 * size_of(t) - (is_signed(t) ? 1 : 0))) - 1; }

double to_integral(double x, Rounding r) {
  switch (r) {
    case kTowardsZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

uint64_t finish_float(double x, const Conversion& c) {
  const Format& f = format_of(c.to);
  if (c.flush && std::fabs(x) < 0x1p-126 && (c.from == Type::kF32)) x = std::copysign(0.0, x);
  if (c.integral) x = to_integral(x, c.rounding);
  if (c.saturate) x = saturated(x);
  if (c.relu && x < 0) x = 0;
  if (c.relu && x == 0) x = 0;
  uint64_t bits = encode(x, f, c.integral ? kNearestEven : c.rounding);
  if (c.finite && !std::isnan(x) && (bits & (infinity_of(f) | (infinity_of(f) - 1))) >= infinity_of(f))
    --bits;
  if (c.to == Type::kF32 && c.flush)
    bits = std::bit_cast<uint32_t>(flushed(std::bit_cast<float>(static_cast<uint32_t>(bits))));
  if (c.to == Type::kTF32) bits <<= 13;
  if (c.to == Type::kF64 && std::isnan(x)) bits = 0x7ff8000000000000ull;
  return bits;
}

uint64_t convert(uint64_t bits, const Conversion& c) {
  if (is_integer(c.from) && is_integer(c.to)) {
    Int v = integer_value(bits, c.from);
    if (c.saturate) v = std::clamp(v, lowest(c.to), highest(c.to));
    return static_cast<uint64_t>(integer_value(static_cast<uint64_t>(v), c.to));
  }
  if (is_integer(c.from)) {
    const Int v = integer_value(bits, c.from);
    const bool negative = v < 0;
    const uint64_t magnitude = static_cast<uint64_t>(negative ? -v : v);
    if (c.to == Type::kF64) {
      constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
      std::fesetround(kModes[c.rounding]);
      volatile uint64_t in = magnitude;
      volatile double out = negative ? -static_cast<double>(in) : static_cast<double>(in);
      if (negative && (c.rounding == kDown || c.rounding == kUp)) {  // the magnitude rounds the other way
        std::fesetround(c.rounding == kDown ? FE_UPWARD : FE_DOWNWARD);
        out = -static_cast<double>(in);
      }
      std::fesetround(FE_TONEAREST);
      return std::bit_cast<uint64_t>(static_cast<double>(out));
    }
    const double high = static_cast<double>(magnitude >> 32) * 0x1p32,
                 low = static_cast<double>(magnitude & 0xffffffff);
    const double x = add_to_odd(high, low);
    return finish_float(negative ? -x : x, c);
  }
  double x = float_value(bits, c.from);
  if (is_integer(c.to)) {
    if (c.flush && std::fabs(x) < 0x1p-126) x = 0;
    if (x != x) return 0;
    x = to_integral(x, c.rounding);
    // Out of range clamps. 2^63 and 2^64 are doubles; the largest integers below them are not.
    const Int lo = lowest(c.to), hi = highest(c.to);
    const Int v = x >= 0x1p100 ? hi : x <= -0x1p100 ? lo : std::clamp(static_cast<Int>(x), lo, hi);
    return static_cast<uint64_t>(v);
  }
  return finish_float(x, c);
}

uint64_t kept(uint64_t bits, Type reg) {
  return size_of(reg) == 8 ? bits : bits & ((1ull << 8 * size_of(reg)) - 1);
}

// Undefined bits: of integers they move with the bits, a sign's into all copies of it.
uint64_t shadow_of(uint64_t s, const Conversion& c) {
  if (!s) return 0;
  if (!is_integer(c.from) || !is_integer(c.to) || c.saturate) return ~0ull;
  const auto n = static_cast<uint32_t>(8 * size_of(c.from));
  return static_cast<uint64_t>(integer_value(s, c.from)) &
         (is_signed(c.from) || n == 64 ? ~0ull : (1ull << n) - 1);
}

void run_general(Warp& w, const Inst& i, Mask exec) {
  const Conversion c = unpack(i.imm);
  const auto reg = static_cast<Type>(i.c);  // of the destination
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const uint64_t s = kept(shadow_of(kept(w.shadow(i.a, i.a_wide, l), c.from), c), reg);
    const uint64_t v = kept(convert(w.value(i.a, i.a_wide, l), c), reg);
    w.set_shadow(i.d, i.d_wide, l, s);
    w.set_value(i.d, i.d_wide, l, v);
  }
}

template <class D, class S>
void run_integer(Warp& w, const Inst& i, Mask exec) {
  if (w.undefined[i.a] & exec) return run_general(w, i, exec);
  w.undefined[i.d] &= ~exec;
  const Store<S>* a = w.lane<S>(i.a);
  write_lanes<D>(w, i.d, exec, [&](int l) { return put<D>(static_cast<D>(get<S>(a[l]))); });
}

struct BrainToFloat {
  float operator()(Brain x) const { return brain_to_float(x.bits); }
};
struct HalfToFloat {
  float operator()(Half x) const { return half_to_float(x.bits); }
};
struct FloatToBrain {
  Brain operator()(float x) const { return {float_to_brain(x)}; }
};
struct FloatToHalf {
  Half operator()(float x) const { return {static_cast<uint16_t>(encode(x, kHalf, kNearestEven))}; }
};
template <class T>
struct ToFloat {
  float operator()(T x) const { return static_cast<float>(x); }
};

template <class D>
Handler from_integer(Type from) {
  switch (from) {
    case Type::kU16:
      return run_integer<D, uint16_t>;
    case Type::kS16:
      return run_integer<D, int16_t>;
    case Type::kU32:
      return run_integer<D, uint32_t>;
    case Type::kS32:
      return run_integer<D, int32_t>;
    case Type::kU64:
      return run_integer<D, uint64_t>;
    case Type::kS64:
      return run_integer<D, int64_t>;
    default:
      return nullptr;
  }
}

// A handler for what compilers emit often, or nullptr.
Handler fast(const Conversion& c) {
  if (c.integral || c.saturate || c.flush || c.relu || c.finite || c.rounding != kNearestEven) return nullptr;
  if (is_integer(c.from) && is_integer(c.to)) {
    switch (c.to) {
      case Type::kU16:
        return from_integer<uint16_t>(c.from);
      case Type::kS16:
        return from_integer<int16_t>(c.from);
      case Type::kU32:
        return from_integer<uint32_t>(c.from);
      case Type::kS32:
        return from_integer<int32_t>(c.from);
      case Type::kU64:
        return from_integer<uint64_t>(c.from);
      case Type::kS64:
        return from_integer<int64_t>(c.from);
      default:
        return nullptr;
    }
  }
  if (c.to == Type::kF32) {
    if (c.from == Type::kBF16) return run1<float, Brain, BrainToFloat>;
    if (c.from == Type::kF16) return run1<float, Half, HalfToFloat>;
    if (c.from == Type::kS32) return run1<float, int32_t, ToFloat<int32_t>>;
    if (c.from == Type::kU32) return run1<float, uint32_t, ToFloat<uint32_t>>;
  }
  if (c.from == Type::kF32) {
    if (c.to == Type::kBF16) return run1<Brain, float, FloatToBrain>;
    if (c.to == Type::kF16) return run1<Half, float, FloatToHalf>;
  }
  return nullptr;
}

// cvt.rn.bf16x2.f32 d, a, b: a is the upper half.
void run_pair(Warp& w, const Inst& i, Mask exec) {
  Conversion c = unpack(i.imm);
  const bool plain_brain = c.to == Type::kBF16x2 && c.rounding == kNearestEven && !c.relu && !c.finite;
  const uint32_t *a = w.lane<uint32_t>(i.a), *b = w.lane<uint32_t>(i.b);
  const Mask ua = w.undefined[i.a], ub = w.undefined[i.b];
  w.undefined[i.d] &= ~exec;
  for (Mask left = (ua | ub) & exec; left; left &= left - 1) {
    const int l = first_lane(left);
    w.set_shadow(i.d, false, l, (ua >> l & 1 ? 0xffff0000u : 0) | (ub >> l & 1 ? 0xffffu : 0));
  }
  if (plain_brain) {
    write_lanes<uint32_t>(w, i.d, exec, [&](int l) {
      return static_cast<uint32_t>(float_to_brain(std::bit_cast<float>(a[l]))) << 16 |
             float_to_brain(std::bit_cast<float>(b[l]));
    });
  } else {
    write_lanes<uint32_t>(w, i.d, exec, [&](int l) {
      return static_cast<uint32_t>(convert(a[l], c) << 16 | convert(b[l], c));
    });
  }
}

// cvt.pack.sat.s8.s32.b32 d, a, b, c: a and b, saturated, above the rest of c.
void run_pack(Warp& w, const Inst& i, Mask exec) {
  const Conversion c = unpack(i.imm);
  const auto n = static_cast<uint32_t>(8 * size_of(c.to));
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  write_lanes<uint32_t>(w, i.d, exec, [&](int l) {
    const uint64_t mask = (1ull << n) - 1;
    const uint64_t a = convert(w.lane<uint32_t>(i.a)[l], c) & mask,
                   b = convert(w.lane<uint32_t>(i.b)[l], c) & mask;
    return static_cast<uint32_t>((n == 16 ? 0 : static_cast<uint64_t>(w.lane<uint32_t>(i.c)[l]) << 16) |
                                 a << n | b);
  });
}

void decode_pack(Decoder& d) {
  Conversion c;
  if (!d.take("sat")) d.unsupported();
  c.saturate = true;
  c.to = d.type(), c.from = d.type();
  const bool bytes = c.to == Type::kU8 || c.to == Type::kS8;
  if (c.from != Type::kS32 || (!bytes && c.to != Type::kU16 && c.to != Type::kS16)) d.unsupported();
  d.i.imm = pack(c);
  const Type t = Type::kB32;
  if (!bytes) return d.emit(run_pack, t, {t, t});
  if (d.type() != t) d.unsupported();
  d.emit(run_pack, t, {t, t, t});
}

void decode_cvt(Decoder& d) {
  if (d.take("pack")) return decode_pack(d);
  Conversion c;
  const std::string_view r = d.take_any({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  c.integral = r.ends_with('i');
  const std::string_view way = c.integral ? r.substr(0, 2) : r;
  c.rounding = way == "rz"    ? kTowardsZero
               : way == "rm"  ? kDown
               : way == "rp"  ? kUp
               : way == "rna" ? kNearestAway
                              : kNearestEven;
  c.saturate = d.take("sat"), c.flush = d.take("ftz"), c.relu = d.take("relu"),
  c.finite = d.take("satfinite");
  c.to = d.type(), c.from = d.type();
  if (c.to == Type::kF16x2 || c.to == Type::kBF16x2) {
    if (c.from != Type::kF32 || r.empty() || c.integral || c.saturate || c.flush) d.unsupported();
    d.i.imm = pack(c);
    return d.emit(run_pair, Type::kB32, {Type::kF32, Type::kF32});
  }
  for (const Type t : {c.to, c.from})
    if (t == Type::kPred || (t >= Type::kB8 && t <= Type::kB64) || t == Type::kF16x2 || t == Type::kBF16x2)
      d.unsupported();
  const bool to_integer = is_integer(c.to), from_integer = is_integer(c.from);
  if (c.to == Type::kTF32 && (c.from != Type::kF32 || r.empty() || c.saturate || c.flush)) d.unsupported();
  if (c.from == Type::kTF32) d.unsupported();
  // Integer rounding: to an integer from a float, or between floats of one size. Float rounding: where bits
  // are lost.
  if (to_integer && from_integer && !r.empty()) d.unsupported();
  if (to_integer && !from_integer && !c.integral) d.unsupported("without integer rounding");
  if (!to_integer && from_integer && (r.empty() || c.integral)) d.unsupported("without float rounding");
  if (!to_integer && !from_integer) {
    const bool narrows =
        size_of(c.to) < size_of(c.from) || (c.to != c.from && size_of(c.to) == size_of(c.from));
    if (narrows && (r.empty() || c.integral)) d.unsupported("without float rounding");
    if (!narrows && !r.empty() && !c.integral && c.to == c.from) d.unsupported();
  }
  if ((c.relu || c.finite) && (to_integer || from_integer)) d.unsupported();
  d.expect_operands(2, 2);
  d.i.imm = pack(c);
  d.i.d = d.register_slot(d.operand(0), c.to, &d.i.d_wide);
  d.i.a = d.source(d.operand(1), c.from, &d.i.a_wide);
  const Type reg = d.register_type(d.operand(0));
  if (size_of(reg) < size_of(c.to)) d.unsupported("a register too small");
  d.i.c = static_cast<uint32_t>(reg);
  d.i.bits = static_cast<uint8_t>(8 * size_of(c.from));
  Handler run = nullptr;
  const bool same = size_of(reg) == size_of(c.to) && d.i.a_wide == (size_of(c.from) == 8);
  if (same) run = fast(c);
  // Only run1 follows Rule::kAll through i.b and i.c; the general handler keeps the register's type in i.c.
  if (run && !(to_integer && from_integer)) d.i.b = d.i.c = d.i.a;
  d.emit(run ? run : run_general);
}

}  // namespace

void add_convert(Opcodes& o) { o["cvt"] = decode_cvt; }

}  // namespace ptx
