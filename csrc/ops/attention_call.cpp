#include "ops/attention_call.h"

namespace tilewright {
namespace {

constexpr const char* kOp = kAttention;

// A mask or bias that broadcasts to (batch, heads, seq_q, seq_k), read in place.
ScoreTensor scores(const char* name, const TensorView& t, const int64_t (&full)[4]) {
  ScoreTensor s;
  if (!t) return s;
  expect_cpu(kOp, name, t);
  std::string wanted = "(" + std::to_string(full[0]) + ", " + std::to_string(full[1]) + ", " +
                       std::to_string(full[2]) + ", " + std::to_string(full[3]) + ")";
  TW_EXPECT(t.ndim <= 4, kOp, std::string(name) + " must broadcast to " + wanted + ", got " + shape_of(t));
  int64_t* strides[4] = {&s.batch, &s.head, &s.row, &s.key};
  for (int i = 1; i <= t.ndim; ++i) {
    const int64_t size = t.dim(-i);
    TW_EXPECT(size == full[4 - i] || size == 1, kOp,
              std::string(name) + " must broadcast to " + wanted + ", got " + shape_of(t));
    *strides[4 - i] = size == 1 ? 0 : t.stride(-i);
  }
  s.data = t.data;
  s.kind = t.dtype == DType::boolean ? MaskKind::boolean
           : t.dtype == DType::f32   ? MaskKind::f32
           : t.dtype == DType::bf16  ? MaskKind::bf16
                                     : MaskKind::f16;
  return s;
}

const float* per_head(const char* name, const TensorView& t, int64_t heads) {
  if (!t) return nullptr;
  expect_cpu(kOp, name, t);
  TW_EXPECT(t.ndim >= 1 && t.dtype == DType::f32 && t.dim(-1) == heads && (heads == 1 || t.stride(-1) == 1),
            kOp,
            std::string(name) + " must be contiguous float32 with " + std::to_string(heads) + " heads, got " +
                name_of(t.dtype) + " " + shape_of(t));
  return t.as<const float>();
}

// Whole numbers, one for each sequence; any strides. Absent: `missing` for all.
struct PerSequence {
  const int64_t* wide = nullptr;
  int64_t stride = 0, missing = 0;

