// The seam: one entry point per op. Each validates once, returns early on empty input, picks an
// implementation and runs it on the team. Errors: std::invalid_argument (ValueError in Python),
// NotSupported (NotImplementedError).
#pragma once
#include <optional>
#include <string>

#include "tensor.h"

namespace tilewright {

struct QuantisedKv;  // cpu/quantised_kv.h

// An absent tensor is a default TensorView.
void norm(const char* op, const TensorView& x, const TensorView& residual, const TensorView& weight,
          const TensorView& bias, const TensorView& out, const TensorView& sum, float eps, bool centred);

// How a packed weight (cpu/kernels.h: PackedWeight) is to be read; group_size -1: one group a row. codes,
// offset and scale are the numbers of Codes, Offset and Scale.
struct WeightFormat {
  int64_t n = 0, k = 0;
  int codes = 0;
  int64_t group_size = 32;
  int offset = 0, scale = 0;
};
// Beside the activation mode: residual, of out's shape and dtype, is added before the result is rounded;
// columns, int64 (k), says which column of x each packed column multiplies; |x| >= outlier_threshold > 0 is
// multiplied in fp32 where the others are integers. group_sizes, int64 (groups): the weight and the bias are
// those of so many matrices, one below the other, and x (rows, k) holds the rows of each in turn.
struct LinearOptions {
  const TensorView &bias, &residual, &columns, &group_sizes;
  const std::string& activation;
  double outlier_threshold = 0;
};
// out = x @ w.T + bias + residual. bias is float32.
void linear(const TensorView& x, const TensorView& packed, const WeightFormat& format,
            const LinearOptions& options, const TensorView& out);

// out = residual + act(x @ gate.T) * (x @ up.T) @ down.T, with biases; gate's rows stand above up's.
struct GatedMlpOptions {
  const TensorView &gate_up_bias, &down_bias, &residual;
  const std::string &act, &activation;
};
void gated_mlp(const TensorView& x, const TensorView& gate_up, const WeightFormat& gate_up_format,
               const TensorView& down, const WeightFormat& down_format, const GatedMlpOptions& options,
               const TensorView& out);

int64_t packed_block_bytes(const WeightFormat& format);
// codes uint8 (n, k), scales float32 (n, groups), offsets absent, uint8 or float32 (n, groups).
void pack_codes(const TensorView& codes, const TensorView& scales, const TensorView& offsets,
                const TensorView& out, const WeightFormat& format);
// w bfloat16 (n, k), as it is.
void pack_bf16(const TensorView& w, const TensorView& out, const WeightFormat& format);
void pack_gguf(const TensorView& raw, const std::string& type, const TensorView& out, int64_t n, int64_t k);
// Dequantised rows: out[i] = w[index[i]], float32.
void weight_rows(const TensorView& index, const TensorView& packed, const WeightFormat& format,
                 const TensorView& out);

// Attention; see cpu/kernels/attention_rows.h. Absent tensors are default TensorViews.
//   q (batch, heads, seq_q, head_dim), k and v (batch, kv_heads, seq_k, head_dim), mask and bias broadcast to
//   (batch, heads, seq_q, seq_k).
//   q_start, q_end: sequences packed in the rows of a q of batch 1, and in those of a k and v of batch 1.
//   k_start, k_end: valid keys; k_batch: which row of k and v (or of the block table) a sequence reads.
//   block_table: int32 (batch, max_blocks); k and v are pages, (num_blocks, kv_heads, page_size, head_dim).
//   q_start to k_batch are int64 (batch), seed is one int64: dropout needs it.
struct AttentionInputs {
  const TensorView &q, &k, &v, &mask, &bias, &alibi, &sinks, &q_start, &q_end, &k_start, &k_end, &k_batch,
      &block_table, &seed;
  const QuantisedKv* quantised = nullptr;  // holds the keys and values that k and v give the shape of
};
struct AttentionOptions {
  float scale = 1, softcap = 0;
  int causal = 0;  // 0 none, 1 top-left, 2 bottom-right
  int64_t window_left = -1, window_right = -1;
  double dropout_p = 0;
};
void attention(const AttentionInputs& inputs, const AttentionOptions& options, const TensorView& out,
               const TensorView& lse);
// The gradient of `attention`. out, lse: its results; delta: float32 (batch, heads, seq_q), overwritten.
// grad_q, grad_k and grad_v have the dtypes of q, k and v, the others are float32; rows and keys of no
// sequence, and bias elements that nothing reads, are left as they are. Wanted are grad_q, grad_k, grad_v and
// what is given.
struct AttentionGradients {
  const TensorView &out, &lse, &grad_out, &grad_lse, &delta, &grad_q, &grad_k, &grad_v, &grad_bias,
      &grad_alibi, &grad_sinks;
};
void attention_backward(const AttentionInputs& inputs, const AttentionOptions& options,
                        const AttentionGradients& gradients);
// A quantised KV cache as the layout in cpu/quantised_kv.h says. counts: int64 (2,), tokens in all and as
// codes.
struct QuantisedKvInputs {
  const TensorView &k_codes, &v_codes, &k_scales, &v_scales, &k_tail, &v_tail, &counts;
  int bits = 8;
  int64_t group_size = 32, residual = 32, max_len = 0, head_dim = 0;
};
// Attention to one; k, v and what says where sequences lie are absent from `inputs`.
void attention_quantised(const AttentionInputs& inputs, const QuantisedKvInputs& kv,
                         const AttentionOptions& options, const TensorView& out, const TensorView& lse);
// Appends the tokens of k and v, (batch, kv_heads, seq, head_dim).
void kv_append_quantised(const QuantisedKvInputs& kv, const TensorView& k, const TensorView& v);
// rotary_dim absent: twice the last dimension of cos. In place where the outputs are q and k.
void rope(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
          const TensorView& positions, const TensorView& out_q, const TensorView& out_k, bool interleaved,
          std::optional<int64_t> rotary_dim);

// activation: "silu", "gelu", "gelu_tanh"
void act_mul(const TensorView& gate, const TensorView& up, const TensorView& out,
             const std::string& activation);

void kv_append(const TensorView& cache_k, const TensorView& cache_v, const TensorView& k, const TensorView& v,
               const TensorView& positions, const TensorView& block_table, const TensorView& cache_seqlens);

// temperature 0: the first maximum of each row, without uniform.
void sample(const TensorView& logits, const TensorView& uniform, const TensorView& out, double temperature,
            int64_t top_k, double top_p, double min_p);

// What the machine can do at most with num_threads(), a second: bytes read from `data` (kind "read"; uint8, a
// multiple of 1024), or operations ("fp32", "bf16", "int8"; data absent). See cpu/kernels/ceilings.cpp.
double ceiling(const std::string& kind, const TensorView& data, int64_t iterations);

}  // namespace tilewright
