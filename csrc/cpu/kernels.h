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

// Kernel objects may not hold weak symbols, which a function in a class is where it is not inlined.
#define TW_ALWAYS_INLINE __attribute__((always_inline))

// A weight of n rows (outputs) and k columns, packed in blocks of 32 rows. A block is
//   codes    for each 32 k, in 8 steps of 4 k:
//    - 4 bits: [16 rows][4 k] bytes a step, row r in the low nibble, row r + 16 in the high one
//    - 5 bits: the low 4 like that, then the fifth: bit s of byte [half][16 rows][4 k] is that of step s
//    - 6 bits: the low 4 like that, then the others: bits 2s and 2s + 1 of byte [step / 4][half][16 rows][4
//    k]
//      are those of step s of 4
//    - 8 bits: [32 rows][4 k] bytes a step
//    - 16 bits: [half][8 steps][2][16 rows][2] bf16, columns (0, 2) and then (1, 3) of a step's 4
//   scales   [groups()][32 rows] fp16, bf16 or fp32; two levels: int8, factors of the supers
//   offsets  [groups()][32 rows]: nothing, zero points (uint8), or minima (as the scales)
//   supers   two levels: fp16 [k_supers()][32 rows], one for each 256 k, and the same again with minima
//   padding to 64 bytes
// and w = scale * (code - 2^(bits-1)), scale * (code - zero), or scale * code + min. Codes of a table stand
// for its values (cpu/code_tables.h), those of e4m3 and bf16 for themselves.
enum class Codes : uint8_t {
  int4,
  int5,
  int6,
  int8,
  nf4,
  fp4,
  iq4_nl,
  mxfp4,
  iq1,
  iq2,
  iq3_xxs,
  iq3_s,
  e4m3,
  bf16
};
enum class Offset : uint8_t { none, zero, min };
enum class Scale : uint8_t { f16, bf16, f32, two_level, none };
struct PackedWeight {
  const uint8_t* data = nullptr;
  int64_t n = 0, k = 0;
  int64_t group = 0;  // columns that share a scale: 16, or a multiple of 32
  Codes codes = Codes::int4;
  Offset offset = Offset::none;
  Scale scale = Scale::f16;

  TW_ALWAYS_INLINE bool is_table() const { return codes >= Codes::nf4 && codes <= Codes::iq3_s; }
  // Codes without integer values: products with them are floats.
  TW_ALWAYS_INLINE bool is_float() const {
    return codes == Codes::nf4 || codes == Codes::fp4 || codes >= Codes::e4m3;
  }
  TW_ALWAYS_INLINE int bits() const {
    return codes == Codes::bf16                           ? 16
           : codes == Codes::int8 || codes == Codes::e4m3 ? 8
           : codes == Codes::int6                         ? 6
           : codes == Codes::int5                         ? 5
                                                          : 4;
  }
  TW_ALWAYS_INLINE int64_t n_blocks() const { return (n + 31) / 32; }
  TW_ALWAYS_INLINE int64_t k_blocks() const { return (k + 31) / 32; }
  TW_ALWAYS_INLINE int64_t k_supers() const { return scale == Scale::two_level ? (k + 255) / 256 : 0; }
  TW_ALWAYS_INLINE int64_t parts() const { return group == 16 ? 2 : 1; }  // scales within 32 k
  TW_ALWAYS_INLINE int64_t blocks_per_group() const { return group == 16 ? 1 : group / 32; }
  TW_ALWAYS_INLINE int64_t groups() const {
    return scale == Scale::none ? 0 : (k_blocks() + blocks_per_group() - 1) / blocks_per_group() * parts();
  }
  TW_ALWAYS_INLINE int64_t scale_bytes() const {
    return scale == Scale::two_level ? 1 : scale == Scale::f32 ? 4 : scale == Scale::none ? 0 : 2;
  }
  TW_ALWAYS_INLINE int64_t offset_bytes() const {
    return offset == Offset::none ? 0 : offset == Offset::zero ? 1 : scale_bytes();
  }
  TW_ALWAYS_INLINE int64_t code_bytes() const { return k_blocks() * 128 * bits(); }
  TW_ALWAYS_INLINE int64_t super_bytes() const { return k_supers() * (offset == Offset::min ? 128 : 64); }
  TW_ALWAYS_INLINE int64_t block_bytes() const {
    return (code_bytes() + groups() * 32 * (scale_bytes() + offset_bytes()) + super_bytes() + 63) / 64 * 64;
  }
};

