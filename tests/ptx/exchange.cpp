// What lanes of a warp do together: shfl, vote, match, redux, activemask.
#include "lanes.h"

namespace ptx {
namespace {

// All lanes that the executing lanes name must be here. False: not yet, or never.
bool together(Warp& w, const Inst& i, Mask exec, uint32_t mask_slot) {
  if (require_defined(w, i, exec, mask_slot, "the mask of an exchange") != exec) return false;
  Mask needed = 0, absent = 0;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const Mask members = w.lane<uint32_t>(mask_slot)[l];
    needed |= members;
    if (!(members >> l & 1)) absent |= 1u << l;
  }
  if (absent) report_error(w, i, absent, "mask", "the mask does not name the lane that executes");
  return w.gather(i, exec, needed & w.started);
}

enum Shuffle : uint32_t { kUp, kDown, kButterfly, kIndex };

// i.detail: the mask's slot, and the predicate's or kNoSlot.
void run_shfl(Warp& w, const Inst& i, Mask exec) {
  if (!together(w, i, exec, i.detail->slots[0])) return;
  uint32_t value[kLanes], shadow[kLanes];
  Mask inside = 0, unknown = 0;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const uint32_t lane = static_cast<uint32_t>(l), b = w.lane<uint32_t>(i.b)[l] & 31,
                   c = w.lane<uint32_t>(i.c)[l];
    const uint32_t segment = c >> 8 & 31, limit = (lane & segment) | (c & 31 & ~segment);
    uint32_t from = lane;
    bool in = false;
    switch (i.imm) {
      case kUp:
        from = lane - b, in = static_cast<int32_t>(from) >= static_cast<int32_t>(limit);
        break;
      case kDown:
        from = lane + b, in = from <= limit;
        break;
      case kButterfly:
        from = lane ^ b, in = from <= limit;
        break;
      case kIndex:
        from = (lane & segment) | (b & ~segment), in = from <= limit;
        break;
    }
    if (!in) from = lane;
    inside |= static_cast<Mask>(in) << l;
    if ((w.undefined[i.b] | w.undefined[i.c]) >> l & 1) unknown |= 1u << l;
    value[l] = w.lane<uint32_t>(i.a)[from];
    // A lane that does not take part has nothing to give.
    shadow[l] = exec >> from & 1 ? static_cast<uint32_t>(w.shadow(i.a, false, static_cast<int>(from))) : ~0u;
    if (unknown >> l & 1) shadow[l] = ~0u;
  }
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    if (i.d != kNoSlot) {
      w.lane<uint32_t>(i.d)[l] = value[l];
      w.set_shadow(i.d, false, l, shadow[l]);
    }
  }
  if (const uint32_t p = i.detail->slots[1]; p != kNoSlot) {
    w.predicate(p) = (w.predicate(p) & ~exec) | inside;
    w.undefined[p] = (w.undefined[p] & ~exec) | unknown;
  }
}

void decode_shfl(Decoder& d) {
  if (!d.take("sync")) d.unsupported("without .sync");
  const std::string_view mode = d.take_any({"up", "down", "bfly", "idx"});
  if (mode.empty() || d.type() != Type::kB32) d.unsupported();
  d.i.imm = mode == "up" ? kUp : mode == "down" ? kDown : mode == "bfly" ? kButterfly : kIndex;
  d.expect_operands(5, 5);
  const Operand& o = d.operand(0);
  const Operand& value = o.kind == Operand::kPair ? o.elements[0] : o;
  d.i.d = value.kind == Operand::kSink ? kNoSlot : d.register_slot(value, Type::kB32, nullptr);
  d.i.a = d.source(1, Type::kB32), d.i.b = d.source(2, Type::kB32), d.i.c = d.source(3, Type::kB32);
  const bool has_predicate = o.kind == Operand::kPair && o.elements[1].kind != Operand::kSink;
  d.detail().slots = {d.source(4, Type::kB32),
                      has_predicate ? d.register_slot(o.elements[1], Type::kPred, nullptr) : kNoSlot};
  d.emit(run_shfl);
}

enum Vote : uint32_t { kAll, kAny, kUniform, kBallot, kVoteNegated = 8 };

void run_vote(Warp& w, const Inst& i, Mask exec) {
  if (!together(w, i, exec, i.b)) return;
  const Mask votes = i.imm & kVoteNegated ? ~w.predicate(i.a) : w.predicate(i.a), unknown = w.undefined[i.a];
  Mask result = 0, result_unknown = 0;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const Mask members = w.lane<uint32_t>(i.b)[l] & exec, yes = votes & members;
    if ((i.imm & 7) == kBallot) {
      w.lane<uint32_t>(i.d)[l] = yes;
      w.set_shadow(i.d, false, l, unknown & members);
      continue;
    }
    bool r = false;
    if ((i.imm & 7) == kAll) r = yes == members;
    if ((i.imm & 7) == kAny) r = yes != 0;
    if ((i.imm & 7) == kUniform) r = yes == 0 || yes == members;
    result |= static_cast<Mask>(r) << l;
    // One known vote may decide.
    const bool decided =
        ((i.imm & 7) == kAll && (members & ~votes & ~unknown)) || ((i.imm & 7) == kAny && (yes & ~unknown));
    if (unknown & members && !decided) result_unknown |= 1u << l;
  }
  if ((i.imm & 7) == kBallot) return;
  w.predicate(i.d) = (w.predicate(i.d) & ~exec) | result;
  w.undefined[i.d] = (w.undefined[i.d] & ~exec) | result_unknown;
}

