// ldmatrix, movmatrix and mma.sync. Fragments: PTX ISA, "Matrix fragments for mma.m16n8k*"; lane l holds row
// or column l / 4 and, of the other dimension, what stands at l % 4.
#include <cstring>

#include "access.h"
#include "formats.h"

namespace ptx {
namespace {

void run_ldmatrix(Warp& w, const Inst& i, Mask exec) {
  if (!w.gather_all(i, exec)) return;
  const Detail& m = *i.detail;
  const bool transposed = i.imm;
  const Mask rows = m.count == 4 ? kAllLanes : (1u << 8 * m.count) - 1;  // lanes whose addresses count
  uint16_t value[32][8], shadow[32][8];
  std::memset(shadow, 0xff, sizeof shadow);
  std::memset(value, 0, sizeof value);
  {
    Access a(w, i, rows, 16);
    for (Mask left = a.lanes; left; left &= left - 1) {
      const int row = first_lane(left);
      const Place& p = a.place[row];
      if (!p.region) continue;
      // Each word is read by a lane that receives it (of two that share it when transposed, the first).
      for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t reader =
            transposed ? 8 * k + static_cast<uint32_t>(row & 7) / 2 : 4 * static_cast<uint32_t>(row & 7) + k;
        note_read(w, i, static_cast<int>(reader), *p.region, p.address + 4 * k, 4, false);
      }
      copy_out(p, reinterpret_cast<uint8_t*>(value[row]), reinterpret_cast<uint8_t*>(shadow[row]), 16);
    }
  }
  for (uint32_t n = 0; n < m.count; ++n)
    for (int l = 0; l < kLanes; ++l) {
      const int p = l / 4, q = l % 4 * 2;
      const auto pick = [&](const uint16_t (&from)[32][8]) {
        const uint32_t low = transposed ? from[8 * n + static_cast<uint32_t>(q)][p]
                                        : from[8 * n + static_cast<uint32_t>(p)][q];
        const uint32_t high = transposed ? from[8 * n + static_cast<uint32_t>(q) + 1][p]
                                         : from[8 * n + static_cast<uint32_t>(p)][q + 1];
        return low | high << 16;
      };
      w.lane<uint32_t>(m.slots[n])[l] = pick(value);
      w.set_shadow(m.slots[n], false, l, pick(shadow));
    }
}

void decode_ldmatrix(Decoder& d) {
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8")) d.unsupported();
  Detail& m = d.detail();
  m.count = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
  d.i.imm = d.take("trans");
  const Space space = decode_space(d);
  if (!m.count || (space != Space::kShared && space != Space::kGeneric) || d.type() != Type::kB16)
    d.unsupported();
  d.expect_operands(2, 2);
  d.address(1, space);
  const Operand& to = d.operand(0);
  if (to.kind == Operand::kVector) {
    for (const Operand& o : to.elements) m.slots.push_back(d.register_slot(o, Type::kB32, nullptr));
  } else {
    m.slots.push_back(d.dest(0, Type::kB32));
  }
  if (m.slots.size() != m.count) d.unsupported("with another number of registers");
  d.emit(run_ldmatrix);
}

// Transposes an 8 x 8 matrix of halves that lies in one register.
void run_movmatrix(Warp& w, const Inst& i, Mask exec) {
  if (!w.gather_all(i, exec)) return;
  uint32_t value[kLanes], shadow[kLanes];
  const auto element = [](const auto& of, int row, int column) {
    return static_cast<uint32_t>(of(4 * row + column / 2)) >> 16 * (column & 1) & 0xffff;
  };
  for (int l = 0; l < kLanes; ++l) {
    const auto v = [&](int x) { return w.lane<uint32_t>(i.a)[x]; };
    const auto s = [&](int x) { return w.shadow(i.a, false, x); };
    const int p = l / 4, q = l % 4 * 2;
    value[l] = element(v, q, p) | element(v, q + 1, p) << 16;
    shadow[l] = element(s, q, p) | element(s, q + 1, p) << 16;
  }
  for (int l = 0; l < kLanes; ++l) {
    w.lane<uint32_t>(i.d)[l] = value[l];
    w.set_shadow(i.d, false, l, shadow[l]);
  }
}

void decode_movmatrix(Decoder& d) {
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8") || !d.take("trans")) d.unsupported();
  if (d.type() != Type::kB16) d.unsupported();
  d.emit(run_movmatrix, Type::kB32, {Type::kB32});
}

// D (16 x 8) = A (16 x K) B (K x 8) + C. Inst::imm: K, from bit 8 on the types of A, B and the sum, bit 31
// satfinite. Detail: registers of D and A in `slots`, of B and C in `more`. Products are exact and summed in
// double, then rounded once; hardware sums in another order with fewer bits.
double element(uint32_t bits, uint32_t e, Type t) {
  switch (t) {
    case Type::kF16:
      return half_to_float(static_cast<uint16_t>(bits >> 16 * e));
    case Type::kBF16:
      return brain_to_float(static_cast<uint16_t>(bits >> 16 * e));
    case Type::kTF32:
      return std::bit_cast<float>(bits & 0xffffe000);  // the hardware looks at 19 bits
    case Type::kU8:
      return static_cast<uint8_t>(bits >> 8 * e);
    default:
      return static_cast<int8_t>(bits >> 8 * e);
  }
}

void run_mma(Warp& w, const Inst& i, Mask exec) {
  if (!w.gather_all(i, exec)) return;
  const Detail& m = *i.detail;
  const uint32_t k = i.imm & 0xff;
  const auto at = static_cast<Type>(i.imm >> 8 & 31), bt = static_cast<Type>(i.imm >> 13 & 31),
             dt = static_cast<Type>(i.imm >> 18 & 31);
  const uint32_t per = at == Type::kTF32 ? 1 : size_of(at) == 2 ? 2 : 4;
  const bool half_sum = dt == Type::kF16;
  const uint32_t d_registers = half_sum ? 2 : 4, a_registers = 16 * k / (kLanes * per),
                 b_registers = 8 * k / (kLanes * per);
  const uint32_t* a_slots = m.slots.data() + d_registers;
  const uint32_t* c_slots = m.more.data() + b_registers;
  double a[16][32], b[32][8], c[16][8];
  uint32_t a_bad = 0, b_bad = 0;  // rows of A and columns of B with an undefined element
  Mask any = 0;
  for (const auto* list : {&m.slots, &m.more})
    for (size_t n = list == &m.slots ? d_registers : 0; n < list->size(); ++n) any |= w.undefined[(*list)[n]];
  for (uint32_t r = 0; r < a_registers; ++r)
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t row = l / 4 + 8 * (r & 1), first = (r >> 1) * k / 2 + l % 4 * per;
      const uint32_t bits = w.lane<uint32_t>(a_slots[r])[l];
      for (uint32_t e = 0; e < per; ++e) a[row][first + e] = element(bits, e, at);
      if (any) a_bad |= (w.undefined[a_slots[r]] >> l & 1) << row;
    }
  for (uint32_t r = 0; r < b_registers; ++r)
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t column = l / 4, first = r * k / 2 + l % 4 * per;
      const uint32_t bits = w.lane<uint32_t>(m.more[r])[l];
      for (uint32_t e = 0; e < per; ++e) b[first + e][column] = element(bits, e, bt);
      if (any) b_bad |= (w.undefined[m.more[r]] >> l & 1) << column;
    }
  for (uint32_t l = 0; l < kLanes; ++l)
    for (uint32_t e = 0; e < 4; ++e) {
      const uint32_t bits = w.lane<uint32_t>(c_slots[half_sum ? e / 2 : e])[l];
      double& sum = c[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
      if (half_sum)
        sum = half_to_float(static_cast<uint16_t>(bits >> 16 * (e & 1)));
      else if (dt == Type::kF32)
        sum = std::bit_cast<float>(bits);
      else
        sum = static_cast<int32_t>(bits);
    }
  for (uint32_t row = 0; row < 16; ++row)
    for (uint32_t n = 0; n < k; ++n)
      for (uint32_t column = 0; column < 8; ++column) c[row][column] += a[row][n] * b[n][column];
  for (uint32_t l = 0; l < kLanes; ++l) {
    uint32_t packed = 0, packed_shadow = 0;
    for (uint32_t e = 0; e < 4; ++e) {
      const uint32_t row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      const double sum = c[row][column];
      uint64_t shadow = (a_bad >> row & 1) | (b_bad >> column & 1) ? ~0ull : 0;
      const uint32_t c_slot = c_slots[half_sum ? e / 2 : e];
      if (any && (w.shadow(c_slot, false, static_cast<int>(l)) >> (half_sum ? 16 * (e & 1) : 0) &
                  (half_sum ? 0xffff : 0xffffffff)))
        shadow = ~0ull;
      if (half_sum) {
        packed |= static_cast<uint32_t>(encode(sum, kHalf, kNearestEven)) << 16 * (e & 1);
        packed_shadow |= static_cast<uint32_t>(shadow & 0xffff) << 16 * (e & 1);
        if (e & 1) {
          // D may be C's registers: each register is read for both elements before it is written.
          w.lane<uint32_t>(m.slots[e / 2])[l] = packed;
          w.set_shadow(m.slots[e / 2], false, static_cast<int>(l), packed_shadow);
          packed = packed_shadow = 0;
        }
        continue;
      }
      uint32_t bits;
      if (dt == Type::kF32)
        bits = std::bit_cast<uint32_t>(canonical(static_cast<float>(sum)));
      else
        bits = static_cast<uint32_t>(
            static_cast<int64_t>(i.imm >> 31 ? std::clamp(sum, -0x1p31, 0x1p31 - 1) : sum));
      w.lane<uint32_t>(m.slots[e])[l] = bits;
      w.set_shadow(m.slots[e], false, static_cast<int>(l), shadow);
    }
  }
}

