// The float side of instructions that integers share. Each looks at the types among the modifiers, and
// returns false, having taken nothing, where they are integers.
#pragma once

#include <algorithm>

#include "decode.h"

namespace ptx {

enum class Float1 { kAbs, kNeg };
enum class Float2 { kAdd, kSub, kMul, kDiv, kMin, kMax };

bool decode_float1(Decoder& d, Float1 op);
bool decode_float2(Decoder& d, Float2 op);
bool decode_float3(Decoder& d);  // fma, mad

// half.cpp: f16, bf16 and their pairs.
bool is_half(Type t);
void decode_half1(Decoder& d, Type t, Float1 op);
void decode_half2(Decoder& d, Type t, Float2 op);
void decode_half3(Decoder& d, Type t);
void decode_half_ex2(Decoder& d);
void decode_half_tanh(Decoder& d);

}  // namespace ptx
