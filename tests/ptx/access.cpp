// ld, st and their checks.
#include "access.h"

#include <cstring>

namespace ptx {

uint64_t effective_address(Warp& w, const Inst& i, int lane) {
  const uint64_t base = w.value(i.a, i.a_wide, lane) + static_cast<uint64_t>(i.detail->offset);
  return i.a_wide ? base : base & 0xffffffff;
}

Access::Access(Warp& w, const Inst& i, Mask exec, uint32_t bytes) : w(w), i(i), bytes(bytes) {
  if (w.undefined[i.a] & exec) exec = require_defined(w, i, exec, i.a, "an address");
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    address[l] = effective_address(w, i, l);
    if (!find(w, i, i.detail->space, l, address[l], bytes, place[l])) continue;
    const Region* r = place[l].region;
    if (r && r->is_shared && w.block->pending_copies && is_pending(w, i, l, *r, place[l].address, bytes))
      continue;
    lanes |= 1u << l;
    if (r) (r->is_shared ? shared : global) |= 1u << l;
  }
}

Access::~Access() {
  if (!w.launch->options.statistics || i.detail->space == Space::kConst) return;
  Traffic& t = w.launch->report->traffic[w.this_pc()];
  if (shared) count_shared(t, address, shared, bytes);
  if (global) count_global(t, address, global, bytes);
}

void copy_in(Place& p, const uint8_t* value, const uint8_t* shadow, uint32_t bytes) {
  std::memcpy(p.data, value, bytes);
  bool any = false;
  for (uint32_t k = 0; k < bytes; ++k) any = any || shadow[k];
  if (any && !p.shadow && p.region) {
    p.region->undefine(p.address, 0, true);
    p.shadow = p.region->shadow_at(p.address);
  }
  if (p.shadow) std::memcpy(p.shadow, shadow, bytes);
}

void copy_out(const Place& p, uint8_t* value, uint8_t* shadow, uint32_t bytes) {
  std::memcpy(value, p.data, bytes);
  if (p.shadow)
    std::memcpy(shadow, p.shadow, bytes);
  else
    std::memset(shadow, 0, bytes);
}

namespace {

uint64_t extended(uint64_t v, uint32_t bytes, bool is_signed) {
  if (!is_signed || bytes == 8) return v;
  const uint32_t shift = 64 - 8 * bytes;
  return static_cast<uint64_t>(static_cast<int64_t>(v << shift) >> shift);
}

void run_load(Warp& w, const Inst& i, Mask exec) {
  const Detail& m = *i.detail;
  const uint32_t bytes = static_cast<uint32_t>(m.element) * m.count;
  Access a(w, i, exec, bytes);
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    uint8_t value[16] = {}, shadow[16];
    if (a.lanes >> l & 1) {
      const Place& p = a.place[l];
      if (p.region) {
        note_read(w, i, l, *p.region, p.address, bytes, m.is_strong);
        if (m.is_strong) observe(w, l, sync_key(w, p));
      }
      copy_out(p, value, shadow, bytes);
    } else {
      std::memset(shadow, 0xff, sizeof shadow);
    }
    for (uint32_t k = 0; k < m.count; ++k) {
      if (m.slots[k] == kNoSlot) continue;
      uint64_t v = 0, s = 0;
      std::memcpy(&v, value + k * m.element, m.element);
      std::memcpy(&s, shadow + k * m.element, m.element);
      const bool wide = m.wide[k];
      v = extended(v, m.element, m.is_signed), s = extended(s, m.element, m.is_signed);
      if (i.bits < 64) v &= (1ull << i.bits) - 1, s &= (1ull << i.bits) - 1;
      w.set_value(m.slots[k], wide, l, v);
      if (s)
        w.set_shadow(m.slots[k], wide, l, s);
      else
        w.undefined[m.slots[k]] &= ~(1u << l);
    }
  }
  if (m.is_acquire) acquire_observed(w, exec);
}

void run_store(Warp& w, const Inst& i, Mask exec) {
  const Detail& m = *i.detail;
  const uint32_t bytes = static_cast<uint32_t>(m.element) * m.count;
  if (m.is_release) fence(w, exec, true);
  Access a(w, i, exec, bytes);
  Mask undefined = 0;
  for (const uint32_t slot : m.slots) undefined |= w.undefined[slot];
  if (const Mask bad = undefined & a.global) {
    // Bits that are not stored do not matter.
    Mask stored = 0;
    for (Mask left = bad; left; left &= left - 1)
      for (uint32_t k = 0; k < m.count; ++k)
        if (w.shadow(m.slots[k], m.wide[k], first_lane(left)) << (64 - 8 * m.element))
          stored |= 1u << first_lane(left);
    if (stored)
      report_error(w, i, stored, "undefined data", "undefined data reaches a result in global memory");
  }
  for (Mask left = a.lanes; left; left &= left - 1) {
    const int l = first_lane(left);
    uint8_t value[16], shadow[16] = {};
    for (uint32_t k = 0; k < m.count; ++k) {
      const uint64_t v = w.value(m.slots[k], m.wide[k], l);
      std::memcpy(value + k * m.element, &v, m.element);
      if (undefined >> l & 1) {
        const uint64_t s = w.shadow(m.slots[k], m.wide[k], l);
        std::memcpy(shadow + k * m.element, &s, m.element);
      }
    }
    Place& p = a.place[l];
    if (p.region) {
      note_write(w, i, l, *p.region, p.address, bytes, m.is_strong, value);
      if (m.is_strong) publish(w, l, sync_key(w, p), true);
    }
    copy_in(p, value, shadow, bytes);
  }
}

