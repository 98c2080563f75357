#include "cuda/calls_attention.h"

#include "cuda/attention.h"
#include "cuda/call.h"

namespace tilewright::cuda {
namespace {

constexpr const char* kOp = "attention";
using tw::cuda::AttentionArgs;

tw::cuda::Heads operand(const char* name, const TensorView& t, DType dtype) {
  expect_here(kOp, name, t);
  TW_EXPECT(t.ndim == 4, kOp,
            std::string(name) + " must be (batch, heads, seq, head_dim), got " + shape_of(t));
  TW_EXPECT(t.dtype == dtype, kOp,
            std::string(name) + " must be " + name_of(dtype) + " as q is, got " + name_of(t.dtype));
  expect_unit_stride(kOp, name, t);
  return heads_of(t);
}

// A mask or bias that broadcasts to (batch, heads, seq_q, seq_k), read in place.
tw::cuda::AttentionScores scores(const char* name, const TensorView& t, const int64_t (&full)[4]) {
  tw::cuda::AttentionScores s;
  if (!t) return s;
  expect_here(kOp, name, t);
  TW_EXPECT(t.ndim <= 4, kOp, std::string(name) + " must have up to 4 dimensions, got " + shape_of(t));
  int64_t* strides[4] = {&s.batch, &s.head, &s.row, &s.key};
  for (int i = 1; i <= t.ndim; ++i) {
    TW_EXPECT(t.dim(-i) == full[4 - i] || t.dim(-i) == 1, kOp,
              std::string(name) + " must broadcast to (" + std::to_string(full[0]) + ", " +
                  std::to_string(full[1]) + ", " + std::to_string(full[2]) + ", " + std::to_string(full[3]) +
                  "), got " + shape_of(t));
    *strides[4 - i] = t.dim(-i) == 1 ? 0 : t.stride(-i);
  }
  s.data = t.data;
  s.type = type_of(t.dtype);
  return s;
}

const float* per_head(const char* name, const TensorView& t, int64_t heads, int dims) {
  if (!t) return nullptr;
  expect_here(kOp, name, t);
  TW_EXPECT(t.ndim >= 1 && t.ndim <= dims && t.dtype == DType::f32 && t.dim(-1) == heads &&
                (heads <= 1 || t.stride(-1) == 1),
            kOp,
            std::string(name) + " must be contiguous float32 with " + std::to_string(heads) + " heads, got " +
                name_of(t.dtype) + " " + shape_of(t));
  return t.as<const float>();
}

const int64_t* per_sequence(const char* name, const TensorView& t, int64_t batch) {
  if (!t) return nullptr;
  expect_here(kOp, name, t);
  TW_EXPECT(t.dtype == DType::i64 && t.ndim == 1 && t.dim(0) == batch && t.is_contiguous(), kOp,
            std::string(name) + " must be contiguous int64 of shape (" + std::to_string(batch) + ",), got " +
                name_of(t.dtype) + " " + shape_of(t));
  return t.as<const int64_t>();
}

// All of a call but its keys and values.
AttentionArgs queries(const AttentionInputs& in, const AttentionOptions& options) {
  AttentionArgs a;
  const TensorView& q = in.q;
  TW_EXPECT(q.dtype == DType::bf16 || q.dtype == DType::f16, kOp,
            std::string("the CUDA kernels take bfloat16 and float16, got ") + name_of(q.dtype));
  a.q = operand("q", q, q.dtype);
  a.type = type_of(q.dtype);
  const bool packed = bool(in.q_start);
  TW_EXPECT(packed == bool(in.q_end) && (!packed || q.dim(0) == 1), kOp,
            "packed queries need q_start, q_end and a batch of 1");
  a.batch = packed ? in.q_start.numel() : q.dim(0);
  a.heads = q.dim(1), a.seq_q = q.dim(2), a.head_dim = q.dim(3);
  a.q_start = per_sequence("q_start", in.q_start, a.batch);
  a.q_end = per_sequence("q_end", in.q_end, a.batch);
  a.scale = options.scale, a.softcap = options.softcap;
  TW_EXPECT(options.causal >= 0 && options.causal <= 2, kOp, "causal must be 0, 1 or 2");
  a.causal = static_cast<tw::cuda::CausalMask>(options.causal);
  a.window_left = options.window_left, a.window_right = options.window_right;
  TW_EXPECT(options.dropout_p >= 0 && options.dropout_p <= 1, kOp, "dropout_p must be in [0, 1]");
  a.keep = static_cast<float>(1.0 - options.dropout_p);
  if (a.keep < 1) {
    TW_EXPECT(in.seed && in.seed.dtype == DType::i64 && in.seed.numel() == 1, kOp,
              "dropout needs a seed, one int64");
    expect_here(kOp, "seed", in.seed);
    a.seed = in.seed.as<const int64_t>();
  }
  a.alibi = per_head("alibi_slopes", in.alibi, a.heads, 2);
  if (a.alibi && in.alibi.ndim == 2) {
    TW_EXPECT(in.alibi.dim(0) == a.batch, kOp, "alibi_slopes must be (heads,) or (batch, heads)");
    a.alibi_batch = in.alibi.stride(0);
  }
  a.sinks = per_head("sinks", in.sinks, a.heads, 1);
  return a;
}

void expect_supported(const AttentionArgs& a) {
  TW_EXPECT(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, kOp,
            "the number of query heads must be a multiple of the key heads, got " + std::to_string(a.heads) +
                " and " + std::to_string(a.kv_heads));
  if (a.head_dim > 256 || a.v_dim > 256)
    throw NotSupported("attention: the CUDA kernels take head_dim up to 256, got " +
                       std::to_string(std::max(a.head_dim, a.v_dim)));
  expect_countable(kOp, "rows", 2 * a.seq_q * std::max<int64_t>(a.heads, 1));
  expect_countable(kOp, "keys", 2 * a.capacity);
  expect_countable(kOp, "sequences' heads", a.batch * std::max<int64_t>(a.heads, 1));
}

void read_scores(const AttentionInputs& in, AttentionArgs& a) {
  TW_EXPECT(!(in.q_start || in.block_table) || (!in.mask && !in.bias), kOp,
            "packed queries and paged keys take no mask and no bias");
  const int64_t full[4] = {a.batch, a.heads, a.seq_q, a.capacity};
  TW_EXPECT(!in.mask || in.mask.dtype == DType::boolean, kOp, "mask must be boolean");
  TW_EXPECT(!in.bias || is_float_storage(in.bias.dtype), kOp, "bias must be float32, bfloat16 or float16");
  a.mask = scores("mask", in.mask, full), a.bias = scores("bias", in.bias, full);
}

AttentionArgs call_of(const AttentionInputs& in, const AttentionOptions& options) {
  AttentionArgs a = queries(in, options);
  const TensorView &k = in.k, &v = in.v, &table = in.block_table;
  a.k = operand("k", k, in.q.dtype), a.v = operand("v", v, in.q.dtype);
  for (int i = 0; i < 3; ++i)
    TW_EXPECT(k.dim(i) == v.dim(i), kOp,
              "k and v may differ in head_dim only, got " + shape_of(k) + " and " + shape_of(v));
  TW_EXPECT(k.dim(3) == a.head_dim, kOp,
            "q and k must have one head_dim, got " + shape_of(in.q) + " and " + shape_of(k));
  a.kv_heads = k.dim(1), a.v_dim = v.dim(3), a.capacity = k.dim(2), a.k_rows = k.dim(0);
  if (table) {
    expect_here(kOp, "block_table", table);
    TW_EXPECT(table.dtype == DType::i32 && table.ndim == 2 && (table.dim(1) <= 1 || table.stride(1) == 1),
              kOp, "block_table must be int32 (batch, max_blocks), contiguous in its last dimension");
    a.block_table = table.as<const int32_t>(), a.table_stride = table.stride(0);
    a.page_size = k.dim(2), a.pages = k.dim(0);
    a.capacity = table.dim(1) * a.page_size, a.k_rows = table.dim(0);
    if (a.page_size == 0) a.block_table = nullptr;
  }
  // Keys are a row for each sequence, or packed in one row, or chosen by k_batch.
  a.packed_keys = in.q_start && !table && !in.k_batch && a.k_rows == 1;
  TW_EXPECT(in.k_batch || a.packed_keys || a.k_rows == a.batch, kOp,
            "k and v must be (batch, kv_heads, seq_k, head_dim) matching q " + shape_of(in.q) + ", got k " +
                shape_of(k) + ", v " + shape_of(v));
  a.k_start = per_sequence("k_start", in.k_start, a.batch);
  a.k_end = per_sequence("k_end", in.k_end, a.batch);
  a.k_batch = per_sequence("k_batch", in.k_batch, a.batch);
  read_scores(in, a);
  expect_supported(a);
  return a;
}

void read_results(const AttentionInputs& in, const TensorView& out, const TensorView& lse, AttentionArgs& a) {
  a.out = operand("out", out, in.q.dtype);
  TW_EXPECT(
      out.dim(0) == in.q.dim(0) && out.dim(1) == a.heads && out.dim(2) == a.seq_q && out.dim(3) == a.v_dim,
      kOp, "out must have q's shape up to v's head_dim, got " + shape_of(out));
  if (!lse) return;
  expect_here(kOp, "lse", lse);
  TW_EXPECT(lse.dtype == DType::f32 && lse.ndim == 3 && lse.is_contiguous() && lse.dim(0) == in.q.dim(0) &&
                lse.dim(1) == a.heads && lse.dim(2) == a.seq_q,
            kOp, "lse must be contiguous float32 (batch, heads, seq_q), got " + shape_of(lse));
  a.lse = lse.as<float>();
}

AttentionArgs call_of(const AttentionInputs& in, const QuantisedKvInputs& kv,
                      const AttentionOptions& options) {
  AttentionArgs a = queries(in, options);
  TW_EXPECT(kv.bits == 8 || kv.bits == 4, kOp,
            "a QuantizedKV has 8 or 4 bits, got " + std::to_string(kv.bits));
  TW_EXPECT(kv.group_size > 0 && kv.group_size % 32 == 0 && kv.residual >= 0 && kv.max_len >= 0, kOp,
            "a QuantizedKV's group_size must be a multiple of 32, residual and max_len at least 0");
  TW_EXPECT(kv.k_codes.ndim == 6 && kv.k_codes.dim(0) == a.batch && kv.head_dim == a.head_dim, kOp,
            "q " + shape_of(in.q) + " must have the batch and head_dim of the QuantizedKV, " +
                shape_of(kv.k_codes) + " and " + std::to_string(kv.head_dim));
  const int64_t batch = a.batch, heads = kv.k_codes.dim(1), dim = kv.head_dim;
  const int64_t slots = batch * heads, tiles = (kv.max_len + 63) / 64, step = kv.bits * 16;
  const bool nibbles = kv.bits == 4;
  const int64_t groups = (kv.max_len + kv.group_size - 1) / kv.group_size;
  const int64_t channels = (dim + kv.group_size - 1) / kv.group_size;
  const int64_t tail_rows = nibbles ? kv.residual + kv.group_size - 1 : 0;
  const auto pointer = [&](const char* name, const TensorView& t, DType dtype, int64_t elements) {
    expect_here(kOp, name, t);
    TW_EXPECT(t.dtype == dtype && t.is_contiguous() && t.numel() == elements &&
                  reinterpret_cast<uintptr_t>(t.data) % 16 == 0,
              kOp,
              std::string(name) + " of the QuantizedKV must be contiguous " + name_of(dtype) + " with " +
                  std::to_string(elements) + " elements, got " + name_of(t.dtype) + " " + shape_of(t));
    return t.data;
  };
  const DType scales = nibbles ? DType::bf16 : DType::f32;
  a.kv.k_codes = static_cast<uint8_t*>(
      pointer("k_codes", kv.k_codes, DType::u8, slots * tiles * 2 * ((dim + 3) / 4) * step));
  a.kv.v_codes = static_cast<uint8_t*>(
      pointer("v_codes", kv.v_codes, DType::u8, slots * tiles * ((dim + 31) / 32) * 16 * step));
  a.kv.k_scales = pointer("k_scales", kv.k_scales, scales,
                          nibbles ? slots * groups * 2 * ((dim + 15) / 16 * 16) : slots * tiles * 64);
  a.kv.v_scales =
      pointer("v_scales", kv.v_scales, scales, nibbles ? slots * tiles * channels * 128 : slots * tiles * 64);
  a.kv.k_tail = pointer("k_tail", kv.k_tail, DType::bf16, slots * tail_rows * dim);
  a.kv.v_tail = pointer("v_tail", kv.v_tail, DType::bf16, slots * tail_rows * dim);
  a.kv.counts = static_cast<int64_t*>(pointer("counts", kv.counts, DType::i64, 2));
  a.kv.tail_rows = tail_rows, a.kv.group = kv.group_size, a.kv.bits = kv.bits;
  a.kv_heads = heads, a.v_dim = dim, a.capacity = kv.max_len, a.k_rows = batch;
  // As many keys as the mask and the bias say: the kernels compare it with the tokens that there are.
  int64_t& keys = a.kv.score_keys;
  for (const TensorView* t : {&in.mask, &in.bias})
    if (*t && t->ndim > 0 && t->dim(-1) != 1) {
      TW_EXPECT(keys < 0 || keys == t->dim(-1), kOp, "mask and bias must have one number of keys");
      keys = t->dim(-1);
    }
  a.capacity = keys < 0 ? a.capacity : keys;
  read_scores(in, a);
  a.capacity = kv.max_len;
  expect_supported(a);
  return a;
}

int multiprocessors(int device) {
  int count = 0;
  const cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (e != cudaSuccess) throw std::runtime_error(std::string("attention: CUDA: ") + cudaGetErrorString(e));
  return count;
}

void expect_workspace(const TensorView& workspace, int64_t bytes) {
  if (bytes == 0) return;
  expect_here(kOp, "workspace", workspace);
  TW_EXPECT(workspace.is_contiguous() && workspace.numel() * size_of(workspace.dtype) >= bytes &&
                reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0,
            kOp, "workspace must be " + std::to_string(bytes) + " bytes, got " + shape_of(workspace));
}

void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("attention: CUDA: ") + cudaGetErrorString(e));
}

