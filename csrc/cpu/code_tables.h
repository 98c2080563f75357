// What a 4-bit code stands for in the formats whose levels are not evenly spaced: 16 values a format.
// Included by files compiled with ISA flags and by ops, so plain constants.
#pragma once
#include <cstdint>

namespace tilewright {
namespace {

// w = scale * unit * values[code]. The integers fit int8, so that integer kernels look them up byte by byte;
// the unit is a power of two, so scale * unit loses nothing.
struct IntegerTable {
  const char* name;
  float unit;
  int8_t values[16];
};

// A linear 4-bit grid that avoids the middle: IQ4_NL and IQ4_XS of ggml.
constexpr IntegerTable kIq4Nl = {
    "iq4_nl", 1.0f, {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
// Twice the FP4 (E2M1) values of the OCP microscaling specification, bit 3 being the sign; the scale is half
// of the block's 2^(e - 127). (Doubled integers are ggml's convention.)
constexpr IntegerTable kMxfp4 = {"mxfp4", 1.0f, {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}};

// ggml's 1 to 3-bit formats store 4 or 8 neighbouring magnitudes as an index into a grid, and signs apart.
// Here a code is the magnitude's number in the low 3 bits and a sign in bit 3. Rows of grids:
// csrc/ops/gguf_grids.h. 8 * (g - 1 + 1/8) for g = 0, 1, 2; with bit 3: 8 * (g - 1 - 1/8).
constexpr IntegerTable kIq1 = {"iq1", 0.125f, {-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7, 0, 0, 0, 0, 0}};
constexpr IntegerTable kIq2 = {"iq2", 0.125f, {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43, 0, 0, 0, 0, 0}};
constexpr IntegerTable kIq3Xxs = {
    "iq3_xxs", 0.25f, {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62}};
constexpr IntegerTable kIq3S = {
    "iq3_s", 1.0f, {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15}};

// w = scale * values[code], of bitsandbytes.
struct FloatTable {
  const char* name;
  float values[16];
};

// Quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E).
constexpr FloatTable kNf4 = {
    "nf4",
    {-1.0f, -0.69619280f, -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
     0.079580300f, 0.16093020f, 0.24611230f, 0.33791524f, 0.44070983f, 0.56261700f, 0.72295684f, 1.0f}};
// Three bits of exponent and mantissa over 12, bit 3 being the sign.
constexpr FloatTable kFp4 = {
    "fp4",
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, 0.0f, -0.0625f / 12,
     -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12}};

}  // namespace
}  // namespace tilewright
