// f16 and bf16, alone and in pairs: computed in double with one rounding to the format.
#include "arithmetic.h"
#include "formats.h"
#include "lanes.h"

namespace ptx {
namespace {

// Inst::imm
enum { kFlush = 1, kSaturate = 2, kRelu = 4, kNan = 8, kXorSign = 16 };
enum class Op { kAdd, kSub, kMul, kFma, kMin, kMax, kAbs, kNeg, kEx2, kTanh };

template <bool kBf>
double decoded(uint32_t bits) {
  return kBf ? brain_to_float(static_cast<uint16_t>(bits)) : half_to_float(static_cast<uint16_t>(bits));
}

template <bool kBf, Op kOp>
uint32_t compute(uint32_t a, uint32_t b, uint32_t c, uint32_t imm) {
  const Format& format = kBf ? kBrain : kHalf;
  a &= 0xffff, b &= 0xffff, c &= 0xffff;
  const auto flush = [&](uint32_t x) { return imm & kFlush && !(x & 0x7c00) ? x & 0x8000 : x; };
  if constexpr (!kBf) a = flush(a), b = flush(b), c = flush(c);
  if constexpr (kOp == Op::kAbs) return a & 0x7fff;
  if constexpr (kOp == Op::kNeg) return a ^ 0x8000;
  const double x = decoded<kBf>(a), y = decoded<kBf>(b), z = decoded<kBf>(c);
  uint32_t r;
  if constexpr (kOp == Op::kMin || kOp == Op::kMax) {
    constexpr bool kIsMax = kOp == Op::kMax;
    const uint32_t sign = imm & kXorSign ? (a ^ b) & 0x8000 : 0;
    if (imm & kXorSign) a &= 0x7fff, b &= 0x7fff;
    const double u = imm & kXorSign ? std::fabs(x) : x, v = imm & kXorSign ? std::fabs(y) : y;
    if (u != u || v != v)
      r = (imm & kNan) || (u != u && v != v) ? kNan16 : (u != u ? b : a) | sign;
    else if (u == v)
      r = ((a >> 15 != 0) == kIsMax ? b : a) | sign;
    else
      r = ((u < v) == kIsMax ? b : a) | sign;
  } else {
    double exact = 0;
    if constexpr (kOp == Op::kAdd) exact = add_to_odd(x, y);
    if constexpr (kOp == Op::kSub) exact = add_to_odd(x, -y);
    if constexpr (kOp == Op::kMul) exact = x * y;
    if constexpr (kOp == Op::kFma) exact = add_to_odd(x * y, z);
    if constexpr (kOp == Op::kEx2) exact = std::exp2(x);
    if constexpr (kOp == Op::kTanh) exact = std::tanh(x);
    r = static_cast<uint32_t>(encode(exact, format, kNearestEven));
    if constexpr (!kBf) r = flush(r);
    if (kBf && kOp == Op::kEx2 && !(r & 0x7f80)) r = 0;  // .ftz
    const bool is_nan = (r & 0x7fff) > static_cast<uint32_t>(infinity_of(format));
    if (imm & kSaturate) {
      const uint32_t one = kBf ? 0x3f80 : 0x3c00;
      r = is_nan || r & 0x8000 ? 0 : std::min(r, one);
    }
    if (imm & kRelu && !is_nan && r & 0x8000) r = 0;
  }
  return r;
}

template <bool kBf, bool kPair, Op kOp>
void run_half(Warp& w, const Inst& i, Mask exec) {
  const uint32_t *a = w.lane<uint32_t>(i.a), *b = w.lane<uint32_t>(i.b), *c = w.lane<uint32_t>(i.c);
  const Mask undefined = (w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]) & exec;
  uint32_t shadow[kLanes];  // each half of a pair on its own
  for (Mask left = undefined; left; left &= left - 1) {
    const int l = first_lane(left);
    const uint64_t u = w.shadow(i.a, false, l) | w.shadow(i.b, false, l) | w.shadow(i.c, false, l);
    shadow[l] = (u & 0xffff ? 0xffff : 0) | (u >> 16 && kPair ? 0xffff0000 : 0);
  }
  w.undefined[i.d] &= ~exec;
  for (Mask left = undefined; left; left &= left - 1)
    w.set_shadow(i.d, false, first_lane(left), shadow[first_lane(left)]);
  write_lanes<uint32_t>(w, i.d, exec, [&](int l) {
    uint32_t r = compute<kBf, kOp>(a[l], b[l], c[l], i.imm);
    if (kPair) r |= compute<kBf, kOp>(a[l] >> 16, b[l] >> 16, c[l] >> 16, i.imm) << 16;
    return r;
  });
}

template <Op kOp>
void emit(Decoder& d, Type t, uint32_t imm, int sources) {
  const bool brain = t == Type::kBF16 || t == Type::kBF16x2, pair = t == Type::kF16x2 || t == Type::kBF16x2;
  const Handler run = brain ? (pair ? run_half<true, true, kOp> : run_half<true, false, kOp>)
                            : (pair ? run_half<false, true, kOp> : run_half<false, false, kOp>);
  // Written .b16 or .b32 in registers.
  const Type r = pair ? Type::kB32 : Type::kB16;
  d.i.imm = imm;
  if (sources == 1) d.emit(run, r, {r});
  if (sources == 2) d.emit(run, r, {r, r});
  if (sources == 3) d.emit(run, r, {r, r, r});
}

uint32_t modifiers(Decoder& d, Type t, bool relu) {
  uint32_t imm = 0;
  d.take("rn");
  if (d.take("ftz")) imm |= kFlush;
  if (d.take("sat")) imm |= kSaturate;
  if (relu && d.take("relu")) imm |= kRelu;
  if (imm & (kFlush | kSaturate) && (t == Type::kBF16 || t == Type::kBF16x2)) d.unsupported();
  return imm;
}

template <Op kOp>
void decode_function(Decoder& d, bool flushes_bf16) {
  if (!d.take("approx")) d.unsupported();
  const bool flush = d.take("ftz");
  const Type t = d.type();
  const bool brain = t == Type::kBF16 || t == Type::kBF16x2;
  if (!is_half(t) || flush != (flushes_bf16 && brain)) d.unsupported();
  emit<kOp>(d, t, 0, 1);
}

}  // namespace