void run(Where where, const AttentionArgs& a, const TensorView& workspace) {
  const int count = multiprocessors(where.device);
  expect_workspace(workspace, tw::cuda::attention_forward_workspace_bytes(a, count));
  const DeviceGuard guard(where.device);
  check(tw::cuda::attention_forward(a, workspace.data, count, where.stream));
}

}  // namespace

int64_t attention_workspace(int device, const AttentionInputs& in) {
  return tw::cuda::attention_forward_workspace_bytes(call_of(in, {}), multiprocessors(device));
}

void attention(Where where, const AttentionInputs& in, const AttentionOptions& options, const TensorView& out,
               const TensorView& lse, const TensorView& workspace) {
  AttentionArgs a = call_of(in, options);
  read_results(in, out, lse, a);
  run(where, a, workspace);
}

int64_t attention_quantised_workspace(int device, const TensorView& q, const QuantisedKvInputs& kv) {
  const TensorView none;
  const AttentionInputs in = {q,    none, none, none, none, none, none,
                              none, none, none, none, none, none, none};
  return tw::cuda::attention_forward_workspace_bytes(call_of(in, kv, {}), multiprocessors(device));
}

void attention_quantised(Where where, const AttentionInputs& in, const QuantisedKvInputs& kv,
                         const AttentionOptions& options, const TensorView& out, const TensorView& lse,
                         const TensorView& workspace) {
  AttentionArgs a = call_of(in, kv, options);
  read_results(in, out, lse, a);
  run(where, a, workspace);
}

