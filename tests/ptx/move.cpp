// mov with packing and unpacking, cvta, isspacep, clocks.
#include "lanes.h"

namespace ptx {
namespace {

template <class T>
void run_mov(Warp& w, const Inst& i, Mask exec) {
  const T* a = w.lane<T>(i.a);
  for (Mask left = w.undefined[i.a] & exec; left; left &= left - 1) {
    const int l = first_lane(left);
    w.set_shadow(i.d, sizeof(T) == 8, l, w.shadow(i.a, sizeof(T) == 8, l));
  }
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | (w.undefined[i.a] & exec);
  write_lanes<T>(w, i.d, exec, [&](int l) { return a[l]; });
}

void run_mov_predicate(Warp& w, const Inst& i, Mask exec) {
  w.predicate(i.d) = (w.predicate(i.d) & ~exec) | (w.predicate(i.a) & exec);
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | (w.undefined[i.a] & exec);
}

// Elements of i.bits / count bits, the first one lowest.
void run_pack(Warp& w, const Inst& i, Mask exec) {
  const Detail& m = *i.detail;
  const uint32_t bits = i.bits / m.count;
  const uint64_t mask = (1ull << bits) - 1;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    uint64_t v = 0, s = 0;
    for (uint32_t k = 0; k < m.count; ++k) {
      v |= (w.value(m.slots[k], false, l) & mask) << bits * k;
      s |= (w.shadow(m.slots[k], false, l) & mask) << bits * k;
    }
    w.set_value(i.d, i.d_wide, l, v);
    w.set_shadow(i.d, i.d_wide, l, s);
  }
}

void run_unpack(Warp& w, const Inst& i, Mask exec) {
  const Detail& m = *i.detail;
  const uint32_t bits = i.bits / m.count;
  const uint64_t mask = (1ull << bits) - 1;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const uint64_t v = w.value(i.a, i.a_wide, l), s = w.shadow(i.a, i.a_wide, l);
    for (uint32_t k = 0; k < m.count; ++k) {
      if (m.slots[k] == kNoSlot) continue;
      w.set_value(m.slots[k], false, l, v >> bits * k & mask);
      w.set_shadow(m.slots[k], false, l, s >> bits * k & mask);
    }
  }
}

// Time as the number of warp instructions of the launch: it rises, and says nothing of speed.
void run_clock(Warp& w, const Inst& i, Mask exec) {
  for (Mask left = exec; left; left &= left - 1)
    w.set_value(i.d, i.d_wide, first_lane(left), w.launch->executed);
  w.undefined[i.d] &= ~exec;
}

void decode_mov(Decoder& d) {
  const Type t = d.type();
  d.expect_operands(2, 2);
  const int bytes = size_of(t);
  const auto element = [&](size_t count) {
    const int n = bytes / static_cast<int>(count);
    if ((count != 2 && count != 4) || n < 1 || n > 4) d.unsupported("of such a vector");
    return n == 1 ? Type::kB8 : n == 2 ? Type::kB16 : Type::kB32;
  };
  d.i.bits = static_cast<uint8_t>(8 * bytes);
  if (d.operand(1).kind == Operand::kVector) {
    const auto& from = d.operand(1).elements;
    Detail& m = d.detail();
    m.count = static_cast<uint8_t>(from.size());
    for (const Operand& o : from) m.slots.push_back(d.source(o, element(from.size()), nullptr));
    d.i.d = d.dest(0, t), d.i.d_wide = bytes == 8;
    return d.emit(run_pack);
  }
  if (d.operand(0).kind == Operand::kVector) {
    const auto& to = d.operand(0).elements;
    Detail& m = d.detail();
    m.count = static_cast<uint8_t>(to.size());
    for (const Operand& o : to)
      m.slots.push_back(o.kind == Operand::kSink ? kNoSlot : d.register_slot(o, element(to.size()), nullptr));
    d.i.a = d.source(1, t), d.i.a_wide = bytes == 8;
    return d.emit(run_unpack);
  }
  if (const std::string& name = d.operand(1).name;
      name == "%clock" || name == "%clock64" || name == "%globaltimer") {
    d.i.d = d.dest(0, t), d.i.d_wide = bytes == 8;
    return d.emit(run_clock);
  }
  if (t == Type::kPred) {
    d.i.d = d.dest(0, t), d.i.a = d.source(1, t);
    if (d.negated(1)) d.unsupported();
    return d.emit(run_mov_predicate);
  }
  if (bytes < 2) d.unsupported();
  d.emit(bytes == 8 ? run_mov<uint64_t> : run_mov<uint32_t>, t, {t});
}

Space space_named(Decoder& d, uint64_t& window) {
  const std::string_view name = d.take_any({"global", "const", "shared", "shared::cta", "local", "param"});
  window = name.starts_with("shared") ? kSharedWindow
           : name == "local"          ? kLocalWindow
           : name == "param"          ? kParamWindow
                                      : 0;
  if (name.empty()) d.unsupported();
  return name.starts_with("shared") ? Space::kShared
         : name == "local"          ? Space::kLocal
         : name == "param"          ? Space::kParam
                                    : Space::kGlobal;
}

struct AddWindow {
  uint64_t operator()(uint64_t a, uint64_t window) const { return a + window; }
};

// cvta: into the generic window of a space; cvta.to: out of it.
void decode_cvta(Decoder& d) {
  const bool to = d.take("to");
  uint64_t window;
  space_named(d, window);
  if (d.type() != Type::kU64) d.unsupported();
  d.expect_operands(2, 2);
  d.i.d = d.dest(0, Type::kU64), d.i.a = d.source(1, Type::kU64);
  d.i.b = d.i.c = d.constant(Constant::kBits64, to ? 0 - window : window, true);
  d.i.d_wide = d.i.a_wide = d.i.b_wide = d.i.c_wide = true;
  d.i.bits = 64, d.i.rule = Rule::kAdd;
  d.emit(run2<uint64_t, uint64_t, uint64_t, AddWindow>);
}

void run_isspacep(Warp& w, const Inst& i, Mask exec) {
  Mask r = 0;
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t a = w.lane<uint64_t>(i.a)[l] & ~(kSharedWindow - 1);
    r |= static_cast<Mask>(a == static_cast<uint64_t>(i.imm) << 56) << l;
  }
  w.predicate(i.d) = (w.predicate(i.d) & ~exec) | (r & exec);
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | (w.undefined[i.a] & exec);
}

void decode_isspacep(Decoder& d) {
  uint64_t window;
  space_named(d, window);
  d.i.imm = static_cast<uint32_t>(window >> 56);
  d.emit(run_isspacep, Type::kPred, {Type::kU64});
}

}  // namespace

void add_move(Opcodes& o) {
  o["mov"] = decode_mov;
  o["cvta"] = decode_cvta;
  o["isspacep"] = decode_isspacep;
}

}  // namespace ptx