void decode_vector(Decoder& d, const Operand& o, Type t, bool is_destination) {
  Detail& m = d.detail();
  std::vector<Operand> single;
  if (o.kind != Operand::kVector) single.push_back(o);
  const std::vector<Operand>& elements = single.empty() ? o.elements : single;
  if (elements.size() != m.count) d.unsupported("with another number of elements");
  for (const Operand& e : elements) {
    bool wide = false;
    if (e.kind == Operand::kSink && is_destination) {
      m.slots.push_back(kNoSlot);
    } else {
      m.slots.push_back(is_destination ? d.register_slot(e, t, &wide) : d.source(e, t, &wide));
      if (e.kind == Operand::kRegister) {
        const int bytes = size_of(d.register_type(e));
        if (bytes < size_of(t)) d.unsupported("a register too small");
        d.i.bits = static_cast<uint8_t>(8 * bytes);
      }
    }
    m.wide.push_back(wide);
  }
}

void decode_access(Decoder& d, bool is_load) {
  d.take("nc");
  Detail& m = d.detail();
  const Space space = decode_space(d);
  const size_t operands = decode_memory_modifiers(d);
  m.count = d.take("v4") ? 4 : d.take("v2") ? 2 : 1;
  const Type t = d.type();
  m.element = static_cast<uint8_t>(size_of(t));
  m.is_signed = t >= Type::kS8 && t <= Type::kS64;
  if (m.element == 0 || m.element * m.count > 16 || operands != 2) d.unsupported();
  if (!is_load && (space == Space::kConst)) d.unsupported();
  d.i.bits = 64;
  d.address(is_load ? 1 : 0, space);
  if (!is_load && d.detail().space == Space::kParam) d.unsupported("a store into the kernel's parameters");
  decode_vector(d, d.operand(is_load ? 0 : 1), t, is_load);
  d.emit(is_load ? run_load : run_store);
}

// A hint: nothing to execute.
void decode_prefetch(Decoder& d) {
  decode_space(d);
  d.take_any({"L1", "L2", "L2::evict_last", "L2::evict_normal"});
  d.emit([](Warp&, const Inst&, Mask) {});
}

}  // namespace

Space decode_space(Decoder& d) {
  if (d.take("global")) return Space::kGlobal;
  if (d.take("shared") || d.take("shared::cta")) return Space::kShared;
  if (d.take("local")) return Space::kLocal;
  if (d.take("const")) return Space::kConst;
  if (d.take("param") || d.take("param::func") || d.take("param::entry")) return Space::kParam;
  return Space::kGeneric;
}

size_t decode_memory_modifiers(Decoder& d) {
  Detail& m = d.detail();
  if (d.take("volatile") || d.take("relaxed") || d.take("mmio")) m.is_strong = true;
  if (d.take("acquire")) m.is_strong = m.is_acquire = true;
  if (d.take("release")) m.is_strong = m.is_release = true;
  if (d.take("acq_rel")) m.is_strong = m.is_acquire = m.is_release = true;
  d.take("weak");
  d.take_any({"cta", "gpu", "sys"});
  d.take_any({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  d.take_any(
      {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
  d.take_any({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  d.take_any({"L2::64B", "L2::128B", "L2::256B"});
  return d.operands() - (d.take("L2::cache_hint") ? 1 : 0);
}

void add_memory(Opcodes& o) {
  o["ld"] = o["ldu"] = [](Decoder& d) { decode_access(d, true); };
  o["st"] = [](Decoder& d) { decode_access(d, false); };
  o["prefetch"] = o["prefetchu"] = decode_prefetch;
  // createpolicy makes the operand of a cache hint, which nothing here looks at.
  o["createpolicy"] = [](Decoder& d) {
    d.take("fractional");
    d.take_any({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
    d.take_any({"L2::evict_unchanged", "L2::evict_first"});
    if (d.type() != Type::kB64) d.unsupported();
    d.i.d = d.dest(0, Type::kB64);
    d.emit([](Warp& w, const Inst& i, Mask exec) {
      for (Mask left = exec; left; left &= left - 1) w.set_value(i.d, true, first_lane(left), 0);
      w.undefined[i.d] &= ~exec;
    });
  };
}

}  // namespace ptx