// Activations for the integer kernels: per row and 32 k, codes = round_half_even(x / scale), scale =
// max|x| / 127 (one scale a row with per_token). A block with a NaN or inf gets codes 0 and scale NaN.
// Corrections are for runs of `run` columns, 16 or a multiple of 32: over how many k one integer product
// goes.
struct QuantiseArgs {
  Rows x;
  Storage dtype = Storage::f32;
  int64_t k = 0, k_blocks = 0, run = 32, runs = 0;
  int64_t row_blocks = 0;  // from row to row of the results; k_blocks, or more for a part of a row
  bool per_token = false;
  Offset offset = Offset::none;
  int zero = 0;                    // implicit zero point of the weight, for Offset::none
  int8_t* codes = nullptr;         // [m][row_blocks * 32]
  float* scales = nullptr;         // [m][row_blocks]
  int32_t* corrections = nullptr;  // [m][runs]: -zero * sum, -sum, or the bits of float(sum) * scale
};
constexpr int64_t kLongRun = 256;  // 256 * 127 * 255 < 2^24: such an integer is exact as a float
using QuantiseKernel = void (*)(const QuantiseArgs&, int64_t row_begin, int64_t row_end);

// out[m][n] = sum_k x[m][k] w[n][k] + bias[n] + residual[m][n]
struct LinearArgs {
  PackedWeight w;
  // Integer kernels: what QuantiseArgs made. Float kernels: what PrepareArgs made.
  const int8_t* codes = nullptr;
  const float* scales = nullptr;
  const int32_t* corrections = nullptr;
  int64_t run = 32, runs = 0;
  const void* x = nullptr;
  const float* sums = nullptr;
  const float* bias = nullptr;
  Rows out, residual;  // residual.base == nullptr: none
  Storage out_dtype = Storage::f32;
};
constexpr int64_t kPanelBytes = 16 << 10;      // decoded weights, in L1 beside what passes over them
constexpr int64_t kPanelScaleBytes = 8 << 10;  // their scales and offsets
// Blocks [begin, end) of 32 outputs for rows [m_begin, m_end). panel: memory of this thread, kPanelBytes,
// kPanelScaleBytes and 128 bytes a row.
using LinearKernel = void (*)(const LinearArgs&, int64_t begin, int64_t end, int64_t m_begin, int64_t m_end,
                              void* panel);

// x to what the float kernels read, [m][row_blocks * 32], zero beyond k: floats (rounded to bf16 first where
// asked) or bf16 with columns (0, 2, 1, 3) of each 4; and the sums of each `run` = 16 or 32.
struct PrepareArgs {
  Rows x;
  Storage dtype = Storage::f32;
  int64_t k = 0, k_blocks = 0, run = 32;
  int64_t row_blocks = 0;  // as in QuantiseArgs
  bool round_bf16 = false;
  void* out = nullptr;
  float* sums = nullptr;  // [m][row_blocks * 32 / run]
};
using PrepareKernel = void (*)(const PrepareArgs&, int64_t row_begin, int64_t row_end);

// out = softmax(scale * q k^T + ...) v for tensors (batch, heads, seq, head_dim). Strides count elements; the
// last dimension of q, k, v and out is contiguous.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides
  Storage dtype = Storage::f32;
};
enum class MaskKind : uint8_t { none, boolean, f32, bf16, f16 };
struct ScoreTensor {  // broadcast to (batch, heads, seq_q, seq_k) by zero strides
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, key = 0;
  MaskKind kind = MaskKind::none;
};
enum class Causal : uint8_t { none, top_left, bottom_right };

