// Functions that hardware approximates: rsqrt, ex2, lg2, sin, cos, tanh. Here they are computed as well as
// the C library can and rounded once; real results differ in their last bits (tanh: from the eleventh bit
// on).
#include "arithmetic.h"
#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

struct Exp2 {
  static float of(float x) { return std::exp2(x); }
};
struct Log2 {
  static float of(float x) { return static_cast<float>(std::log2(static_cast<double>(x))); }
};
struct ReciprocalSqrt {
  static float of(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
};
struct Sin {
  static float of(float x) { return static_cast<float>(std::sin(static_cast<double>(x))); }
};
struct Cos {
  static float of(float x) { return static_cast<float>(std::cos(static_cast<double>(x))); }
};
struct Tanh {
  static float of(float x) { return static_cast<float>(std::tanh(static_cast<double>(x))); }
};

template <class Op, bool kFlush>
struct Function {
  float operator()(float x) const {
    const float r = canonical(Op::of(kFlush ? flushed(x) : x));
    return kFlush ? flushed(r) : r;
  }
};

template <class Op>
void decode(Decoder& d) {
  if (!d.take("approx")) d.unsupported();
  const bool flush = d.take("ftz");
  const Type t = d.type();
  if (t != Type::kF32) d.unsupported();
  d.emit(flush ? run1<float, float, Function<Op, true>> : run1<float, float, Function<Op, false>>, t, {t});
}

}  // namespace

void add_approx(Opcodes& o) {
  o["rsqrt"] = decode<ReciprocalSqrt>;
  o["lg2"] = decode<Log2>;
  o["sin"] = decode<Sin>;
  o["cos"] = decode<Cos>;
  o["ex2"] = [](Decoder& d) { d.has("f32") ? decode<Exp2>(d) : decode_half_ex2(d); };
  o["tanh"] = [](Decoder& d) { d.has("f32") ? decode<Tanh>(d) : decode_half_tanh(d); };
}

}  // namespace ptx
