// f32 and f64 arithmetic. A result that is NaN is the canonical one.
#include <cfenv>

#include "arithmetic.h"
#include "formats.h"
#include "lanes.h"

namespace ptx {
namespace {

// Inst::imm
enum { kRounding = 3, kFlush = 4, kSaturate = 8 };

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return canonical(a + b);
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return canonical(a - b);
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return canonical(a * b);
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return canonical(a / b);
  }
};
struct DivApproximate {  // .approx: zero for a very large divisor, as documented
  float operator()(float a, float b) const {
    if (std::fabs(b) > 0x1p126f && !std::isinf(b) && !std::isnan(b))
      return std::isinf(a) || std::isnan(a)
                 ? std::bit_cast<float>(kNan32)
                 : std::copysign(0.0f, std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f);
    return canonical(a / b);
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return canonical(std::fma(a, b, c));
  }
};
template <bool kIsMax, bool kNan>
struct Extreme {
  template <class T>
  T operator()(T a, T b) const {
    if (a != a || b != b) return canonical(kNan ? a + b : a != a ? b : a);
    if (a == b) return std::signbit(a) == kIsMax ? b : a;  // -0 is below +0
    return (a < b) == kIsMax ? b : a;
  }
};
template <bool kIsMax, bool kNan>
struct ExtremeXorSign {  // the larger or smaller magnitude, its sign the product's
  float operator()(float a, float b) const {
    const float m = Extreme<kIsMax, kNan>()(std::fabs(a), std::fabs(b));
    return m != m ? m : std::copysign(m, std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f);
  }
};
struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return canonical(std::sqrt(a));
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return canonical(1 / a);
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return -a;
  }
};
struct CopySign {  // of a onto b
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};

template <class T>
T flush(T x) {
  if constexpr (sizeof(T) == 4)
    return flushed(x);
  else
    return x;
}

template <class Op>
struct Flushed {
  template <class... T>
  auto operator()(T... x) const {
    return flush(Op()(flush(x)...));
  }
};

// Any rounding, with or without flushing and saturation. The operation stands between two calls that the
// compiler cannot see through, so that it is not moved out of the rounding mode.
template <class T, int kSources, class Op>
void run_general(Warp& w, const Inst& i, Mask exec) {
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  const Store<T>*a = w.lane<T>(i.a), *b = w.lane<T>(i.b), *c = w.lane<T>(i.c);
  std::fesetround(kModes[i.imm & kRounding]);
  asm volatile("" ::: "memory");
  write_lanes<T>(w, i.d, exec, [&](int l) {
    const auto in = [&](Store<T> bits) { return i.imm & kFlush ? flush(get<T>(bits)) : get<T>(bits); };
    T r;
    if constexpr (kSources == 1) r = Op()(in(a[l]));
    if constexpr (kSources == 2) r = Op()(in(a[l]), in(b[l]));
    if constexpr (kSources == 3) r = Op()(in(a[l]), in(b[l]), in(c[l]));
    if (i.imm & kFlush) r = flush(r);
    if (i.imm & kSaturate) r = saturated(r);
    return put<T>(r);
  });
  asm volatile("" ::: "memory");
  std::fesetround(FE_TONEAREST);
}

template <class T, int kSources, class Op>
Handler pick(uint32_t imm) {
  if (imm == 0) {
    if constexpr (kSources == 1) return run1<T, T, Op>;
    if constexpr (kSources == 2) return run2<T, T, T, Op>;
    if constexpr (kSources == 3) return run3<T, T, T, T, Op>;
  }
  if (imm == kFlush) {
    if constexpr (kSources == 1) return run1<T, T, Flushed<Op>>;
    if constexpr (kSources == 2) return run2<T, T, T, Flushed<Op>>;
    if constexpr (kSources == 3) return run3<T, T, T, T, Flushed<Op>>;
  }
  return run_general<T, kSources, Op>;
}

