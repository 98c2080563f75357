// setp, set, selp, slct.
#include "formats.h"
#include "lanes.h"

namespace ptx {
namespace {

enum Compare : uint32_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
enum Combine : uint32_t { kNone, kAnd, kOr, kXor };
// Inst::imm: 0..3 comparison, 4..5 combination, 6 the third operand is negated, 7 flush, 8 set's result
// is 1.0.
constexpr uint32_t kNegated = 1 << 6, kFlush = 1 << 7, kResultShift = 8;

template <class T>
bool compare(T a, T b, uint32_t op) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = a != a || b != b;
  switch (op) {
    case kEq:
      return a == b;
    case kNe:
      return !unordered && a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return unordered || a == b;
    case kNeu:
      return unordered || a != b;
    case kLtu:
      return unordered || a < b;
    case kLeu:
      return unordered || a <= b;
    case kGtu:
      return unordered || a > b;
    case kGeu:
      return unordered || a >= b;
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}

template <class T>
auto value(Store<T> bits, uint32_t imm) {
  if constexpr (std::is_same_v<T, Half>) {
    return half_to_float(static_cast<uint16_t>(imm & kFlush && !(bits & 0x7c00) ? bits & 0x8000 : bits));
  } else if constexpr (std::is_same_v<T, Brain>) {
    return brain_to_float(static_cast<uint16_t>(bits));
  } else if constexpr (std::is_same_v<T, float>) {
    return imm & kFlush ? flushed(get<T>(bits)) : get<T>(bits);
  } else {
    return get<T>(bits);
  }
}

template <class T>
Mask compare_lanes(Warp& w, const Inst& i, uint32_t shift = 0) {
  const Store<T>*a = w.lane<T>(i.a), *b = w.lane<T>(i.b);
  Mask r = 0;
  const auto all = [&](auto op) {
    for (int l = 0; l < kLanes; ++l)
      r |= static_cast<Mask>(compare(value<T>(a[l] >> shift, i.imm), value<T>(b[l] >> shift, i.imm), op))
           << l;
  };
  switch (i.imm & 15) {  // a constant in the loop: it vectorises
    case kEq:
      all(std::integral_constant<uint32_t, kEq>());
      break;
    case kNe:
      all(std::integral_constant<uint32_t, kNe>());
      break;
    case kLt:
      all(std::integral_constant<uint32_t, kLt>());
      break;
    case kGe:
      all(std::integral_constant<uint32_t, kGe>());
      break;
    default:
      all(i.imm & 15);
  }
  return r;
}

// The comparison combined with the third operand; what is not known of either is not known of the result,
// unless the other one decides.
struct Result {
  Mask value, undefined;
};
Result combine(Warp& w, const Inst& i, Mask r, Mask u) {
  const uint32_t how = i.imm >> 4 & 3;
  if (how == kNone) return {r, u};
  const Mask c = i.imm & kNegated ? ~w.predicate(i.c) : w.predicate(i.c), uc = w.undefined[i.c];
  if (how == kAnd) return {r & c, (u | uc) & (u | r) & (uc | c)};
  if (how == kOr) return {r | c, (u | uc) & (u | ~r) & (uc | ~c)};
  return {r ^ c, u | uc};
}

void write_predicate(Warp& w, uint32_t slot, Mask exec, Result r) {
  if (slot == kNoSlot) return;
  w.predicate(slot) = (w.predicate(slot) & ~exec) | (r.value & exec);
  w.undefined[slot] = (w.undefined[slot] & ~exec) | (r.undefined & exec);
}

template <class T>
void run_setp(Warp& w, const Inst& i, Mask exec) {
  const Mask r = compare_lanes<T>(w, i), u = w.undefined[i.a] | w.undefined[i.b];
  const Result p = combine(w, i, r, u);
  if (i.detail) write_predicate(w, i.detail->slots[0], exec, combine(w, i, ~r, u));
  write_predicate(w, i.d, exec, p);
}

// Of a pair of halves: a predicate for each.
template <class T>
void run_setp_pair(Warp& w, const Inst& i, Mask exec) {
  const Mask low = compare_lanes<T>(w, i), high = compare_lanes<T>(w, i, 16),
             u = w.undefined[i.a] | w.undefined[i.b];
  const Result p = combine(w, i, low, u), q = combine(w, i, high, u);
  write_predicate(w, i.d, exec, p);
  if (i.detail) write_predicate(w, i.detail->slots[0], exec, q);
}

template <class T, bool kPair>
void run_set(Warp& w, const Inst& i, Mask exec) {
  const Mask u = w.undefined[i.a] | w.undefined[i.b];
  const Result low = combine(w, i, compare_lanes<T>(w, i), u);
  const Result high = kPair ? combine(w, i, compare_lanes<T>(w, i, 16), u) : Result{};
  constexpr uint32_t kTrue[] = {0xffffffff, 0x3f800000, 0x3c00, 0x3f80, 0xffff};
  const uint32_t yes = kTrue[i.imm >> kResultShift];
  write_lanes<uint32_t>(w, i.d, exec, [&](int l) {
    uint32_t r = low.value >> l & 1 ? yes : 0;
    if (kPair) r |= (high.value >> l & 1 ? yes : 0) << 16;
    return r;
  });
  w.undefined[i.d] &= ~exec;
  for (Mask left = (low.undefined | high.undefined) & exec; left; left &= left - 1)
    w.set_shadow(i.d, false, first_lane(left), 0xffffffff);
}

uint32_t comparison(Decoder& d, Type& t) {
  constexpr std::string_view kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                         "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  uint32_t op = ~0u;
  for (uint32_t n = 0; n < 14 && op == ~0u; ++n)
    if (d.take(kNames[n])) op = n;
  // Unsigned spellings of the integers.
  constexpr std::pair<std::string_view, Compare> kUnsigned[] = {
      {"lo", kLt}, {"ls", kLe}, {"hi", kGt}, {"hs", kGe}};
  for (const auto& [name, same] : kUnsigned)
    if (op == ~0u && d.take(name)) op = same;
  if (op == ~0u) d.unsupported();
  const std::string_view combination = d.take_any({"and", "or", "xor"});
  op |= (combination == "and" ? kAnd : combination == "or" ? kOr : combination == "xor" ? kXor : kNone) << 4;
  if (d.take("ftz")) op |= kFlush;
  t = d.type();
  return op;
}

void check_order(Decoder& d, Type t) {
  if ((d.i.imm & 15) > kGe && t < Type::kF16) d.unsupported("integers are never unordered");
}

Handler setp_handler(Type t) {
  switch (t) {
    case Type::kB16:
    case Type::kU16:
      return run_setp<uint16_t>;
    case Type::kB32:
    case Type::kU32:
      return run_setp<uint32_t>;
    case Type::kB64:
    case Type::kU64:
      return run_setp<uint64_t>;
    case Type::kS16:
      return run_setp<int16_t>;
    case Type::kS32:
      return run_setp<int32_t>;
    case Type::kS64:
      return run_setp<int64_t>;
    case Type::kF16:
      return run_setp<Half>;
    case Type::kBF16:
      return run_setp<Brain>;
    case Type::kF16x2:
      return run_setp_pair<Half>;
    case Type::kBF16x2:
      return run_setp_pair<Brain>;
    case Type::kF32:
      return run_setp<float>;
    case Type::kF64:
      return run_setp<double>;
    default:
      return nullptr;
  }
}

Handler set_handler(Type t) {
  switch (t) {
    case Type::kU16:
      return run_set<uint16_t, false>;
    case Type::kB32:
    case Type::kU32:
      return run_set<uint32_t, false>;
    case Type::kU64:
      return run_set<uint64_t, false>;
    case Type::kS16:
      return run_set<int16_t, false>;
    case Type::kS32:
      return run_set<int32_t, false>;
    case Type::kS64:
      return run_set<int64_t, false>;
    case Type::kF16:
      return run_set<Half, false>;
    case Type::kBF16:
      return run_set<Brain, false>;
    case Type::kF16x2:
      return run_set<Half, true>;
    case Type::kBF16x2:
      return run_set<Brain, true>;
    case Type::kF32:
      return run_set<float, false>;
    case Type::kF64:
      return run_set<double, false>;
    default:
      return nullptr;
  }
}

// Registers of halves are .b16 and .b32.
Type register_of(Type t) {
  if (t == Type::kF16 || t == Type::kBF16) return Type::kB16;
  if (t == Type::kF16x2 || t == Type::kBF16x2) return Type::kB32;
  return t;
}

void operands(Decoder& d, Type t) {
  const bool combines = d.i.imm >> 4 & 3;
  d.expect_operands(combines ? 4 : 3, combines ? 4 : 3);
  d.i.a = d.source(1, register_of(t)), d.i.b = d.source(2, register_of(t));
  if (combines) {
    d.i.c = d.source(3, Type::kPred);
    if (d.negated(3)) d.i.imm |= kNegated;
  }
}

void decode_setp(Decoder& d) {
  Type t;
  d.i.imm = comparison(d, t);
  check_order(d, t);
  operands(d, t);
  const auto predicate = [&](const Operand& o) {
    return o.kind == Operand::kSink ? kNoSlot : d.register_slot(o, Type::kPred, nullptr);
  };
  const Operand& p = d.operand(0);
  if (p.kind == Operand::kPair) {
    d.i.d = predicate(p.elements[0]);
    d.detail().slots = {predicate(p.elements[1])};
  } else {
    d.i.d = predicate(p);
  }
  d.emit(setp_handler(t));
}

void decode_set(Decoder& d) {
  Type to;  // stands first, the operands' type second
  d.i.imm = comparison(d, to);
  const Type t = d.type();
  check_order(d, t);
  operands(d, t);
  const bool pair = t == Type::kF16x2 || t == Type::kBF16x2;
  uint32_t kind = 0;
  switch (to) {
    case Type::kU32:
    case Type::kS32:
      kind = pair ? 4 : 0;
      break;
    case Type::kF32:
      kind = 1;
      break;
    case Type::kF16:
    case Type::kF16x2:
      kind = 2;
      break;
    case Type::kBF16:
    case Type::kBF16x2:
      kind = 3;
      break;
    case Type::kU16:
    case Type::kS16:
      kind = 4;
      break;
    default:
      d.unsupported();
  }
  d.i.imm |= kind << kResultShift;
  d.i.d = d.dest(0, pair ? Type::kB32 : register_of(to));
  d.emit(set_handler(t));
}

template <class T>
void run_selp(Warp& w, const Inst& i, Mask exec) {
  constexpr bool kWide = sizeof(T) == 8;
  const Mask p = w.predicate(i.c);
  const T *a = w.lane<T>(i.a), *b = w.lane<T>(i.b);
  if ((w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]) & exec) {
    for (Mask left = exec; left; left &= left - 1) {
      const int l = first_lane(left);
      uint64_t s = w.shadow(p >> l & 1 ? i.a : i.b, kWide, l);
      // Either one may be chosen: the bits in which they differ are not known.
      if (w.undefined[i.c] >> l & 1) s = w.shadow(i.a, kWide, l) | w.shadow(i.b, kWide, l) | (a[l] ^ b[l]);
      const T v = p >> l & 1 ? a[l] : b[l];
      w.set_shadow(i.d, kWide, l, s);
      w.lane<T>(i.d)[l] = v;
    }
    return;
  }
  w.undefined[i.d] &= ~exec;
  write_lanes<T>(w, i.d, exec, [&](int l) { return p >> l & 1 ? a[l] : b[l]; });
}

void decode_selp(Decoder& d) {
  const Type t = register_of(d.type());
  if (size_of(t) < 2) d.unsupported();
  d.emit(size_of(t) == 8 ? run_selp<uint64_t> : run_selp<uint32_t>, t, {t, t, Type::kPred});
  if (d.negated(3)) d.unsupported();
}

// slct.t.s32 d, a, b, c: c >= 0 ? a : b
template <class T, bool kFloat>
void run_slct(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  const T *a = w.lane<T>(i.a), *b = w.lane<T>(i.b);
  write_lanes<T>(w, i.d, exec, [&](int l) {
    const uint32_t c = w.lane<uint32_t>(i.c)[l];
    const bool first = kFloat ? value<float>(c, i.imm) >= 0 : static_cast<int32_t>(c) >= 0;
    return first ? a[l] : b[l];
  });
}

void decode_slct(Decoder& d) {
  if (d.take("ftz")) d.i.imm = kFlush;
  const Type t = d.type(), c = d.type();
  if ((c != Type::kS32 && c != Type::kF32) || size_of(t) < 2) d.unsupported();
  const bool wide = size_of(t) == 8;
  d.emit(c == Type::kF32 ? (wide ? run_slct<uint64_t, true> : run_slct<uint32_t, true>)
                         : (wide ? run_slct<uint64_t, false> : run_slct<uint32_t, false>),
         t, {t, t, c});
}

}  // namespace

void add_compare(Opcodes& o) {
  o["setp"] = decode_setp;
  o["set"] = decode_set;
  o["selp"] = decode_selp;
  o["slct"] = decode_slct;
}

}  // namespace ptx
