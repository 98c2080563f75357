// Branches, calls, barriers and fences.
#include "decode.h"
#include "machine.h"

namespace ptx {

void Block::complete_if_full(Barrier& b) {
  if (b.waiting.empty()) return;
  const uint32_t expected = b.expected ? b.expected : 32 * static_cast<uint32_t>(running);
  if (b.arrived < expected) return;
  std::vector<uint32_t> clock = b.clock;
  Knowledge acquired;
  bool any_acquired = false;
  // A warp that has ended has arrived at every barrier.
  for (const auto& w : warps)
    if (w->state == Warp::kDone) clock[static_cast<size_t>(w->index)] = w->epoch + 1;
  for (Warp* w : b.waiting)
    if (w->lanes)
      for (const Knowledge& k : w->lanes->acquired)
        acquired.join(k), any_acquired = any_acquired || !k.warps.empty();
  for (size_t n = 0; n < b.waiting.size(); ++n) {
    Warp& w = *b.waiting[n];
    w.clock = clock;
    w.synced = ++w.epoch;
    if (any_acquired) {
      if (!w.lanes) w.lanes = std::make_unique<LaneOrder>();
      for (Knowledge& k : w.lanes->acquired) k = acquired;
    }
    w.state = Warp::kReady;
    const Inst& i = *b.inst[n];
    if (i.imm >> 8) {  // bar.red: the result
      for (int l = 0; l < kLanes; ++l) {
        if (!(w.started >> l & 1)) continue;
        w.undefined[i.d] &= ~(1u << l);
        if (i.imm >> 8 == 1) w.lane<uint32_t>(i.d)[l] = b.count;
      }
      if (i.imm >> 8 == 2) w.predicate(i.d) = b.all ? kAllLanes : 0;
      if (i.imm >> 8 == 3) w.predicate(i.d) = b.any ? kAllLanes : 0;
    }
  }
  b = {};
}

void Block::arrive(Warp& w, const Inst& i, int barrier, uint32_t expected, bool waits) {
  Barrier& b = barriers[barrier];
  if (b.arrived && b.expected != expected)
    return stop(w, i, w.started, "barrier",
                "barrier " + std::to_string(barrier) + " with " + std::to_string(expected) +
                    " threads, others wait there for " + std::to_string(b.expected));
  b.expected = expected;
  b.arrived += kLanes;
  if (b.clock.empty()) b.clock = w.clock;
  for (size_t v = 0; v < b.clock.size(); ++v) b.clock[v] = std::max(b.clock[v], w.clock[v]);
  b.clock[static_cast<size_t>(w.index)] = w.epoch + 1;
  if (waits) {
    b.waiting.push_back(&w);
    b.inst.push_back(&i);
    w.state = Warp::kAtBarrier;
  } else {
    ++w.epoch;
  }
  if (expected && b.arrived > expected)
    return stop(w, i, w.started, "barrier",
                "more than the " + std::to_string(expected) + " threads of barrier " +
                    std::to_string(barrier) + " arrive");
  complete_if_full(b);
}

namespace {

void run_bra(Warp& w, const Inst& i, Mask exec) { w.branch(exec, i.imm); }

void run_brx(Warp& w, const Inst& i, Mask exec) {
  const Mask good = require_defined(w, i, exec, i.a, "the index of a branch");
  if (good != exec) return stop(w, i, exec & ~good, "undefined data", "the branch has no target");
  const std::vector<uint32_t>& targets = i.detail->targets;
  Mask left = exec;
  const Mask rest = w.active & ~exec;
  bool first = true;
  const uint32_t next = w.pc;
  while (left) {
    const uint32_t index = w.lane<uint32_t>(i.a)[first_lane(left)];
    if (index >= targets.size())
      return stop(w, i, left, "out of bounds",
                  "index " + std::to_string(index) + " of a branch with " + std::to_string(targets.size()) +
                      " targets");
    Mask same = 0;
    for (int l = 0; l < kLanes; ++l) same |= w.lane<uint32_t>(i.a)[l] == index ? 1u << l : 0;
    same &= left;
    left &= ~same;
    if (first)
      w.pc = targets[index], w.active = same;
    else
      w.others.push_back({targets[index], same, w.frame, false});
    first = false;
  }
  if (rest) w.others.push_back({next, rest, w.frame, false});
}

void run_call(Warp& w, const Inst& i, Mask exec) {
  const Code& callee = *i.detail->callee;
  const uint64_t caller_base = w.frame->local_base;
  const uint32_t next = w.pc;
  if (const Mask rest = w.active & ~exec) w.others.push_back({next, rest, w.frame, false});
  w.enter(callee, exec, &i, next);
  for (size_t n = 0; n < callee.params.size(); ++n)
    for (int l = 0; l < kLanes; ++l) {
      if (!(exec >> l & 1)) continue;
      const uint64_t base = static_cast<uint64_t>(l) * w.local_bytes;
      const uint64_t from = base + caller_base + i.detail->more[n];
      const uint64_t to = base + w.frame->local_base + callee.params[n].at;
      std::copy_n(&w.local[from], callee.params[n].size, &w.local[to]);
      std::copy_n(&w.local_shadow[from], callee.params[n].size, &w.local_shadow[to]);
    }
}

void run_assertfail(Warp& w, const Inst& i, Mask exec) {
  const auto text = [&](size_t n) {  // the n-th parameter: the address of a string
    uint64_t address;
    const uint64_t at = static_cast<uint64_t>(first_lane(exec)) * w.local_bytes + w.frame->local_base;
    std::copy_n(&w.local[at + i.detail->more[n]], 8, reinterpret_cast<uint8_t*>(&address));
    const Region* r = w.launch->device->find(address);
    return r ? std::string(reinterpret_cast<const char*>(r->data + (address - r->begin))) : std::string("?");
  };
  stop(w, i, exec, "trap", "assertion '" + text(0) + "' fails in " + text(3));
}

void run_ret(Warp& w, const Inst&, Mask exec) { w.leave(exec); }
void run_exit(Warp& w, const Inst&, Mask exec) { w.exit(exec); }
void run_trap(Warp& w, const Inst& i, Mask exec) { stop(w, i, exec, "trap", "the kernel stops itself"); }
void run_nothing(Warp&, const Inst&, Mask) {}

void decode_bra(Decoder& d) {
  d.take("uni");
  d.expect_operands(1, 1);
  d.i.imm = d.label(0);
  d.emit(run_bra);
}

void decode_brx(Decoder& d) {
  d.take("uni");
  if (!d.take("idx")) d.unsupported();
  d.expect_operands(2, 2);
  d.i.a = d.source(0, Type::kU32);
  for (const std::string& name : d.branch_targets(d.operand(1).name))
    d.detail().targets.push_back(d.label(name));
  d.emit(run_brx);
}

void decode_call(Decoder& d) {
  d.take("uni");
  size_t n = 0;
  const bool has_result = d.operands() && d.operand(0).kind == Operand::kVector;
  if (has_result) ++n;
  if (n >= d.operands() || d.operand(n).kind != Operand::kName) d.unsupported("a call through a pointer");
  const std::string& name = d.operand(n).name;
  Detail& m = d.detail();
  const auto places = [&](const Operand& list, std::vector<uint32_t>& out) {
    for (const Operand& o : list.elements) {
      if (o.kind != Operand::kVariable) d.unsupported("a parameter that is not a .param variable");
      out.push_back(static_cast<uint32_t>(d.local_place(o)));
    }
  };
  if (has_result) places(d.operand(0), m.slots);
  if (n + 1 < d.operands()) places(d.operand(n + 1), m.more);
  if (n + 2 < d.operands()) d.unsupported("a call through a pointer");
  if (name == "__assertfail") return d.emit(run_assertfail);
  m.callee = d.callee(name);
  if (m.callee->params.size() != m.more.size() || m.callee->returns.size() != m.slots.size())
    d.unsupported("with another number of parameters than the function's");
  d.emit(run_call);
}

void decode_ret(Decoder& d) {
  d.take("uni");
  d.emit(run_ret);
}

// bar.sync a{, b}, bar.arrive a, b, bar.red.op d, a{, b}, p. imm: 1 if it waits, 2 if it negates p, from bit
// 8 on the reduction.
void run_bar(Warp& w, const Inst& i, Mask exec) {
  if (!w.gather(i, exec, w.started, true)) return;
  const uint32_t n = w.lane<uint32_t>(i.a)[first_lane(exec)],
                 threads = w.lane<uint32_t>(i.b)[first_lane(exec)];
  if (require_defined(w, i, exec, i.a, "a barrier") != exec ||
      require_defined(w, i, exec, i.b, "a barrier") != exec)
    return stop(w, i, exec, "undefined data", "the barrier is not known");
  if (n > 15 || threads % 32 || threads > 1024)
    return stop(w, i, exec, "barrier",
                "barrier " + std::to_string(n) + " for " + std::to_string(threads) + " threads");
  Barrier& b = w.block->barriers[n];
  if (i.imm >> 8) {
    require_defined(w, i, exec, i.c, "the predicate of a barrier");
    const Mask p = (i.imm & 2 ? ~w.predicate(i.c) : w.predicate(i.c)) & exec;
    b.count += static_cast<uint32_t>(__builtin_popcount(p));
    b.all = b.all && p == exec;
    b.any = b.any || p;
  }
  w.block->arrive(w, i, static_cast<int>(n), threads, i.imm & 1);
}

void run_warp_sync(Warp& w, const Inst& i, Mask exec) {
  require_defined(w, i, exec, i.a, "the mask of a barrier");
  Mask needed = 0;
  for (int l = 0; l < kLanes; ++l)
    if (exec >> l & 1) needed |= w.lane<uint32_t>(i.a)[l];
  needed &= w.started;  // of a last warp that is not full, a full mask means the lanes that are there
  if (!w.gather(i, exec, needed)) return;
  // Parts of the warp may synchronise at one instruction, each on its own.
  for (Mask left = exec; left;) {
    const Mask members = w.lane<uint32_t>(i.a)[first_lane(left)] & w.started;
    warp_sync(w, members);
    left &= ~(members | 1u << first_lane(left));
  }
}

void decode_bar(Decoder& d) {
  d.i.is_sync = true;
  if (d.take("warp")) {
    if (!d.take("sync")) d.unsupported();
    d.expect_operands(1, 1);
    d.i.a = d.source(0, Type::kB32);
    return d.emit(run_warp_sync);
  }
  d.take("cta");
  d.take("aligned");
  d.i.is_block_sync = true;
  d.i.b = d.constant(Constant::kBits32, 0, false);
  size_t n = 0;
  if (d.take("red")) {
    const std::string_view op = d.take_any({"popc", "and", "or"});
    if (op.empty()) d.unsupported();
    d.i.imm = op == "popc" ? 1 << 8 : op == "and" ? 2 << 8 : 3 << 8;
    if (d.type() != (op == "popc" ? Type::kU32 : Type::kPred)) d.unsupported();
    d.expect_operands(3, 4);
    d.i.d = d.dest(n++, op == "popc" ? Type::kU32 : Type::kPred);
    d.i.c = d.source(d.operands() - 1, Type::kPred);
    d.i.imm |= 1 | (d.negated(d.operands() - 1) ? 2 : 0);
    if (d.operands() == 4) d.i.b = d.source(2, Type::kU32);
  } else {
    const bool waits = d.take("sync");
    if (!waits && !d.take("arrive")) d.unsupported();
    d.i.imm = waits;
    d.expect_operands(waits ? 1 : 2, 2);
    if (d.operands() == 2) d.i.b = d.source(1, Type::kU32);
  }
  d.i.a = d.source(n, Type::kU32);
  d.emit(run_bar);
}

void run_fence(Warp& w, const Inst& i, Mask exec) { fence(w, exec, i.imm); }

void decode_fence(Decoder& d) {
  const std::string_view kind = d.take_any({"sc", "acq_rel"});
  const std::string_view scope = d.take_any({"cta", "gl", "gpu", "sys"});
  if (scope.empty() || (d.opcode().starts_with("fence") && kind.empty())) d.unsupported();
  d.expect_operands(0, 0);
  d.i.is_sync = true;
  d.i.imm = scope != "cta";
  d.emit(run_fence);
}

}  // namespace

void add_control(Opcodes& o) {
  o["bra"] = decode_bra;
  o["brx"] = decode_brx;
  o["call"] = decode_call;
  o["ret"] = decode_ret;
  o["exit"] = [](Decoder& d) { d.emit(run_exit); };
  o["trap"] = [](Decoder& d) { d.emit(run_trap); };
  o["bar"] = decode_bar;
  o["barrier"] = decode_bar;
  o["membar"] = decode_fence;
  o["fence"] = decode_fence;
  // Time passes, and nothing else happens.
  o["nanosleep"] = [](Decoder& d) { d.has_type() ? (void)d.type() : (void)0, d.emit(run_nothing); };
}

}  // namespace ptx
