// cp.async. A copy lands when its lane waits for its group and not before; until then its destination belongs
// to it. The destination is checked as a write when the copy is issued, and the write is recorded when it
// lands.
#include <cstring>

#include "access.h"

namespace ptx {

bool is_pending(Warp& w, const Inst& i, int lane, const Region&, uint64_t address, uint32_t bytes) {
  const std::vector<uint8_t>& pending = w.block->pending;
  for (uint32_t k = 0; k < bytes; ++k)
    if (pending[address + k]) {
      std::string by;
      for (const auto& other : w.block->warps)
        for (const Copy& c : other->copies)
          if (by.empty() && c.to < address + bytes && address < c.to + c.bytes)
            by = "; the copy is by warp " + std::to_string(other->index) + ", lane " +
                 std::to_string(c.lane) + ", PTX line " + std::to_string(w.launch->program->code[c.pc].line);
      report_error(w, i, 1u << lane, "early use",
                   "shared memory at " + std::to_string(address) +
                       " is the destination of a cp.async that nobody has waited for" + by);
      return true;
    }
  return false;
}

namespace {

void land(Warp& w, const Copy& c) {
  Block& b = *w.block;
  const Inst& i = w.launch->program->code[c.pc];
  uint8_t value[16] = {}, shadow[16] = {};
  if (c.source_bytes) {
    Place from;
    if (!find(w, i, Space::kGlobal, c.lane, c.from, 1, from)) return;
    copy_out(from, value, shadow, c.source_bytes);
    if (std::memcmp(value, c.seen.data(), c.source_bytes))
      report_error(w, i, 1u << c.lane, "early use",
                   "the source of a cp.async was written before anybody waited for the copy");
    note_read(w, i, c.lane, *from.region, c.from, c.source_bytes, false);
  }
  for (uint32_t k = 0; k < c.bytes; ++k) b.pending[c.to + k] = 0;
  --b.pending_copies;
  note_write(w, i, c.lane, b.shared, c.to, c.bytes, false, nullptr);
  Place to = {b.shared.data + c.to, &b.shared, c.to, b.shared.shadow_at(c.to)};
  copy_in(to, value, shadow, c.bytes);
}

// i.a the destination, i.b the source, i.c the bytes of the source; i.imm 1: i.c is a predicate, true to
// write zeros.
void run_copy(Warp& w, const Inst& i, Mask exec) {
  const Detail& m = *i.detail;
  const uint32_t bytes = m.element;
  require_defined(w, i, exec, i.c, i.imm & 1 ? "a predicate" : "the size of a copy");
  exec = require_defined(w, i, exec, i.b, "an address");
  Access a(w, i, exec, bytes);
  uint64_t from[kLanes];
  Mask reading = 0;
  for (Mask left = a.lanes; left; left &= left - 1) {
    const int l = first_lane(left);
    Copy c = {l, w.copy_groups[l], a.place[l].address, 0, bytes, bytes, w.this_pc(), {}};
    if (i.imm & 1) {
      if (w.predicate(i.c) >> l & 1) c.source_bytes = 0;
    } else {
      c.source_bytes = w.lane<uint32_t>(i.c)[l];
      if (c.source_bytes > bytes) {
        report_error(w, i, 1u << l, "out of bounds",
                     "a copy of " + std::to_string(bytes) + " bytes from a source of " +
                         std::to_string(c.source_bytes));
        continue;
      }
    }
    c.from = from[l] = w.value(i.b, i.b_wide, l) + static_cast<uint64_t>(m.source_offset);
    if (c.from % bytes && c.source_bytes) {
      report_error(w, i, 1u << l, "misaligned",
                   "the source of a copy of " + std::to_string(bytes) + " bytes");
      continue;
    }
    if (c.source_bytes) {
      Place source;
      // The size need not be a power of two: its last byte is looked up, too.
      if (!find(w, i, Space::kGlobal, l, c.from + c.source_bytes - 1, 1, source) ||
          !find(w, i, Space::kGlobal, l, c.from, 1, source))
        continue;
      note_read(w, i, l, *source.region, c.from, c.source_bytes, false);
      std::memcpy(c.seen.data(), source.data, c.source_bytes);
      reading |= 1u << l;
    }
    note_write(w, i, l, w.block->shared, c.to, bytes, false, nullptr);
    for (uint32_t k = 0; k < bytes; ++k) w.block->pending[c.to + k] = 1;
    ++w.block->pending_copies;
    w.copies.push_back(c);
  }
  if (w.launch->options.statistics && reading)
    count_global(w.launch->report->traffic[w.this_pc()], from, reading, bytes);
}

void run_commit(Warp& w, const Inst&, Mask exec) {
  for (Mask left = exec; left; left &= left - 1) ++w.copy_groups[first_lane(left)];
}

// i.imm: how many groups of each lane may stay in flight; ~0: none, and the open one lands, too.
void run_wait(Warp& w, const Inst& i, Mask exec) {
  size_t kept = 0;
  for (size_t n = 0; n < w.copies.size(); ++n) {
    const Copy c = w.copies[n];
    const uint64_t groups = w.copy_groups[c.lane];
    const bool lands = (exec >> c.lane & 1) && (i.imm == ~0u || c.group + i.imm < groups);
    if (lands)
      land(w, c);
    else
      w.copies[kept++] = c;
  }
  w.copies.resize(kept);
}

void decode_async(Decoder& d) {
  if (!d.take("async")) d.unsupported();
  if (d.take("commit_group")) {
    d.expect_operands(0, 0);
    return d.emit(run_commit);
  }
  if (d.take("wait_all")) {
    d.expect_operands(0, 0);
    d.i.is_sync = true;
    d.i.imm = ~0u;
    return d.emit(run_wait);
  }
  if (d.take("wait_group")) {
    d.expect_operands(1, 1);
    if (d.operand(0).kind != Operand::kInteger) d.unsupported();
    d.i.is_sync = true;
    d.i.imm = static_cast<uint32_t>(d.operand(0).value);
    return d.emit(run_wait);
  }
  const bool bypasses = d.take("cg");
  if (!bypasses && !d.take("ca")) d.unsupported();
  if ((!d.take("shared") && !d.take("shared::cta")) || !d.take("global")) d.unsupported();
  d.take_any({"L2::64B", "L2::128B", "L2::256B"});
  const size_t operands = d.operands() - (d.take("L2::cache_hint") ? 1 : 0);
  if (operands < 3 || operands > 4 || d.operand(2).kind != Operand::kInteger) d.unsupported();
  const int64_t bytes = d.operand(2).value;
  if (bytes != 16 && (bypasses || (bytes != 4 && bytes != 8))) d.unsupported("of this size");
  d.address(0, Space::kShared);
  Detail& m = d.detail();
  m.element = static_cast<uint8_t>(bytes);
  const Operand& from = d.operand(1);
  if (from.kind != Operand::kAddress) d.unsupported();
  d.i.b = d.source(from.elements[0], Type::kB64, &d.i.b_wide);
  m.source_offset = from.value;
  if (operands == 3) {
    d.i.c = d.constant(Constant::kBits32, static_cast<uint64_t>(bytes), false);
  } else if (d.operand(3).kind == Operand::kRegister && d.register_type(d.operand(3)) == Type::kPred) {
    d.i.c = d.source(3, Type::kPred);
    d.i.imm = 1;
    if (d.negated(3)) d.unsupported();
  } else {
    d.i.c = d.source(3, Type::kU32);
  }
  d.emit(run_copy);
}

}  // namespace

void add_async(Opcodes& o) { o["cp"] = decode_async; }

}  // namespace ptx
