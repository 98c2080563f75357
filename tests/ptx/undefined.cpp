// Undefined bits through an instruction. A result bit is undefined where it could differ for other values of
// the undefined source bits; rules that cannot tell say so of all bits.
#include <bit>

#include "bits.h"
#include "machine.h"

namespace ptx {

void propagate(Warp& w, const Inst& i, Mask exec) {
  const uint64_t full = i.bits == 64 ? ~0ull : (1ull << i.bits) - 1;
  for (int l = 0; l < kLanes; ++l) {
    if (!(exec >> l & 1)) continue;
    const uint64_t sa = w.shadow(i.a, i.a_wide, l) & full, sb = w.shadow(i.b, i.b_wide, l) & full,
                   sc = w.shadow(i.c, i.c_wide, l) & full;
    uint64_t s = 0;
    if (sa | sb | sc) {
      const uint64_t a = w.value(i.a, i.a_wide, l), b = w.value(i.b, i.b_wide, l),
                     c = w.value(i.c, i.c_wide, l);
      const auto amount = [](uint64_t x) {
        return static_cast<uint32_t>(std::min<uint64_t>(x, 0xffffffffu));
      };
      s = ~0ull;
      switch (i.rule) {
        case Rule::kAll:
          break;
        case Rule::kLogic: {  // of three operands: try both values of each undefined bit
          const uint64_t r = lop3(a, b, c, i.imm);
          s = 0;
          for (int k = 1; k < 8; ++k)
            s |= r ^ lop3(a ^ (k & 1 ? sa : 0), b ^ (k & 2 ? sb : 0), c ^ (k & 4 ? sc : 0), i.imm);
          break;
        }
        case Rule::kAdd: {  // a bit depends on those below it
          const uint64_t u = sa | sb | sc;
          s = u | (0 - u);
          break;
        }
        case Rule::kShl:
          if (!sb) s = shl(sa, amount(b), i.bits);
          break;
        case Rule::kShr:
          if (!sb) s = shr(sa, amount(b), i.bits);
          break;
        case Rule::kShrSigned:
          if (!sb) s = shr_signed(sa, amount(b), i.bits);
          break;
        case Rule::kFunnel:
          if (!sc)
            s = funnel(static_cast<uint32_t>(sa), static_cast<uint32_t>(sb), static_cast<uint32_t>(c), i.imm);
          break;
        case Rule::kPermute:
          if (!sc)
            s = permute(static_cast<uint32_t>(sa), static_cast<uint32_t>(sb), static_cast<uint32_t>(c),
                        i.imm);
          break;
        case Rule::kExtract:
        case Rule::kExtractSigned:
          if (!sb && !sc)
            s = extract(sa, static_cast<uint32_t>(b), static_cast<uint32_t>(c), i.bits,
                        i.rule == Rule::kExtractSigned);
          break;
        case Rule::kInsert:  // the position and length stand in the detail's slots
          if (!w.shadow(i.c, false, l) && !w.shadow(i.detail->slots[0], false, l))
            s = insert(sa, sb, static_cast<uint32_t>(c), w.lane<uint32_t>(i.detail->slots[0])[l], i.bits);
          break;
        case Rule::kReverse:
          s = reverse(sa, i.bits);
          break;
      }
    }
    w.set_shadow(i.d, i.d_wide, l, s);
  }
}

}  // namespace ptx