void decode_vote(Decoder& d) {
  if (!d.take("sync")) d.unsupported("without .sync");
  const std::string_view mode = d.take_any({"all", "any", "uni", "ballot"});
  const Type t = d.type();
  if (mode.empty() || t != (mode == "ballot" ? Type::kB32 : Type::kPred)) d.unsupported();
  d.expect_operands(3, 3);
  d.i.imm = mode == "all" ? kAll : mode == "any" ? kAny : mode == "uni" ? kUniform : kBallot;
  if (d.negated(1)) d.i.imm |= kVoteNegated;
  d.i.d = d.dest(0, t), d.i.a = d.source(1, Type::kPred), d.i.b = d.source(2, Type::kB32);
  d.emit(run_vote);
}

// match.any: the lanes with this lane's value; match.all: all of them or none.
void run_match(Warp& w, const Inst& i, Mask exec) {
  if (!together(w, i, exec, i.b)) return;
  Mask result[kLanes], equal = 0;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const Mask members = w.lane<uint32_t>(i.b)[l] & exec;
    result[l] = 0;
    for (Mask other = members; other; other &= other - 1)
      if (w.value(i.a, i.a_wide, first_lane(other)) == w.value(i.a, i.a_wide, l))
        result[l] |= 1u << first_lane(other);
    if (i.imm) {
      const bool all = result[l] == members;
      equal |= static_cast<Mask>(all) << l;
      if (!all) result[l] = 0;
    }
  }
  const bool unknown = w.undefined[i.a] & exec;
  for (Mask left = exec; left; left &= left - 1) {
    w.lane<uint32_t>(i.d)[first_lane(left)] = result[first_lane(left)];
    w.set_shadow(i.d, false, first_lane(left), unknown ? ~0u : 0);
  }
  if (i.imm && i.detail) {
    const uint32_t p = i.detail->slots[0];
    w.predicate(p) = (w.predicate(p) & ~exec) | equal;
    w.undefined[p] = (w.undefined[p] & ~exec) | (unknown ? exec : 0);
  }
}

void decode_match(Decoder& d) {
  if (!d.take("sync")) d.unsupported();
  const std::string_view mode = d.take_any({"any", "all"});
  const Type t = d.type();
  if (mode.empty() || (t != Type::kB32 && t != Type::kB64)) d.unsupported();
  d.expect_operands(3, 3);
  d.i.imm = mode == "all";
  const Operand& o = d.operand(0);
  d.i.d = d.register_slot(o.kind == Operand::kPair ? o.elements[0] : o, Type::kB32, nullptr);
  if (o.kind == Operand::kPair) d.detail().slots = {d.register_slot(o.elements[1], Type::kPred, nullptr)};
  d.i.a = d.source(1, t), d.i.a_wide = t == Type::kB64, d.i.b = d.source(2, Type::kB32);
  d.emit(run_match);
}

enum Reduction : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kSigned = 8 };

void run_redux(Warp& w, const Inst& i, Mask exec) {
  if (!together(w, i, exec, i.b)) return;
  uint32_t result[kLanes];
  const uint32_t* a = w.lane<uint32_t>(i.a);
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    const Mask members = w.lane<uint32_t>(i.b)[l] & exec;
    uint32_t r = a[first_lane(members)];
    for (Mask other = members & (members - 1); other; other &= other - 1) {
      const uint32_t x = a[first_lane(other)];
      const bool less = i.imm & kSigned ? static_cast<int32_t>(x) < static_cast<int32_t>(r) : x < r;
      switch (i.imm & 7) {
        case kAdd:
          r += x;
          break;
        case kMin:
          r = less ? x : r;
          break;
        case kMax:
          r = less ? r : x;
          break;
        case kAnd:
          r &= x;
          break;
        case kOr:
          r |= x;
          break;
        default:
          r ^= x;
      }
    }
    result[l] = r;
  }
  const bool unknown = w.undefined[i.a] & exec;
  for (Mask left = exec; left; left &= left - 1) {
    w.lane<uint32_t>(i.d)[first_lane(left)] = result[first_lane(left)];
    w.set_shadow(i.d, false, first_lane(left), unknown ? ~0u : 0);
  }
}

void decode_redux(Decoder& d) {
  if (!d.take("sync")) d.unsupported();
  constexpr std::string_view kNames[] = {"add", "min", "max", "and", "or", "xor"};
  uint32_t op = ~0u;
  for (uint32_t n = 0; n < 6; ++n)
    if (op == ~0u && d.take(kNames[n])) op = n;
  const Type t = d.type();
  const bool logic = op >= kAnd;
  if (op == ~0u || (logic ? t != Type::kB32 : t != Type::kU32 && t != Type::kS32)) d.unsupported();
  d.i.imm = op | (t == Type::kS32 ? uint32_t{kSigned} : 0u);
  d.emit(run_redux, t, {t, Type::kB32});
}

void run_activemask(Warp& w, const Inst& i, Mask exec) {
  write_lanes<uint32_t>(w, i.d, exec, [&](int) { return exec; });
  w.undefined[i.d] &= ~exec;
}

}  // namespace

void add_warp(Opcodes& o) {
  o["shfl"] = decode_shfl;
  o["vote"] = decode_vote;
  o["match"] = decode_match;
  o["redux"] = decode_redux;
  o["activemask"] = [](Decoder& d) {
    if (d.type() != Type::kB32) d.unsupported();
    d.expect_operands(1, 1);
    d.i.d = d.dest(0, Type::kB32);
    d.emit(run_activemask);
  };
}

}  // namespace ptx