void attention_backward(Where where, const AttentionInputs& in, const AttentionOptions& options,
                        const AttentionGradients& grads, const TensorView& slopes) {
  if (in.block_table || in.k_batch)
    throw NotSupported("attention: paged and indexed caches have no gradient");
  tw::cuda::AttentionGradArgs a;
  static_cast<AttentionArgs&>(a) = call_of(in, options);
  read_results(in, grads.out, grads.lse, a);
  const auto like = [&](const char* name, const TensorView& t, const TensorView& of) {
    const tw::cuda::Heads h = operand(name, t, in.q.dtype);
    TW_EXPECT(same_shape(t, of), kOp,
              std::string(name) + " must be " + shape_of(of) + ", got " + shape_of(t));
    return h;
  };
  a.grad_out = like("grad_out", grads.grad_out, grads.out);
  a.grad_q = like("grad_q", grads.grad_q, in.q);
  a.grad_k = like("grad_k", grads.grad_k, in.k), a.grad_v = like("grad_v", grads.grad_v, in.v);
  const auto statistic = [&](const char* name, const TensorView& t) -> float* {
    if (!t) return nullptr;
    expect_here(kOp, name, t);
    TW_EXPECT(t.dtype == DType::f32 && t.is_contiguous() && same_shape(t, grads.lse), kOp,
              std::string(name) + " must be contiguous float32 like lse, got " + shape_of(t));
    return t.as<float>();
  };
  TW_EXPECT(grads.lse && grads.delta, kOp, "the gradient needs lse and delta");
  a.grad_lse = statistic("grad_lse", grads.grad_lse), a.delta = statistic("delta", grads.delta);
  const auto summed = [&](const char* name, const TensorView& t, const TensorView& of) -> float* {
    if (!t) return nullptr;
    expect_here(kOp, name, t);
    TW_EXPECT(
        of && t.dtype == DType::f32 && t.is_contiguous() && same_shape(t, of), kOp,
        std::string(name) + " must be contiguous float32 of shape " + shape_of(of) + ", got " + shape_of(t));
    return t.as<float>();
  };
  a.grad_alibi = summed("grad_alibi", grads.grad_alibi, in.alibi);
  a.grad_sinks = summed("grad_sinks", grads.grad_sinks, in.sinks);
  a.grad_bias = summed("grad_bias", grads.grad_bias, in.bias);
  if (a.grad_alibi) {
    TW_EXPECT(bool(slopes), kOp, "the gradient of alibi_slopes needs memory for slopes");
    a.slopes = statistic("slopes", slopes);
  }
  for (int i = 0; i < 4; ++i) a.bias_sizes[i] = i < 4 - in.bias.ndim ? 1 : in.bias.dim(i - 4);
  const DeviceGuard guard(where.device);
  check(tw::cuda::attention_backward(a, where.stream));
}

}  // namespace tilewright::cuda
