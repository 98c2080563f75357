// atom and red. Lanes take their turn in order.
#include <cstring>

#include "access.h"
#include "formats.h"

namespace ptx {
namespace {

enum Op : uint32_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };

template <class T>
uint64_t integer(uint64_t old, uint64_t b, uint32_t op) {
  using U = std::make_unsigned_t<T>;
  const T x = static_cast<T>(old), y = static_cast<T>(b);
  switch (op) {
    case kAdd:
      return static_cast<U>(static_cast<U>(x) + static_cast<U>(y));
    case kMin:
      return static_cast<U>(std::min(x, y));
    case kMax:
      return static_cast<U>(std::max(x, y));
    case kInc:
      return static_cast<U>(x >= y ? T{0} : static_cast<T>(x + 1));
    case kDec:
      return static_cast<U>(x == 0 || x > y ? y : static_cast<T>(x - 1));
    default:
      return 0;
  }
}

uint32_t half_add(uint32_t a, uint32_t b, Type t) {
  const bool brain = t == Type::kBF16 || t == Type::kBF16x2;
  const auto value = [&](uint32_t x) -> double {
    return brain ? brain_to_float(static_cast<uint16_t>(x)) : half_to_float(static_cast<uint16_t>(x));
  };
  return static_cast<uint32_t>(encode(add_to_odd(value(a), value(b)), brain ? kBrain : kHalf, kNearestEven));
}

uint64_t combine(uint64_t old, uint64_t b, uint64_t c, uint32_t op, Type t) {
  switch (op) {
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kExch:
      return b;
    case kCas:
      return old == b ? c : old;
    default:
      break;
  }
  const auto o32 = static_cast<uint32_t>(old), b32 = static_cast<uint32_t>(b);
  switch (t) {
    case Type::kF32: {  // in global memory subnormals are flushed by hardware, which is not modelled
      return std::bit_cast<uint32_t>(canonical(std::bit_cast<float>(o32) + std::bit_cast<float>(b32)));
    }
    case Type::kF64:
      return std::bit_cast<uint64_t>(canonical(std::bit_cast<double>(old) + std::bit_cast<double>(b)));
    case Type::kF16:
    case Type::kBF16:
      return half_add(o32, b32, t);
    case Type::kF16x2:
    case Type::kBF16x2:
      return half_add(o32 >> 16, b32 >> 16, t) << 16 | half_add(o32, b32, t);
    case Type::kS32:
      return integer<int32_t>(old, b, op);
    case Type::kS64:
      return integer<int64_t>(old, b, op);
    case Type::kU32:
      return integer<uint32_t>(old, b, op);
    default:
      return integer<uint64_t>(old, b, op);
  }
}

// i.imm: the operation, from bit 8 on the type; i.d is kNoSlot for red.
void run_atomic(Warp& w, const Inst& i, Mask exec) {
  const Detail& m = *i.detail;
  const uint32_t bytes = m.element;
  if (m.is_release) fence(w, exec, true);
  Access a(w, i, exec, bytes);
  const uint64_t kept = bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1;
  for (Mask left = exec; left; left &= left - 1) {
    const int l = first_lane(left);
    uint64_t old = 0, old_shadow = ~0ull;
    if (a.lanes >> l & 1) {
      Place& p = a.place[l];
      uint8_t bits[8] = {}, shadow[8] = {};
      copy_out(p, bits, shadow, bytes);
      std::memcpy(&old, bits, 8), std::memcpy(&old_shadow, shadow, 8);
      const uint64_t b = w.value(i.b, i.b_wide, l) & kept, c = w.value(i.c, i.c_wide, l) & kept;
      const uint64_t s = (w.shadow(i.b, i.b_wide, l) | w.shadow(i.c, i.c_wide, l) |
                          (i.imm % 256 == kExch ? 0 : old_shadow)) &
                         kept;
      if (s && p.region && !p.region->is_shared)
        report_error(w, i, 1u << l, "undefined data", "undefined data reaches a result in global memory");
      const uint64_t result = combine(old & kept, b, c, i.imm & 255, static_cast<Type>(i.imm >> 8));
      std::memcpy(bits, &result, 8);
      std::memset(shadow, s ? 0xff : 0, 8);
      if (p.region) {
        const uint64_t key = sync_key(w, p);
        note_write(w, i, l, *p.region, p.address, bytes, true, nullptr);
        observe(w, l, key);
        publish(w, l, key, false);
      }
      copy_in(p, bits, shadow, bytes);
    }
    if (i.d == kNoSlot) continue;
    w.set_value(i.d, i.d_wide, l, old & kept);
    w.set_shadow(i.d, i.d_wide, l, old_shadow & kept);
  }
  if (m.is_acquire) acquire_observed(w, exec);
}

void decode_atomic(Decoder& d, bool returns) {
  constexpr std::string_view kNames[] = {"add", "min", "max", "inc",  "dec",
                                         "and", "or",  "xor", "exch", "cas"};
  const Space space = decode_space(d);
  uint32_t op = ~0u;
  for (uint32_t n = 0; n < 10; ++n)
    if (op == ~0u && d.take(kNames[n])) op = n;
  const size_t operands = decode_memory_modifiers(d);
  const bool noftz = d.take("noftz");
  const Type t = d.type();
  const bool half = t == Type::kF16 || t == Type::kBF16 || t == Type::kF16x2 || t == Type::kBF16x2;
  if (half != noftz) d.unsupported();
  bool known = false;
  switch (op) {
    case kAdd:
      known =
          half || t == Type::kF32 || t == Type::kF64 || t == Type::kU32 || t == Type::kS32 || t == Type::kU64;
      break;
    case kMin:
    case kMax:
      known = t == Type::kU32 || t == Type::kS32 || t == Type::kU64 || t == Type::kS64;
      break;
    case kInc:
    case kDec:
      known = t == Type::kU32;
      break;
    case kCas:
      known = t == Type::kB16 || t == Type::kB32 || t == Type::kB64;
      break;
    case kExch:
    case kAnd:
    case kOr:
    case kXor:
      known = t == Type::kB32 || t == Type::kB64;
      break;
    default:
      break;
  }
  const size_t first = returns ? 1 : 0;
  if (!known || operands != first + 2 + (op == kCas)) d.unsupported();
  d.detail().element = static_cast<uint8_t>(size_of(t));
  d.i.imm = op | static_cast<uint32_t>(t) << 8;
  const Type r = size_of(t) == 2 ? Type::kB16 : size_of(t) == 4 ? Type::kB32 : Type::kB64;
  d.i.d = kNoSlot;
  if (returns && d.operand(0).kind != Operand::kSink) d.i.d = d.dest(0, r), d.i.d_wide = size_of(t) == 8;
  d.address(first, space);
  d.i.b = d.i.c = d.source(first + 1, t), d.i.b_wide = d.i.c_wide = size_of(t) == 8;
  if (op == kCas) d.i.c = d.source(first + 2, t);
  d.emit(run_atomic);
}

}  // namespace

void add_atomic(Opcodes& o) {
  o["atom"] = [](Decoder& d) { decode_atomic(d, true); };
  o["red"] = [](Decoder& d) { decode_atomic(d, false); };
}

}  // namespace ptx
