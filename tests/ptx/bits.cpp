// and, or, xor, not, cnot, lop3, shifts, prmt, bit fields, counts.
#include "bits.h"

#include "lanes.h"

namespace ptx {
namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return static_cast<T>(shl(a, n, 8 * sizeof(T)));
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t n) const {
    if constexpr (std::is_signed_v<T>)
      return static_cast<T>(a >> std::min<uint32_t>(n, 8 * sizeof(T) - 1));
    else
      return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a >> n);
  }
};
struct Count {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(std::popcount(a));
  }
};
struct CountLeadingZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(std::countl_zero(a));
  }
};
struct Reverse {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(reverse(a, 8 * sizeof(T)));
  }
};
// The highest bit that differs from the sign; kShift: how far it is from the top.
template <bool kShift>
struct FindHighest {
  template <class T>
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    U u = static_cast<U>(a);
    if (std::is_signed_v<T> && a < 0) u = static_cast<U>(~u);
    if (u == 0) return ~0u;
    const auto zeros = static_cast<uint32_t>(std::countl_zero(u));
    return kShift ? zeros : static_cast<uint32_t>(8 * sizeof(T)) - 1 - zeros;
  }
};
struct Extract {
  template <class T>
  T operator()(T a, uint32_t at, uint32_t n) const {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(extract(static_cast<U>(a), at, n, 8 * sizeof(T), std::is_signed_v<T>));
  }
};

// Predicates: three-valued, as a known false makes an and false whatever the other is.
template <class Op, int kKind>
void run_predicates(Warp& w, const Inst& i, Mask exec) {
  const Mask a = w.predicate(i.a), b = w.predicate(i.b), ua = w.undefined[i.a], ub = w.undefined[i.b];
  Mask u = 0;
  if (ua | ub) {
    if (kKind == 0) u = (ua | ub) & (ua | a) & (ub | b);
    if (kKind == 1) u = (ua | ub) & (ua | ~a) & (ub | ~b);
    if (kKind == 2) u = ua | ub;
  }
  w.predicate(i.d) = (w.predicate(i.d) & ~exec) | (Op()(a, b) & exec);
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | (u & exec);
}

void run_not_predicate(Warp& w, const Inst& i, Mask exec) {
  const Mask a = w.predicate(i.a), u = w.undefined[i.a];
  w.predicate(i.d) = (w.predicate(i.d) & ~exec) | (~a & exec);
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | (u & exec);
}

template <class Op, int kKind>
void decode_logic(Decoder& d) {
  const Type t = d.type();
  if (t == Type::kPred) {
    d.expect_operands(3, 3);
    d.i.d = d.dest(0, t), d.i.a = d.source(1, t), d.i.b = d.source(2, t);
    if (d.negated(1) || d.negated(2)) d.unsupported();
    return d.emit(run_predicates<Op, kKind>);
  }
  constexpr uint32_t kTables[] = {0xc0, 0xfc, 0x3c};
  d.i.imm = kTables[kKind];
  d.emit(integer2<Op>(unsigned_of(t)), t, {t, t}, Rule::kLogic);
  if (t != Type::kB16 && t != Type::kB32 && t != Type::kB64) d.unsupported();
}

void decode_not(Decoder& d) {
  const Type t = d.type();
  if (t == Type::kPred) {
    d.expect_operands(2, 2);
    d.i.d = d.dest(0, t), d.i.a = d.source(1, t);
    return d.emit(run_not_predicate);
  }
  d.i.imm = 0x0f;
  d.emit(integer1<Not>(unsigned_of(t)), t, {t}, Rule::kLogic);
}

void run_lop3(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  const uint32_t *a = w.lane<uint32_t>(i.a), *b = w.lane<uint32_t>(i.b), *c = w.lane<uint32_t>(i.c);
  write_lanes<uint32_t>(w, i.d, exec,
                        [&](int l) { return static_cast<uint32_t>(lop3(a[l], b[l], c[l], i.imm)); });
}