template <int kSources, class Op>
void emit(Decoder& d, Type t, uint32_t imm) {
  d.i.imm = imm;
  if (t == Type::kF64 && imm & (kFlush | kSaturate)) d.unsupported();
  const Handler run = t == Type::kF32 ? pick<float, kSources, Op>(imm) : pick<double, kSources, Op>(imm);
  if (kSources == 1) d.emit(run, t, {t});
  if (kSources == 2) d.emit(run, t, {t, t});
  if (kSources == 3) d.emit(run, t, {t, t, t});
}

bool rounding(Decoder& d, uint32_t& imm) {
  const std::string_view r = d.take_any({"rn", "rz", "rm", "rp"});
  imm |= r == "rz" ? kTowardsZero : r == "rm" ? kDown : r == "rp" ? kUp : kNearestEven;
  return !r.empty();
}

bool is_float(Decoder& d) {
  for (const std::string_view name : {"f32", "f64", "f16", "f16x2", "bf16", "bf16x2"})
    if (d.has(name)) return true;
  return false;
}

template <bool kIsMax>
void decode_extreme(Decoder& d) {
  const bool nan = d.take("NaN"), xorsign = d.take("xorsign");
  if (xorsign && !d.take("abs")) d.unsupported();
  const uint32_t imm = d.take("ftz") ? kFlush : 0;
  const Type t = d.type();
  if (xorsign) {
    if (t != Type::kF32) d.unsupported();
    d.i.imm = imm;
    return d.emit(nan ? pick<float, 2, ExtremeXorSign<kIsMax, true>>(imm)
                      : pick<float, 2, ExtremeXorSign<kIsMax, false>>(imm),
                  t, {t, t});
  }
  if (nan && t == Type::kF64) d.unsupported();
  if (nan)
    emit<2, Extreme<kIsMax, true>>(d, t, imm);
  else
    emit<2, Extreme<kIsMax, false>>(d, t, imm);
}

void decode_div(Decoder& d) {
  uint32_t imm = 0;
  const std::string_view kind = d.take_any({"approx", "full"});
  if (rounding(d, imm) == !kind.empty()) d.unsupported("without a rounding");
  if (d.take("ftz")) imm |= kFlush;
  const Type t = d.type();
  if (!kind.empty() && t != Type::kF32) d.unsupported();
  if (kind == "approx")
    emit<2, DivApproximate>(d, t, imm);
  else
    emit<2, Div>(d, t, imm);
}

// rcp.approx.ftz.f64 looks at the upper half of its operand's bits and gives the upper half of a result;
// compilers refine it themselves.
struct ReciprocalOfUpperHalf {
  double operator()(double a) const {
    constexpr uint64_t kUpper = 0xffffffff00000000ull;
    const double x = std::bit_cast<double>(std::bit_cast<uint64_t>(a) & kUpper);
    const double r = canonical(1 / (std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x));
    return std::fabs(r) < 0x1p-1022 ? std::copysign(0.0, r)
                                    : std::bit_cast<double>(std::bit_cast<uint64_t>(r) & kUpper);
  }
};

// sqrt and rcp, exactly rounded; .approx is computed the same.
template <class Op>
void decode_root(Decoder& d) {
  uint32_t imm = 0;
  const bool approximate = d.take("approx");
  if (rounding(d, imm) == approximate) d.unsupported("without a rounding");
  if (d.take("ftz")) imm |= kFlush;
  const Type t = d.type();
  if (std::is_same_v<Op, Reciprocal> && approximate && t == Type::kF64 && imm == kFlush)
    return d.emit(run1<double, double, ReciprocalOfUpperHalf>, t, {t});
  if ((t != Type::kF32 && t != Type::kF64) || (approximate && t != Type::kF32)) d.unsupported();
  emit<1, Op>(d, t, imm);
}