// One sequence of the batch: rows [q_first, q_first + q_count) of q and out at index q_batch of their batch
// dimension, keys [k_begin, k_end) of row k_batch of k and v (of its row of the block table if there is one).
struct AttentionSequence {
  int64_t q_batch = 0, q_first = 0, q_count = 0;
  int64_t k_batch = 0, k_begin = 0, k_end = 0;
  int64_t first_block = 0, blocks = 0;  // its key blocks of kKeyBlock, counted over the sequences before it
  int64_t first_rows = 0, row_blocks = 0;  // gradient: its blocks of kGradRows rows, likewise
};
// What one call of a kernel works on: a sequence, a KV head and a block of rows or of keys.
struct AttentionTask {
  int32_t sequence, head, block;
};

struct QuantisedKv;  // cpu/quantised_kv.h

struct AttentionArgs {
  AttentionTensor q, k, v, out;
  const QuantisedKv* kv = nullptr;  // the keys and values, where they are codes: k and v have no data then
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, v_dim = 0;
  const AttentionSequence* sequences = nullptr;  // (batch)
  // Pages: key j of sequence b is row j % page_size of page block_table[b * table_stride + j / page_size].
  const int32_t* block_table = nullptr;
  int64_t table_stride = 0, page_size = 0;
  float* lse = nullptr;  // [q_batch][heads][lse_rows]
  int64_t lse_rows = 0;
  ScoreTensor mask, bias;        // mask: boolean, true = attend; bias: added after softcap
  const float* alibi = nullptr;  // slopes (batch, heads) or (heads): alibi_batch is 0 then
  int64_t alibi_batch = 0;
  const float* sinks = nullptr;  // (heads): one more logit in the denominator
  float scale = 1, softcap = 0;  // softcap 0: none
  Causal causal = Causal::none;
  int64_t window_left = -1, window_right = -1;
  float keep = 1;  // probability that dropout leaves an attention weight; 1: no dropout
  uint64_t seed = 0;
  // Set by the caller from the shapes:
  const AttentionTask* tasks = nullptr;
  void* packed_k = nullptr;  // prefill: per (sequence, KV head, key block); see attention_prefill.cpp
  void* packed_v = nullptr;
  uint8_t* v_not_finite = nullptr;  // per (sequence, KV head, key block)
  float* partials = nullptr;        // decode: [batch * kv_heads][chunks][rows][v_pad + 2]
  int64_t rows = 0;                 // decode: query rows of the longest sequence's KV head
  int64_t chunks = 0;
};

// Gradients from grad_out and grad_lse (absent: null). Those that are not asked for are null.
struct AttentionGradArgs {
  AttentionArgs a;
  AttentionTensor grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;  // as lse
  float* grad_bias = nullptr;       // of the bias's own shape, with these strides
  int64_t bias_batch = 0, bias_head = 0, bias_row = 0, bias_key = 0;
  float* slopes = nullptr;  // [splits][q_batch][heads][lse_rows]: a row's sum of grad_score * distance
  float* delta = nullptr;   // as lse: sum of grad_out * out - grad_lse
  int64_t splits = 1;       // key blocks i, i + splits, ... are one task's
  int64_t lse_size = 0;     // elements of lse
  // Per (sequence, KV head, row block): operands of 4-byte elements; see attention_backward.cpp.
  float* rows = nullptr;
  // Per (sequence, KV head, key block)
  float* keys = nullptr;
  uint8_t* k_not_finite = nullptr;
  float* partial_q = nullptr;  // [splits][row blocks][kGradRows][padded head_dim]
  int64_t total_row_blocks = 0;
};
constexpr int64_t kGradRows = 66;  // query rows per step of the gradient: 11 register tiles of 6

constexpr int64_t kKeyBlock = 256;   // keys per softmax step in prefill; chosen with kQueryRows so that
constexpr int64_t kQueryRows = 96;   // scores and probabilities (144 KiB) stay in L2 beside one K and V block
constexpr int64_t kDecodeRows = 16;  // at most this many (query, head of the group) rows: the decode kernel
constexpr int64_t kDecodeChunk = 256;  // keys per decode task, and per softmax step
// Bytes a packed K or V block needs, and the scratch of one task, at any level.
inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t padded32(int64_t n) { return (n + 31) / 32 * 32; }
inline int64_t decode_bytes(int64_t head_dim, int64_t v_dim) {
  return kDecodeRows * (padded32(head_dim) + 2 * kDecodeChunk + padded32(v_dim) + 2) * 4;
}
inline int64_t packed_block_elements(int64_t d) { return kKeyBlock * padded16(d); }  // of 4 bytes
inline int64_t grad_rows_elements(int64_t q_pad, int64_t v_pad) { return kGradRows * (q_pad + v_pad); }
inline int64_t grad_keys_elements(int64_t q_pad, int64_t v_pad) { return kKeyBlock * (2 * q_pad + v_pad); }
inline int64_t grad_scratch_elements(int64_t q_pad, int64_t v_pad) {
  return kGradRows * kKeyBlock * 4 + kKeyBlock * (2 * q_pad + v_pad);
}