void decode_lop3(Decoder& d) {
  if (d.type() != Type::kB32) d.unsupported();
  d.expect_operands(5, 5);
  if (d.operand(4).kind != Operand::kInteger) d.unsupported();
  d.i.imm = static_cast<uint32_t>(d.operand(4).value) & 0xff;
  d.i.d = d.dest(0, Type::kB32);
  d.i.a = d.source(1, Type::kB32), d.i.b = d.source(2, Type::kB32), d.i.c = d.source(3, Type::kB32);
  d.i.rule = Rule::kLogic;
  d.emit(run_lop3);
}

void decode_shl(Decoder& d) {
  const Type t = d.type();
  const Handler run = size_of(t) == 2   ? run2<uint16_t, uint16_t, uint32_t, ShiftLeft>
                      : size_of(t) == 4 ? run2<uint32_t, uint32_t, uint32_t, ShiftLeft>
                                        : run2<uint64_t, uint64_t, uint32_t, ShiftLeft>;
  if (t != Type::kB16 && t != Type::kB32 && t != Type::kB64) d.unsupported();
  d.emit(run, t, {t, Type::kU32}, Rule::kShl);
}

void decode_shr(Decoder& d) {
  const Type t = d.type();
  Handler run = nullptr;
  switch (t) {
    case Type::kB16:
    case Type::kU16:
      run = run2<uint16_t, uint16_t, uint32_t, ShiftRight>;
      break;
    case Type::kB32:
    case Type::kU32:
      run = run2<uint32_t, uint32_t, uint32_t, ShiftRight>;
      break;
    case Type::kB64:
    case Type::kU64:
      run = run2<uint64_t, uint64_t, uint32_t, ShiftRight>;
      break;
    case Type::kS16:
      run = run2<int16_t, int16_t, uint32_t, ShiftRight>;
      break;
    case Type::kS32:
      run = run2<int32_t, int32_t, uint32_t, ShiftRight>;
      break;
    case Type::kS64:
      run = run2<int64_t, int64_t, uint32_t, ShiftRight>;
      break;
    default:
      d.unsupported();
  }
  const bool is_signed = t == Type::kS16 || t == Type::kS32 || t == Type::kS64;
  d.emit(run, t, {t, Type::kU32}, is_signed ? Rule::kShrSigned : Rule::kShr);
}

template <class Op>
void run_with_mode(Warp& w, const Inst& i, Mask exec) {
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c]);
  const uint32_t *a = w.lane<uint32_t>(i.a), *b = w.lane<uint32_t>(i.b), *c = w.lane<uint32_t>(i.c);
  write_lanes<uint32_t>(w, i.d, exec, [&](int l) { return Op()(a[l], b[l], c[l], i.imm); });
}
struct Funnel {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c, uint32_t mode) const {
    return funnel(a, b, c, mode);
  }
};
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c, uint32_t mode) const {
    return permute(a, b, c, mode);
  }
};

void decode_shf(Decoder& d) {
  const std::string_view direction = d.take_any({"l", "r"}), mode = d.take_any({"wrap", "clamp"});
  const Type t = d.type();
  if (direction.empty() || mode.empty() || t != Type::kB32) d.unsupported();
  d.i.imm = (direction == "r") | (mode == "clamp") << 1;
  d.emit(run_with_mode<Funnel>, t, {t, t, Type::kU32}, Rule::kFunnel);
}

void decode_prmt(Decoder& d) {
  const Type t = d.type();
  if (t != Type::kB32) d.unsupported();
  constexpr std::string_view kModes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (uint32_t m = 1; m < 7; ++m)
    if (d.take(kModes[m])) d.i.imm = m;
  d.emit(run_with_mode<Permute>, t, {t, t, t}, Rule::kPermute);
}

void decode_bfe(Decoder& d) {
  const Type t = d.type();
  Handler run = nullptr;
  switch (t) {
    case Type::kU32:
      run = run3<uint32_t, uint32_t, uint32_t, uint32_t, Extract>;
      break;
    case Type::kS32:
      run = run3<int32_t, int32_t, uint32_t, uint32_t, Extract>;
      break;
    case Type::kU64:
      run = run3<uint64_t, uint64_t, uint32_t, uint32_t, Extract>;
      break;
    case Type::kS64:
      run = run3<int64_t, int64_t, uint32_t, uint32_t, Extract>;
      break;
    default:
      d.unsupported();
  }
  d.emit(run, t, {t, Type::kU32, Type::kU32},
         t == Type::kS32 || t == Type::kS64 ? Rule::kExtractSigned : Rule::kExtract);
}