enum Property { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };
template <class T>
void run_testp(Warp& w, const Inst& i, Mask exec) {
  Mask r = 0;
  for (int l = 0; l < kLanes; ++l) {
    const T x = get<T>(w.lane<T>(i.a)[l]);
    const int c = std::fpclassify(x);
    bool yes = false;
    switch (i.imm) {
      case kFinite:
        yes = c != FP_NAN && c != FP_INFINITE;
        break;
      case kInfinite:
        yes = c == FP_INFINITE;
        break;
      case kNumber:
        yes = c != FP_NAN;
        break;
      case kNotANumber:
        yes = c == FP_NAN;
        break;
      case kNormal:
        yes = c == FP_NORMAL;
        break;
      case kSubnormal:
        yes = c == FP_SUBNORMAL;
        break;
    }
    r |= yes ? 1u << l : 0;
  }
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | (w.undefined[i.a] & exec);
  w.predicate(i.d) = (w.predicate(i.d) & ~exec) | (r & exec);
}

void decode_testp(Decoder& d) {
  constexpr std::string_view kNames[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  const std::string_view op =
      d.take_any({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  for (uint32_t n = 0; n < 6; ++n)
    if (kNames[n] == op) d.i.imm = n;
  const Type t = d.type();
  if (op.empty() || (t != Type::kF32 && t != Type::kF64)) d.unsupported();
  d.emit(t == Type::kF32 ? run_testp<float> : run_testp<double>, Type::kPred, {t});
}

}  // namespace

bool decode_float1(Decoder& d, Float1 op) {
  if (!is_float(d)) return false;
  uint32_t imm = d.take("ftz") ? kFlush : 0;
  const Type t = d.type();
  if (is_half(t)) {
    if (imm) d.unsupported("flushing subnormal halves");
    decode_half1(d, t, op);
  } else if (op == Float1::kAbs) {
    emit<1, Abs>(d, t, imm);
  } else {
    emit<1, Neg>(d, t, imm);
  }
  return true;
}

bool decode_float2(Decoder& d, Float2 op) {
  if (!is_float(d)) return false;
  for (const std::string_view name : {"f16", "f16x2", "bf16", "bf16x2"})
    if (d.has(name)) {
      decode_half2(d, type_named(name), op);
      return true;
    }
  if (op == Float2::kMin) decode_extreme<false>(d);
  if (op == Float2::kMax) decode_extreme<true>(d);
  if (op == Float2::kDiv) decode_div(d);
  if (op > Float2::kMul) return true;
  uint32_t imm = 0;
  rounding(d, imm);
  if (d.take("ftz")) imm |= kFlush;
  if (d.take("sat")) imm |= kSaturate;
  const Type t = d.type();
  if (op == Float2::kAdd) emit<2, Add>(d, t, imm);
  if (op == Float2::kSub) emit<2, Sub>(d, t, imm);
  if (op == Float2::kMul) emit<2, Mul>(d, t, imm);
  return true;
}

bool decode_float3(Decoder& d) {
  if (!is_float(d)) return false;
  for (const std::string_view name : {"f16", "f16x2", "bf16", "bf16x2"})
    if (d.has(name)) {
      decode_half3(d, type_named(name));
      return true;
    }
  uint32_t imm = 0;
  if (!rounding(d, imm)) d.unsupported("without a rounding");
  if (d.take("ftz")) imm |= kFlush;
  if (d.take("sat")) imm |= kSaturate;
  emit<3, Fma>(d, d.type(), imm);
  return true;
}

void add_float(Opcodes& o) {
  o["fma"] = [](Decoder& d) {
    if (!decode_float3(d)) d.unsupported();
  };
  o["sqrt"] = decode_root<Sqrt>;
  o["rcp"] = decode_root<Reciprocal>;
  o["copysign"] = [](Decoder& d) {
    const Type t = d.type();
    if (t != Type::kF32 && t != Type::kF64) d.unsupported();
    emit<2, CopySign>(d, t, 0);
  };
  o["testp"] = decode_testp;
}

}  // namespace ptx
