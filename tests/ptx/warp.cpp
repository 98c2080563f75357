// Divergence: the lanes of a warp run in groups that share an instruction. The group furthest behind (deepest
// call, lowest address) runs first, so that groups meet again where their paths join; a group whose
// instruction names lanes that are elsewhere waits for them.
#include "machine.h"

namespace ptx {

namespace {
constexpr uint32_t kStarving = 20000, kTurn = 2000;  // so that a lane that holds a lock gets to release it
}

const Inst& Warp::this_inst() const { return launch->program->code[this_pc()]; }

void Warp::use(Frame* f) {
  frame = f;
  values = f->values.data(), shadows = f->shadows.data(), undefined = f->undefined.data();
}

void Warp::enter(const Code& code, Mask lanes, const Inst* call, uint32_t return_pc) {
  if (free_frames.empty()) free_frames.push_back(&frames.emplace_back());
  Frame* f = free_frames.back();
  free_frames.pop_back();
  f->parent = frame, f->call = call, f->return_pc = return_pc, f->lanes = lanes;
  f->depth = frame ? frame->depth + 1 : 0;
  f->local_base = frame ? frame->local_base + frame->code->local_bytes : 0;
  if (f->depth > 64) throw Error("'" + code.name + "': calls nest deeper than 64");
  if (const uint64_t need = (f->local_base + code.local_bytes + 15) / 16 * 16; need > local_bytes) {
    std::vector<uint8_t> bytes(need * kLanes), undefined_bits(need * kLanes, 0xff);
    for (uint64_t l = 0; l < kLanes && local_bytes; ++l) {
      std::copy_n(&local[l * local_bytes], local_bytes, &bytes[l * need]);
      std::copy_n(&local_shadow[l * local_bytes], local_bytes, &undefined_bits[l * need]);
    }
    local.swap(bytes), local_shadow.swap(undefined_bits), local_bytes = need;
  }
  for (uint64_t l = 0; l < kLanes; ++l)
    if (lanes >> l & 1)
      std::fill_n(&local_shadow[l * local_bytes + f->local_base], code.local_bytes, uint8_t{0xff});
  if (f->code != &code) {
    f->code = &code;
    f->values.resize(code.slots), f->shadows.resize(code.slots), f->undefined.resize(code.slots);
  }
  std::fill_n(f->undefined.begin(), code.register_slots, kAllLanes);
  std::fill(f->undefined.begin() + code.register_slots, f->undefined.end(), 0);
  std::fill_n(reinterpret_cast<uint32_t*>(f->shadows.data()), code.register_slots * kLanes, ~0u);
  use(f);
  for (const ConstantSlot& c : code.constants) {
    const Launch& la = *launch;
    const auto each = [&](auto value) {
      for (uint32_t l = 0; l < kLanes; ++l) values[c.slot].lane[l] = static_cast<uint32_t>(value(l));
    };
    const auto all = [&](uint64_t bits) { each([&](uint32_t) { return bits; }); };
    const auto wide = [&](uint64_t bits) {
      for (int l = 0; l < kLanes; ++l) lane<uint64_t>(c.slot)[l] = bits;
    };
    const auto thread = [&](uint32_t l) { return 32u * static_cast<uint32_t>(index) + l; };
    switch (c.kind) {
      case Constant::kBits32:
        all(c.bits);
        break;
      case Constant::kBits64:
        wide(c.bits);
        break;
      case Constant::kPred:
        all(c.bits);
        break;
      case Constant::kLocalAddress32:
        all(c.bits + f->local_base);
        break;
      case Constant::kLocalAddress64:
        wide(c.bits + f->local_base);
        break;
      case Constant::kTidX:
        each([&](uint32_t l) { return thread(l) % la.block[0]; });
        break;
      case Constant::kTidY:
        each([&](uint32_t l) { return thread(l) / la.block[0] % la.block[1]; });
        break;
      case Constant::kTidZ:
        each([&](uint32_t l) { return thread(l) / la.block[0] / la.block[1]; });
        break;
      case Constant::kNtidX:
        all(la.block[0]);
        break;
      case Constant::kNtidY:
        all(la.block[1]);
        break;
      case Constant::kNtidZ:
        all(la.block[2]);
        break;
      case Constant::kCtaidX:
        all(block->at[0]);
        break;
      case Constant::kCtaidY:
        all(block->at[1]);
        break;
      case Constant::kCtaidZ:
        all(block->at[2]);
        break;
      case Constant::kNctaidX:
        all(la.grid[0]);
        break;
      case Constant::kNctaidY:
        all(la.grid[1]);
        break;
      case Constant::kNctaidZ:
        all(la.grid[2]);
        break;
      case Constant::kLaneId:
        each([](uint32_t l) { return l; });
        break;
      case Constant::kWarpId:
        all(static_cast<uint32_t>(index));
        break;
      case Constant::kNumWarps:
        all(block->warps.size());
        break;
      case Constant::kLaneMaskEq:
        each([](uint32_t l) { return 1u << l; });
        break;
      case Constant::kLaneMaskLe:
        each([](uint32_t l) { return (2u << l) - 1; });
        break;
      case Constant::kLaneMaskLt:
        each([](uint32_t l) { return (1u << l) - 1; });
        break;
      case Constant::kLaneMaskGe:
        each([](uint32_t l) { return ~0u << l; });
        break;
      case Constant::kLaneMaskGt:
        each([](uint32_t l) { return ~((2u << l) - 1); });
        break;
      case Constant::kSmId:
        all(block->index % 108);
        break;  // of an A100
      case Constant::kNumSms:
        all(108);
        break;
      case Constant::kDynamicShared:
        all(la.dynamic_shared);
        break;
      case Constant::kTotalShared:
        all(la.program->dynamic_shared + la.dynamic_shared);
        break;
    }
  }
  pc = code.entry;
  active = lanes;
}

void Warp::leave(Mask lanes) {
  Frame* f = frame;
  if (!f->parent) return exit(lanes);
  // Results lie in the caller's and the callee's local memory.
  const Code& code = *f->code;
  const std::vector<uint32_t>& to = f->call->detail->slots;
  for (size_t n = 0; n < code.returns.size(); ++n)
    for (int l = 0; l < kLanes; ++l) {
      if (!(lanes >> l & 1)) continue;
      const uint64_t base = static_cast<uint64_t>(l) * local_bytes;
      const uint64_t from = base + f->local_base + code.returns[n].at,
                     into = base + f->parent->local_base + to[n];
      std::copy_n(&local[from], code.returns[n].size, &local[into]);
      std::copy_n(&local_shadow[from], code.returns[n].size, &local_shadow[into]);
    }
  f->lanes &= ~lanes;
  active &= ~lanes;
  others.push_back({f->return_pc, lanes, f->parent, false});
  if (!f->lanes) free_frames.push_back(f);
  if (!active) pick();
}

void Warp::exit(Mask lanes) {
  alive &= ~lanes;
  active &= ~lanes;
  for (Frame* f = frame; f; f = f->parent) f->lanes &= ~lanes;
  if (!active) pick();
}

void Warp::branch(Mask taken, uint32_t target) {
  if (const Mask rest = active & ~taken) others.push_back({pc, rest, frame, false});
  active = taken;
  pc = target;
}

bool Warp::gather(const Inst& i, Mask exec, Mask needed, bool needs_exited) {
  if (!needs_exited) needed &= alive;
  if (!(needed & ~exec)) return true;
  // Lanes of this group that the guard keeps out go on alone.
  const Mask rest = active & ~exec;
  others.push_back(
      {static_cast<uint32_t>(&i - launch->program->code.data()), exec, frame, true, needed, needs_exited});
  active = rest;
  if (!active) pick();
  return false;
}

bool Warp::gather_all(const Inst& i, Mask exec) {
  if (!gather(i, exec, started, true)) return false;
  if (exec == kAllLanes) return true;
  stop(*this, i, exec, "mask",
       "only " + lane_names(exec) + " execute an instruction that needs a whole warp");
  return false;
}

// The next group: one that is not blocked, deepest first, then lowest. All blocked: an error.
void Warp::pick() {
  Group* best = nullptr;
  for (Group& g : others) {
    if (g.blocked && (g.needs_exited || (g.needed & alive & ~g.lanes))) continue;
    if (!best || g.frame->depth > best->frame->depth ||
        (g.frame->depth == best->frame->depth && g.pc < best->pc))
      best = &g;
  }
  if (!best) {
    if (others.empty()) {
      state = kDone;
      return;
    }
    std::string text;
    for (const Group& g : others) {
      const Inst& i = launch->program->code[g.pc];
      text += (text.empty() ? "" : "; ") + lane_names(g.lanes) + " wait at " +
              std::string(launch->program->text(i)) + " (PTX line " + std::to_string(i.line) + ")";
    }
    if (const Mask gone = started & ~alive) text += "; " + lane_names(gone) + " have exited";
    const Group& g = others.front();
    const Inst& i = launch->program->code[g.pc];
    stop(*this, i, g.lanes, i.is_block_sync ? "divergent barrier" : "deadlock", text);
    state = kDone;
    return;
  }
  const Group g = *best;
  *best = others.back();
  others.pop_back();
  pc = g.pc, active = g.lanes;
  use(g.frame);
  alone_for = 0;
}

// Before an instruction, while there are other groups.
void Warp::reconverge() {
  for (size_t n = 0; n < others.size();) {
    if (others[n].frame == frame && others[n].pc == pc) {
      active |= others[n].lanes;
      others[n] = others.back();
      others.pop_back();
    } else {
      ++n;
    }
  }
  if (pinned) {
    --pinned;
    return;
  }
  if (++alone_for > kStarving) {
    for (size_t n = 0; n < others.size(); ++n) {
      const size_t at = (n + launch->executed) % others.size();
      if (others[at].blocked) continue;
      const Group g = others[at];
      others[at] = {pc, active, frame, false};
      pc = g.pc, active = g.lanes;
      use(g.frame);
      alone_for = 0, pinned = kTurn;
      return;
    }
  }
  for (const Group& g : others) {
    if (g.blocked) continue;
    if (g.frame->depth > frame->depth || (g.frame->depth == frame->depth && g.pc < pc)) {
      others.push_back({pc, active, frame, false});
      active = 0;
      return pick();
    }
  }
}

}  // namespace ptx