void decode_mma(Decoder& d) {
  if (!d.take("sync") || !d.take("aligned") || !d.take("row") || !d.take("col")) d.unsupported();
  const std::string_view shape = d.take_any({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"});
  if (shape.empty()) d.unsupported();
  const bool finite = d.take("satfinite");
  const uint32_t k = static_cast<uint32_t>(std::stoi(std::string(shape.substr(6))));
  const Type dt = d.type(), at = d.type(), bt = d.type(), ct = d.type();
  const bool bytes =
      (at == Type::kU8 || at == Type::kS8) && (bt == Type::kU8 || bt == Type::kS8) && dt == Type::kS32;
  const bool halves = at == bt && ((at == Type::kF16 && (dt == Type::kF32 || dt == Type::kF16)) ||
                                   (at == Type::kBF16 && dt == Type::kF32));
  const bool tensor = at == Type::kTF32 && bt == Type::kTF32 && dt == Type::kF32;
  const bool known =
      (bytes && (k == 16 || k == 32)) || (halves && (k == 8 || k == 16)) || (tensor && (k == 4 || k == 8));
  if (!known || dt != ct || (finite && !bytes)) d.unsupported();
  const uint32_t per = tensor ? 1 : bytes ? 4 : 2;
  const size_t counts[] = {dt == Type::kF16 ? 2u : 4u, 16 * k / (kLanes * per), 8 * k / (kLanes * per),
                           dt == Type::kF16 ? 2u : 4u};
  d.expect_operands(4, 4);
  Detail& m = d.detail();
  for (size_t n = 0; n < 4; ++n) {
    std::vector<Operand> list = d.operand(n).elements;
    if (d.operand(n).kind != Operand::kVector) list = {d.operand(n)};
    if (list.size() != counts[n]) d.unsupported("with another number of registers");
    for (const Operand& o : list) {
      const uint32_t slot = n == 0
                                ? d.register_slot(o, Type::kB32, nullptr)
                                : d.source(o, n == 3 && dt == Type::kF32 ? Type::kF32 : Type::kB32, nullptr);
      (n < 2 ? m.slots : m.more).push_back(slot);
    }
  }
  d.i.imm = k | static_cast<uint32_t>(at) << 8 | static_cast<uint32_t>(bt) << 13 |
            static_cast<uint32_t>(dt) << 18 | (finite ? 1u << 31 : 0);
  d.emit(run_mma);
}

}  // namespace

void add_matrix(Opcodes& o) {
  o["ldmatrix"] = decode_ldmatrix;
  o["movmatrix"] = decode_movmatrix;
  o["mma"] = decode_mma;
}

}  // namespace ptx
