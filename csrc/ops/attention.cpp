#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "attention";

AttentionTensor operand(const char* name, const TensorView& t) {
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

const int64_t* per_batch(const char* name, const TensorView& t, int64_t batch) {
  if (!t) return nullptr;
  TW_EXPECT(t.device_type == 1 && t.dtype == DType::i64 && t.ndim == 1 && t.dim(0) == batch &&
                (batch <= 1 || t.stride(0) == 1),
            kOp, std::string(name) + " must be contiguous int64 of shape (" + std::to_string(batch) + ",)");
  return t.as<const int64_t>();
}

// Memory for the length of a call: the thread's scratch while small, else returned to the system at the end.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    constexpr int64_t kKept = 64 << 20;
    if (bytes <= kKept) {
      data_ = scratch(Scratch::operands, std::max<int64_t>(bytes, 64));
    } else {
      owned_.reset(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
      if (!owned_) throw std::bad_alloc();
      data_ = owned_.get();
    }
  }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> owned_;
  void* data_;
};

template <class Fn>
void run(int64_t tasks, bool serial, int64_t scratch_bytes, const Fn& fn) {
  const auto one = [&](int64_t task) { fn(task, scratch(Scratch::panel, scratch_bytes)); };
  if (serial) {
    for (int64_t i = 0; i < tasks; ++i) one(i);
  } else {
    parallel_tasks(tasks, one);
  }
}

}  // namespace

void attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
               const TensorView& bias, const TensorView& alibi, const TensorView& sinks,
               const TensorView& k_start, const TensorView& k_end, const AttentionOptions& options,
               const TensorView& out, const TensorView& lse) {
  AttentionArgs a;
  a.q = operand("q", q);
  a.k = operand("k", k);
  a.v = operand("v", v);
  a.out = operand("out", out);
  a.batch = q.shape[0], a.heads = q.shape[1], a.seq_q = q.shape[2], a.head_dim = q.shape[3];
  a.kv_heads = k.shape[1], a.seq_k = k.shape[2], a.v_dim = v.shape[3];
  TW_EXPECT(k.dtype == v.dtype && (q.dtype == k.dtype || q.dtype == DType::f32) && out.dtype == q.dtype, kOp,
            std::string("q, k, v and out must have one dtype (a float32 q may meet 16-bit k, v), got ") +
                name_of(q.dtype) + ", " + name_of(k.dtype) + ", " + name_of(v.dtype) + ", " +
                name_of(out.dtype));
  TW_EXPECT(k.shape[0] == a.batch && v.shape[0] == a.batch && v.shape[1] == a.kv_heads &&
                v.shape[2] == a.seq_k && k.shape[3] == a.head_dim,
            kOp,
            "k and v must be (batch, kv_heads, seq_k, head_dim) matching q " + shape_of(q) + ", got k " +
                shape_of(k) + ", v " + shape_of(v));
  TW_EXPECT(out.shape[0] == a.batch && out.shape[1] == a.heads && out.shape[2] == a.seq_q &&
                out.shape[3] == a.v_dim,
            kOp, "out has shape " + shape_of(out));
  TW_EXPECT(a.kv_heads > 0 ? a.heads % a.kv_heads == 0 : a.heads == 0, kOp,
            "the number of query heads must be a multiple of the key heads, got " + std::to_string(a.heads) +
                " and " + std::to_string(a.kv_heads));
  constexpr int64_t kMaxDim = 512;
  if (a.head_dim > kMaxDim || a.v_dim > kMaxDim)
    throw NotSupported("attention: head_dim up to 512 is supported, got " +
                       std::to_string(std::max(a.head_dim, a.v_dim)));
  const int64_t full[4] = {a.batch, a.heads, a.seq_q, a.seq_k};
  a.mask = scores("mask", mask, full);
  a.bias = scores("bias", bias, full);
  TW_EXPECT(!mask || mask.dtype == DType::boolean, kOp, "mask must be boolean");
  TW_EXPECT(!bias || is_float_storage(bias.dtype), kOp, "bias must be float32, bfloat16 or float16");
  TW_EXPECT(alibi.ndim <= 2, kOp, "alibi_slopes must be (heads,) or (batch, heads), got " + shape_of(alibi));
  a.alibi = per_head("alibi_slopes", alibi, a.heads);
  if (a.alibi && alibi.ndim == 2) {
    TW_EXPECT(alibi.dim(0) == a.batch, kOp, "alibi_slopes must be (heads,) or (batch, heads)");
    a.alibi_batch = alibi.strides[0];
  }
  TW_EXPECT(!sinks || sinks.ndim == 1, kOp, "sinks must be (heads,), got " + shape_of(sinks));
  a.sinks = per_head("sinks", sinks, a.heads);
  a.k_start = per_batch("k_start", k_start, a.batch);
  a.k_end = per_batch("k_end", k_end, a.batch);
  a.scale = options.scale;
  a.softcap = options.softcap;
  a.causal = static_cast<Causal>(options.causal);
  a.window_left = options.window_left;
  a.window_right = options.window_right;
  if (lse) {
    TW_EXPECT(lse.dtype == DType::f32 && lse.numel() == a.batch * a.heads * a.seq_q, kOp,
              "lse has a wrong shape");
    a.lse = lse.as<float>();
  }
  int64_t longest = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t begin = a.k_start ? a.k_start[b] : 0, end = a.k_end ? a.k_end[b] : a.seq_k;
    TW_EXPECT(begin >= 0 && begin <= end && end <= a.seq_k, kOp,
              "k_start and k_end must satisfy 0 <= start <= end <= " + std::to_string(a.seq_k) + ", got " +
                  std::to_string(begin) + " and " + std::to_string(end));
    longest = std::max(longest, end - begin);
  }
  const Table& t = table();
  record(kOp, t.attention_prefill.isa);
  if (a.batch == 0 || a.heads == 0 || a.seq_q == 0 || (a.v_dim == 0 && !a.lse)) return;

  const int64_t group = a.heads / a.kv_heads, rows = a.seq_q * group, slots = a.batch * a.kv_heads;
  const int64_t q_pad = padded16(a.head_dim), v_pad = padded16(a.v_dim);
  // Multiply-adds below which waking the team costs more than it saves.
  constexpr int64_t kSerial = 1 << 18;
  const bool serial = double(slots) * double(rows) * double(longest) * double(a.head_dim + a.v_dim) < kSerial;
  if (rows <= kDecodeRows) {
    a.chunks = std::max<int64_t>(1, (longest + kDecodeChunk - 1) / kDecodeChunk);
    Workspace partials(a.chunks == 1 ? 0 : slots * a.chunks * rows * (v_pad + 2) * 4);
    a.partials = partials.floats();
    const int64_t bytes = kDecodeRows * (q_pad + 2 * kDecodeBlock + v_pad + 2) * 4;
    run(slots * a.chunks, serial, bytes,
        [&](int64_t task, void* memory) { t.attention_decode.fn(a, task, memory); });
    if (a.chunks > 1)
      run(slots * rows, serial, v_pad * 4,
          [&](int64_t task, void* memory) { t.attention_merge.fn(a, task, memory); });
    return;
  }
  a.key_blocks = (longest + kKeyBlock - 1) / kKeyBlock;
  const int64_t blocks = slots * a.key_blocks;
  const int64_t k_bytes = blocks * packed_block_elements(a.head_dim) * 4,
                v_bytes = blocks * packed_block_elements(a.v_dim) * 4;
  Workspace packed(k_bytes + v_bytes + blocks);
  a.packed_k = packed.floats();
  a.packed_v = reinterpret_cast<char*>(packed.floats()) + k_bytes;
  a.v_not_finite = reinterpret_cast<uint8_t*>(packed.floats()) + k_bytes + v_bytes;
  run(blocks, serial, 64, [&](int64_t task, void* memory) { t.attention_pack.fn(a, task, memory); });
  const int64_t bytes = (kQueryRows * (q_pad + 2 * kKeyBlock + v_pad + 2) + kKeyBlock * v_pad) * 4;
  run(slots * ((rows + kQueryRows - 1) / kQueryRows), serial, bytes,
      [&](int64_t task, void* memory) { t.attention_prefill.fn(a, task, memory); });
}

}  // namespace tilewright