using AttentionKernel = void (*)(const AttentionArgs&, int64_t task, void* scratch);
using AttentionGradKernel = void (*)(const AttentionGradArgs&, int64_t task, void* scratch);
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

// Probes of the machine's limits, for the benches.
using PeakKernel = void (*)(int64_t iterations, double& operations);
using ReadKernel = void (*)(const uint8_t* data, int64_t bytes, int64_t passes);

#define TW_DECLARE(op, ...)         \
  void op##_scalar __VA_ARGS__;     \
  void op##_avx2 __VA_ARGS__;       \
  void op##_avxvnni __VA_ARGS__;    \
  void op##_avx512 __VA_ARGS__;     \
  void op##_avx512bf16 __VA_ARGS__; \
  void op##_amx __VA_ARGS__;

TW_DECLARE(quantise_rows, (const QuantiseArgs&, int64_t, int64_t))
TW_DECLARE(linear_int8, (const LinearArgs&, int64_t, int64_t, int64_t, int64_t, void*))
TW_DECLARE(prepare_f32, (const PrepareArgs&, int64_t, int64_t))
TW_DECLARE(linear_f32, (const LinearArgs&, int64_t, int64_t, int64_t, int64_t, void*))
TW_DECLARE(prepare_bf16, (const PrepareArgs&, int64_t, int64_t))
TW_DECLARE(linear_bf16, (const LinearArgs&, int64_t, int64_t, int64_t, int64_t, void*))
TW_DECLARE(attention_pack, (const AttentionArgs&, int64_t, void*))
TW_DECLARE(attention_prefill, (const AttentionArgs&, int64_t, void*))
TW_DECLARE(attention_decode, (const AttentionArgs&, int64_t, void*))
TW_DECLARE(attention_merge, (const AttentionArgs&, int64_t, void*))
TW_DECLARE(attention_pack_quantised, (const AttentionArgs&, int64_t, void*))
TW_DECLARE(attention_decode_quantised, (const AttentionArgs&, int64_t, void*))
TW_DECLARE(attention_grad_rows, (const AttentionGradArgs&, int64_t, void*))
TW_DECLARE(attention_grad_pack, (const AttentionGradArgs&, int64_t, void*))
TW_DECLARE(attention_grad_keys, (const AttentionGradArgs&, int64_t, void*))
TW_DECLARE(attention_grad_q, (const AttentionGradArgs&, int64_t, void*))
TW_DECLARE(norm, (const NormArgs&, int64_t, int64_t))
TW_DECLARE(rope, (const RopeArgs&, int64_t, int64_t))
TW_DECLARE(act_mul, (const ActMulArgs&, int64_t, int64_t))
TW_DECLARE(kv_append, (const KvAppendArgs&, int64_t, int64_t, int64_t))
TW_DECLARE(sample_max, (const SampleArgs&, float*, int64_t, int64_t))
TW_DECLARE(sample_gather,
           (const SampleArgs&, int64_t, const float*, int64_t, int64_t, float, float*, int32_t*, int64_t*))
TW_DECLARE(sample_weights, (const SampleArgs&, int64_t, int64_t, int64_t, float, float, float*, float*))
TW_DECLARE(ceiling_fp32, (int64_t, double&))
TW_DECLARE(ceiling_bf16, (int64_t, double&))
TW_DECLARE(ceiling_int8, (int64_t, double&))
TW_DECLARE(ceiling_read, (const uint8_t*, int64_t, int64_t))

}  // namespace tilewright
