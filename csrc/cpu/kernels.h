// What the dispatch table and the kernels share: plain argument structs and one declaration per op and ISA
// level. Included by files compiled with ISA flags, so no STL here.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace tilewright {

enum class Storage : uint8_t { f32, bf16, f16 };  // what kernels read and write; arithmetic is fp32

constexpr int kMaxRowDims = 5;

// Rows of a tensor whose last dimension is contiguous: row r, counted over the leading dimensions, starts at
// base + offset(r) elements.
struct Rows {
  void* base = nullptr;
  int dims = 0;
  int64_t shape[kMaxRowDims] = {};
  int64_t strides[kMaxRowDims] = {};
};

// y = (x - mean) * rstd * weight + bias over the last dimension, with x + residual in place of x where given.
struct NormArgs {
  Rows x, residual, out, sum;  // residual.base == nullptr: none, and sum is unused
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t n = 0;  // length of the last dimension
  float eps = 0;
  Storage dtype = Storage::f32, weight_dtype = Storage::f32;
  bool centred = false;  // layer norm; otherwise mean = 0
};
using NormKernel = void (*)(const NormArgs&, int64_t row_begin, int64_t row_end);

// Rows of a (batch, heads, seq, head_dim) tensor whose last dimension is contiguous; strides count elements.
struct HeadRows {
  void* base = nullptr;
  int64_t heads = 0, batch_stride = 0, head_stride = 0, seq_stride = 0;
};

// Rotates q and k: tokens are counted over (batch, seq), channels from rotary_dim on are copied.
struct RopeArgs {
  HeadRows in[2], out[2];  // q, k; in place where the bases are equal
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;  // from one position to the next
  const int64_t* positions = nullptr;      // nullptr: the token's index in its sequence
  int64_t positions_batch_stride = 0, positions_seq_stride = 0;
  int64_t seq = 0, head_dim = 0, rotary_dim = 0;
  Storage dtype = Storage::f32;
  bool interleaved = false;
};
using RopeKernel = void (*)(const RopeArgs&, int64_t token_begin, int64_t token_end);

enum class Activation : uint8_t { silu, gelu, gelu_tanh };

// out = act(gate) * up; elements are counted row by row.
struct ActMulArgs {
  Rows gate, up, out;
  int64_t n = 0;  // length of a row
  Storage dtype = Storage::f32;
  Activation activation = Activation::silu;
};
using ActMulKernel = void (*)(const ActMulArgs&, int64_t begin, int64_t end);

// Copies k or v into its cache: token t of batch element b goes to cache + offsets[b * seq + t] + head *
// head_stride. Tokens go in ascending order, so that of two with one slot the last one stays.
struct KvAppendArgs {
  HeadRows in;
  void* cache = nullptr;
  const int64_t* offsets = nullptr;
  int64_t head_stride = 0, seq = 0, head_dim = 0;
  Storage in_dtype = Storage::f32, cache_dtype = Storage::f32;
};
using KvAppendKernel = void (*)(const KvAppendArgs&, int64_t head, int64_t batch_begin, int64_t batch_end);

// Sampling looks at a row of n logits in blocks of kSampleBlock; the last one may be shorter.
constexpr int64_t kSampleBlock = 64;
struct SampleArgs {
  const void* logits = nullptr;
  int64_t row_stride = 0, n = 0, blocks = 0;  // blocks of one row
  Storage dtype = Storage::f32;
};
// The maximum of each block, or NaN if it holds one; blocks are counted over the rows.
using SampleMaxKernel = void (*)(const SampleArgs&, float* block_max, int64_t block_begin, int64_t block_end);
// The logits >= lower of the blocks [block_begin, block_end) of a row with their token ids, in ascending
// order of these and without -inf; block_max is the row's.
using SampleGatherKernel = void (*)(const SampleArgs&, int64_t row, const float* block_max,
                                    int64_t block_begin, int64_t block_end, float lower, float* values,
                                    int32_t* ids, int64_t* count);
// weights[i] = exp((logits[begin + i] - max) / temperature) for the tokens [begin, end) of a row, and the
// sum.
using SampleWeightsKernel = void (*)(const SampleArgs&, int64_t row, int64_t begin, int64_t end, float max,
                                     float temperature, float* weights, float* sum);

#define TW_DECLARE(op, ...)      \
  void op##_scalar __VA_ARGS__;  \
  void op##_avx2 __VA_ARGS__;    \
  void op##_avxvnni __VA_ARGS__; \
  void op##_avx512 __VA_ARGS__;  \
  void op##_avx512bf16 __VA_ARGS__;

TW_DECLARE(norm, (const NormArgs&, int64_t, int64_t))
TW_DECLARE(rope, (const RopeArgs&, int64_t, int64_t))
TW_DECLARE(act_mul, (const ActMulArgs&, int64_t, int64_t))
TW_DECLARE(kv_append, (const KvAppendArgs&, int64_t, int64_t, int64_t))
TW_DECLARE(sample_max, (const SampleArgs&, float*, int64_t, int64_t))
TW_DECLARE(sample_gather,
           (const SampleArgs&, int64_t, const float*, int64_t, int64_t, float, float*, int32_t*, int64_t*))
TW_DECLARE(sample_weights, (const SampleArgs&, int64_t, int64_t, int64_t, float, float, float*, float*))

}  // namespace tilewright