  PerSequence(const char* name, const TensorView& t, int64_t batch, int64_t otherwise) : missing(otherwise) {
    if (!t) return;
    TW_EXPECT(t.device_type == 1 && t.dtype == DType::i64 && t.ndim == 1 && t.dim(0) == batch, kOp,
              std::string(name) + " must be int64 of shape (" + std::to_string(batch) + ",), got " +
                  name_of(t.dtype) + " " + shape_of(t));
    wide = t.as<const int64_t>();
    stride = t.stride(0);
  }
  int64_t operator[](int64_t b) const { return wide ? wide[b * stride] : missing; }
};

}  // namespace

AttentionTensor attention_operand(const char* name, const TensorView& t) {
  expect_storage(kOp, name, t);
  expect_cpu(kOp, name, t);
  TW_EXPECT(t.ndim == 4, kOp,
            std::string(name) + " must be (batch, heads, seq, head_dim), got " + shape_of(t));
  expect_unit_stride(kOp, name, t);
  AttentionTensor a;
  a.data = t.data;
  a.batch = t.strides[0];
  a.head = t.strides[1];
  a.row = t.strides[2];
  a.dtype = storage_of(t.dtype);
  return a;
}

AttentionCall::AttentionCall(const AttentionInputs& in, const AttentionOptions& options) {
  const TensorView &q = in.q, &k = in.k, &v = in.v;
  a.q = attention_operand("q", q);
  a.k = attention_operand("k", k);
  a.v = attention_operand("v", v);
  a.heads = q.shape[1], a.head_dim = q.shape[3], a.kv_heads = k.shape[1], a.v_dim = v.shape[3];
  TW_EXPECT(k.dtype == v.dtype && (q.dtype == k.dtype || q.dtype == DType::f32), kOp,
            std::string("q, k and v must have one dtype (a float32 q may meet 16-bit k, v), got ") +
                name_of(q.dtype) + ", " + name_of(k.dtype) + ", " + name_of(v.dtype));
  TW_EXPECT(v.shape[0] == k.shape[0] && v.shape[1] == a.kv_heads && v.shape[2] == k.shape[2] &&
                k.shape[3] == a.head_dim,
            kOp,
            "k and v must be (batch, kv_heads, seq_k, head_dim) matching q " + shape_of(q) + ", got k " +
                shape_of(k) + ", v " + shape_of(v));
  TW_EXPECT(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, kOp,
            "the number of query heads must be a multiple of the key heads, got " + std::to_string(a.heads) +
                " and " + std::to_string(a.kv_heads));
  constexpr int64_t kMaxDim = 512;
  if (a.head_dim > kMaxDim || a.v_dim > kMaxDim)
    throw NotSupported("attention: head_dim up to 512 is supported, got " +
                       std::to_string(std::max(a.head_dim, a.v_dim)));
  a.scale = options.scale;
  a.softcap = options.softcap;
  a.causal = static_cast<Causal>(options.causal);
  a.window_left = options.window_left;
  a.window_right = options.window_right;
  TW_EXPECT(options.dropout_p >= 0 && options.dropout_p <= 1, kOp, "dropout_p must be in [0, 1]");
  a.keep = static_cast<float>(1.0 - options.dropout_p);
  TW_EXPECT(in.seed || options.dropout_p == 0, kOp, "dropout needs a seed");
  if (in.seed) {
    TW_EXPECT(in.seed.dtype == DType::i64 && in.seed.numel() == 1 && in.seed.device_type == 1, kOp,
              "the dropout seed must be one int64");
    a.seed = static_cast<uint64_t>(*in.seed.as<const int64_t>());
  }
  read_sequences(in);
  const bool ragged = in.q_start || in.block_table;
  TW_EXPECT(!ragged || (!in.mask && !in.bias), kOp, "packed queries and paged keys take no mask and no bias");
  const int64_t full[4] = {a.batch, a.heads, q.shape[2], k.shape[2]};
  a.mask = scores("mask", in.mask, full);
  a.bias = scores("bias", in.bias, full);
  TW_EXPECT(!in.mask || in.mask.dtype == DType::boolean, kOp, "mask must be boolean");
  TW_EXPECT(!in.bias || is_float_storage(in.bias.dtype), kOp, "bias must be float32, bfloat16 or float16");
  TW_EXPECT(in.alibi.ndim <= 2, kOp,
            "alibi_slopes must be (heads,) or (batch, heads), got " + shape_of(in.alibi));
  a.alibi = per_head("alibi_slopes", in.alibi, a.heads);
  if (a.alibi && in.alibi.ndim == 2) {
    TW_EXPECT(in.alibi.dim(0) == a.batch, kOp, "alibi_slopes must be (heads,) or (batch, heads)");
    a.alibi_batch = in.alibi.strides[0];
  }
  TW_EXPECT(!in.sinks || in.sinks.ndim == 1, kOp, "sinks must be (heads,), got " + shape_of(in.sinks));
  a.sinks = per_head("sinks", in.sinks, a.heads);
}

void AttentionCall::read_sequences(const AttentionInputs& in) {
  const TensorView &q = in.q, &k = in.k, &table = in.block_table;
  const bool packed = bool(in.q_start);
  TW_EXPECT(packed == bool(in.q_end) && (!packed || q.shape[0] == 1), kOp,
            "packed queries need q_start, q_end and a batch of 1");
  a.batch = packed ? in.q_start.numel() : q.shape[0];
  int64_t capacity = k.shape[2], keys = k.shape[0];
  if (table) {
    TW_EXPECT(table.device_type == 1 && table.dtype == DType::i32 && table.ndim == 2 &&
                  (table.dim(1) <= 1 || table.stride(1) == 1),
              kOp, "block_table must be int32 (batch, max_blocks), contiguous in its last dimension");
    a.block_table = table.as<const int32_t>();
    a.table_stride = table.stride(0);
    a.page_size = k.shape[2];
    capacity = table.dim(1) * a.page_size;
    keys = table.dim(0);
  }
  // Keys are a row for each sequence, or packed in one row, or chosen by k_batch.
  const bool shared = packed && !table && keys == 1;
  TW_EXPECT(in.k_batch || shared || keys == a.batch, kOp,
            "k and v must be (batch, kv_heads, seq_k, head_dim) matching q " + shape_of(q) + ", got k " +
                shape_of(k) + ", v " + shape_of(in.v));
  const PerSequence q_start("q_start", in.q_start, a.batch, 0), q_end("q_end", in.q_end, a.batch, q.shape[2]);
  const PerSequence k_start("k_start", in.k_start, a.batch, 0), k_end("k_end", in.k_end, a.batch, capacity);
  const PerSequence k_batch("k_batch", in.k_batch, a.batch, 0);
  sequences.resize(size_t(a.batch));
  a.sequences = sequences.data();
  const int64_t group = a.heads / std::max<int64_t>(a.kv_heads, 1);
  int64_t blocks = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    AttentionSequence& s = sequences[size_t(b)];
    s.q_batch = packed ? 0 : b;
    s.q_first = q_start[b];
    s.q_count = q_end[b] - s.q_first;
    s.k_begin = k_start[b];
    s.k_end = k_end[b];
    s.k_batch = in.k_batch ? k_batch[b] : shared ? 0 : b;
    TW_EXPECT(s.q_first >= 0 && s.q_count >= 0 && s.q_first + s.q_count <= q.shape[2], kOp,
              "q_start and q_end must satisfy 0 <= start <= end <= " + std::to_string(q.shape[2]));
    TW_EXPECT(s.k_begin >= 0 && s.k_begin <= s.k_end && s.k_end <= capacity, kOp,
              "k_start and k_end must satisfy 0 <= start <= end <= " + std::to_string(capacity) + ", got " +
                  std::to_string(s.k_begin) + " and " + std::to_string(s.k_end));
    TW_EXPECT(s.k_batch >= 0 && s.k_batch < keys, kOp,
              "k_batch must be in [0, " + std::to_string(keys) + "), got " + std::to_string(s.k_batch));
    if (table && s.k_end > s.k_begin) {
      const int32_t* pages = a.block_table + s.k_batch * a.table_stride;
      for (int64_t i = s.k_begin / a.page_size; i <= (s.k_end - 1) / a.page_size; ++i)
        TW_EXPECT(pages[i] >= 0 && pages[i] < k.shape[0], kOp,
                  "block_table names page " + std::to_string(pages[i]) + " of " + std::to_string(k.shape[0]));
    }
    const int64_t length = s.k_end - s.k_begin;
    s.first_block = blocks;
    s.blocks = (length + kKeyBlock - 1) / kKeyBlock;
    blocks += s.blocks;
    longest = std::max(longest, length);
    most_rows = std::max(most_rows, s.q_count * group);
    pairs += s.q_count * group * length * a.kv_heads;
  }
}

int64_t total_blocks(const AttentionCall& call) {
  if (call.sequences.empty()) return 0;
  const AttentionSequence& last = call.sequences.back();
  return (last.first_block + last.blocks) * call.a.kv_heads;
}

std::vector<AttentionTask> key_tasks(const AttentionCall& call) {
  std::vector<AttentionTask> tasks;
  tasks.reserve(size_t(total_blocks(call)));
  for (size_t b = 0; b < call.sequences.size(); ++b)
    for (int64_t h = 0; h < call.a.kv_heads; ++h)
      for (int64_t i = 0; i < call.sequences[b].blocks; ++i)
        tasks.push_back({int32_t(b), int32_t(h), int32_t(i)});
  return tasks;
}

}  // namespace tilewright