template <class T>
void run_bfi(Warp& w, const Inst& i, Mask exec) {
  const uint32_t n = i.detail->slots[0];
  mark(w, i, exec, w.undefined[i.a] | w.undefined[i.b] | w.undefined[i.c] | w.undefined[n]);
  write_lanes<T>(w, i.d, exec, [&](int l) {
    return static_cast<Store<T>>(insert(w.lane<T>(i.a)[l], w.lane<T>(i.b)[l], w.lane<uint32_t>(i.c)[l],
                                        w.lane<uint32_t>(n)[l], 8 * sizeof(T)));
  });
}

void decode_bfi(Decoder& d) {
  const Type t = d.type();
  if (t != Type::kB32 && t != Type::kB64) d.unsupported();
  d.expect_operands(5, 5);
  const bool wide = t == Type::kB64;
  d.i.d = d.dest(0, t), d.i.a = d.source(1, t), d.i.b = d.source(2, t), d.i.c = d.source(3, Type::kU32);
  d.i.d_wide = d.i.a_wide = d.i.b_wide = wide;
  d.i.bits = wide ? 64 : 32;
  d.i.rule = Rule::kInsert;
  d.detail().slots = {d.source(4, Type::kU32)};
  d.emit(wide ? run_bfi<uint64_t> : run_bfi<uint32_t>);
}

template <class Op>
void decode_count(Decoder& d) {
  const Type t = d.type();
  if (t != Type::kB32 && t != Type::kB64) d.unsupported();
  d.emit(t == Type::kB32 ? run1<uint32_t, uint32_t, Op> : run1<uint32_t, uint64_t, Op>, Type::kU32, {t});
}

void decode_bfind(Decoder& d) {
  const bool shift = d.take("shiftamt");
  const Type t = d.type();
  Handler run = nullptr;
  switch (t) {
    case Type::kU32:
      run =
          shift ? run1<uint32_t, uint32_t, FindHighest<true>> : run1<uint32_t, uint32_t, FindHighest<false>>;
      break;
    case Type::kS32:
      run = shift ? run1<uint32_t, int32_t, FindHighest<true>> : run1<uint32_t, int32_t, FindHighest<false>>;
      break;
    case Type::kU64:
      run =
          shift ? run1<uint32_t, uint64_t, FindHighest<true>> : run1<uint32_t, uint64_t, FindHighest<false>>;
      break;
    case Type::kS64:
      run = shift ? run1<uint32_t, int64_t, FindHighest<true>> : run1<uint32_t, int64_t, FindHighest<false>>;
      break;
    default:
      d.unsupported();
  }
  d.emit(run, Type::kU32, {t});
}

}  // namespace

void add_bits(Opcodes& o) {
  o["and"] = decode_logic<And, 0>;
  o["or"] = decode_logic<Or, 1>;
  o["xor"] = decode_logic<Xor, 2>;
  o["not"] = decode_not;
  o["cnot"] = [](Decoder& d) {
    const Type t = d.type();
    d.emit(integer1<LogicalNot>(unsigned_of(t)), t, {t});
  };
  o["lop3"] = decode_lop3;
  o["shl"] = decode_shl;
  o["shr"] = decode_shr;
  o["shf"] = decode_shf;
  o["prmt"] = decode_prmt;
  o["bfe"] = decode_bfe;
  o["bfi"] = decode_bfi;
  o["popc"] = decode_count<Count>;
  o["clz"] = decode_count<CountLeadingZeros>;
  o["brev"] = [](Decoder& d) {
    const Type t = d.type();
    if (t != Type::kB32 && t != Type::kB64) d.unsupported();
    d.emit(integer1<Reverse>(t), t, {t}, Rule::kReverse);
  };
  o["bfind"] = decode_bfind;
}

}  // namespace ptx