bool is_half(Type t) {
  return t == Type::kF16 || t == Type::kF16x2 || t == Type::kBF16 || t == Type::kBF16x2;
}

void decode_half1(Decoder& d, Type t, Float1 op) {
  if (op == Float1::kAbs)
    emit<Op::kAbs>(d, t, 0, 1);
  else
    emit<Op::kNeg>(d, t, 0, 1);
}

void decode_half2(Decoder& d, Type t, Float2 op) {
  if (op == Float2::kMin || op == Float2::kMax) {
    uint32_t imm = d.take("ftz") ? kFlush : 0;
    if (d.take("NaN")) imm |= kNan;
    if (d.take("xorsign")) imm |= d.take("abs") ? kXorSign : (d.unsupported(), 0);
    d.type();
    return op == Float2::kMin ? emit<Op::kMin>(d, t, imm, 2) : emit<Op::kMax>(d, t, imm, 2);
  }
  // The noftz of atomics has no place here; what is not taken is refused.
  const uint32_t imm = modifiers(d, t, false);
  d.type();
  if (op == Float2::kAdd) return emit<Op::kAdd>(d, t, imm, 2);
  if (op == Float2::kSub) return emit<Op::kSub>(d, t, imm, 2);
  if (op == Float2::kMul) return emit<Op::kMul>(d, t, imm, 2);
  d.unsupported();
}

void decode_half3(Decoder& d, Type t) {
  const uint32_t imm = modifiers(d, t, true);
  d.type();
  emit<Op::kFma>(d, t, imm, 3);
}

void decode_half_ex2(Decoder& d) { decode_function<Op::kEx2>(d, true); }
void decode_half_tanh(Decoder& d) { decode_function<Op::kTanh>(d, false); }

}  // namespace ptx
