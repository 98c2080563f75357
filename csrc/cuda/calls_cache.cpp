// Calls that rotate tokens and write them into caches.
#include "cuda/call.h"
#include "cuda/gather.h"
#include "cuda/kv_quant.h"
#include "cuda/rope.h"
#include "ops/overlap.h"

namespace tilewright::cuda {
namespace {

void check_positions(const char* op, const TensorView& positions, int64_t batch, int64_t seq,
                     tw::cuda::SlotArgs& slot) {
  if (!positions) return;
  expect_here(op, "positions", positions);
  const bool fits = positions.ndim == 1 ? positions.dim(0) == seq
                                        : positions.ndim == 2 && positions.dim(1) == seq &&
                                              (positions.dim(0) == batch || positions.dim(0) == 1);
  TW_EXPECT(fits && positions.dtype == DType::i64, op,
            "positions must be int64 of shape (" + std::to_string(seq) + ",) or (" + std::to_string(batch) +
                ", " + std::to_string(seq) + "), got " + shape_of(positions) + " " +
                name_of(positions.dtype));
  slot.positions = positions.as<const int64_t>();
  slot.positions_token = positions.stride(-1);
  slot.positions_batch = positions.ndim == 2 && positions.dim(0) > 1 ? positions.stride(0) : 0;
}

void check_rope(const char* op, const TensorView& q, const TensorView& k, const RopeInputs& in,
                tw::cuda::TokenArgs& a) {
  TW_EXPECT(q.ndim == 4 && k.ndim == 4, op,
            "q and k must be (batch, heads, seq, head_dim), got " + shape_of(q) + " and " + shape_of(k));
  expect_storage(op, "q", q);
  TW_EXPECT(k.dtype == q.dtype, op,
            std::string("q and k must have one dtype, got ") + name_of(q.dtype) + " and " + name_of(k.dtype));
  const int64_t head_dim = q.dim(3);
  TW_EXPECT(k.dim(0) == q.dim(0) && k.dim(2) == q.dim(2) && k.dim(3) == head_dim, op,
            "q and k must agree in batch, seq and head_dim, got " + shape_of(q) + " and " + shape_of(k));
  for (const auto* t : {&in.cos, &in.sin}) expect_here(op, "cos and sin", *t);
  TW_EXPECT(in.cos.ndim == 2 && same_shape(in.cos, in.sin) && in.cos.dtype == DType::f32 &&
                in.sin.dtype == DType::f32,
            op,
            "cos and sin must be float32 of one shape (max_positions, rotary_dim / 2), got " +
                shape_of(in.cos) + " " + name_of(in.cos.dtype) + " and " + shape_of(in.sin) + " " +
                name_of(in.sin.dtype));
  const int64_t rotary = in.rotary_dim.value_or(2 * in.cos.dim(1));
  TW_EXPECT(rotary == 2 * in.cos.dim(1) && rotary > 0 && rotary <= head_dim, op,
            "rotary_dim must be twice the last dimension of cos (" + std::to_string(in.cos.dim(1)) +
                "), positive and at most head_dim (" + std::to_string(head_dim) + "), got " +
                std::to_string(rotary));
  for (const auto* t : {&in.cos, &in.sin, &q, &k}) expect_unit_stride(op, "q, k, cos and sin", *t);
  a.cos = in.cos.as<const float>(), a.sin = in.sin.as<const float>();
  a.cos_stride = in.cos.stride(0), a.sin_stride = in.sin.stride(0);
  a.max_positions = in.cos.dim(0);
  a.half = static_cast<int>(rotary / 2);
  a.interleaved = in.interleaved;
}

tw::cuda::TokenPart part(const TensorView& in, const TensorView& out, bool rotate, bool to_cache) {
  return {heads_of(in), heads_of(out), static_cast<int>(in.dim(1)), static_cast<int>(in.dim(3)),
          rotate,       to_cache,      type_of(out.dtype)};
}

// k, v and where they go.
void check_caches(const char* op, const CacheInputs& in, const TensorView& k, const TensorView& v,
                  tw::cuda::SlotArgs& slot) {
  const bool paged = bool(in.block_table);
  struct Pair {
    const char* name;
    const TensorView *cache, *x;
  };
  for (const auto& [name, cache, x] : {Pair{"k", &in.cache_k, &k}, Pair{"v", &in.cache_v, &v}}) {
    expect_here(op, name, *x);
    expect_here(op, "caches", *cache);
    TW_EXPECT(
        cache->ndim == 4 && x->ndim == 4 && cache->dim(1) == x->dim(1) && cache->dim(3) == x->dim(3) &&
            (paged || cache->dim(0) == x->dim(0)),
        op,
        std::string(name) + " must be (batch, kv_heads, seq, head_dim) and its cache " +
            (paged ? "(num_blocks, kv_heads, page_size, head_dim)" : "(batch, kv_heads, max_len, head_dim)") +
            ", got " + shape_of(*x) + " and " + shape_of(*cache));
    expect_storage(op, name, *x);
    expect_storage(op, "caches", *cache);
    expect_unit_stride(op, name, *x);
    expect_unit_stride(op, "caches", *cache);
  }
  TW_EXPECT(k.dtype == v.dtype, op,
            std::string("k and v must have one dtype on a GPU, got ") + name_of(k.dtype) + " and " +
                name_of(v.dtype));
  for (int i = 0; i < 3; ++i)
    TW_EXPECT(k.dim(i) == v.dim(i) && in.cache_k.dim(i) == in.cache_v.dim(i), op,
              "k and v, and their caches, may differ in head_dim only, got " + shape_of(k) + ", " +
                  shape_of(v) + " and " + shape_of(in.cache_k) + ", " + shape_of(in.cache_v));
  TW_EXPECT(!in.positions || !in.cache_seqlens, op,
            "positions and cache_seqlens exclude each other, got both");
  const int64_t batch = k.dim(0), seq = k.dim(2);
  expect_countable(op, "tokens", batch * seq);
  expect_countable(op, "slots", in.cache_k.dim(2));
  check_positions(op, in.positions, batch, seq, slot);
  if (const TensorView& t = in.cache_seqlens) {
    expect_here(op, "cache_seqlens", t);
    TW_EXPECT(t.ndim == 1 && t.dim(0) == batch && (t.dtype == DType::i32 || t.dtype == DType::i64), op,
              "cache_seqlens must be int32 or int64 of shape (" + std::to_string(batch) + ",), got " +
                  shape_of(t) + " " + name_of(t.dtype));
    slot.seqlens = t.data, slot.seqlens_stride = t.stride(0), slot.seqlens_64 = t.dtype == DType::i64;
  }
  if (const TensorView& t = in.block_table) {
    expect_here(op, "block_table", t);
    TW_EXPECT(t.ndim == 2 && t.dim(0) == batch && t.dtype == DType::i32, op,
              "block_table must be int32 of shape (" + std::to_string(batch) + ", max_blocks), got " +
                  shape_of(t) + " " + name_of(t.dtype));
    slot.table = t.as<const int32_t>();
    slot.table_batch = t.stride(0), slot.table_block = t.stride(1), slot.table_blocks = t.dim(1);
  }
  slot.pages = in.cache_k.dim(0), slot.slots = in.cache_k.dim(2);
  TW_EXPECT(!overlaps_itself(in.cache_k) && !overlaps_itself(in.cache_v) && !overlaps(in.cache_k, in.cache_v),
            op, "the caches must not share memory, with each other or within themselves (expanded)");
  for (const auto* cache : {&in.cache_k, &in.cache_v})
    for (const auto* x : {&k, &v})
      TW_EXPECT(!overlaps(*cache, *x), op, "k and v must not share memory with the caches");
}

}  // namespace

void rope(Where where, const TensorView& q, const TensorView& k, const RopeInputs& in,
          const TensorView& positions, const TensorView& out_q, const TensorView& out_k) {
  constexpr const char* kOp = "rope";
  tw::cuda::TokenArgs a;
  for (const auto* t : {&q, &k, &out_q, &out_k}) expect_here(kOp, "every tensor", *t);
  check_rope(kOp, q, k, in, a);
  TW_EXPECT(same_shape(out_q, q) && same_shape(out_k, k) && out_q.dtype == q.dtype && out_k.dtype == k.dtype,
            kOp, "outputs must have the shapes and dtype of q and k");
  expect_unit_stride(kOp, "outputs", out_q);
  expect_unit_stride(kOp, "outputs", out_k);
  const int64_t seq = q.dim(2);
  expect_countable(kOp, "tokens", q.dim(0) * seq);
  check_positions(kOp, positions, q.dim(0), seq, a.slot);
  TW_EXPECT(positions || seq <= in.cos.dim(0), kOp,
            "cos and sin must reach " + std::to_string(seq) + " positions, got " + shape_of(in.cos));
  if (out_q.data == q.data || out_k.data == k.data)
    TW_EXPECT(!overlaps_itself(q) && !overlaps_itself(k) && !overlaps(q, k), kOp,
              "q and k must not share memory, with each other or within themselves (expanded), when inplace");
  a.parts[0] = part(q, out_q, true, false), a.parts[1] = part(k, out_k, true, false);
  a.count = 2;
  a.batch = q.dim(0), a.seq = seq;
  a.type = type_of(q.dtype);
  launch(kOp, where, tw::cuda::move_tokens, a);
}

void kv_append(Where where, const CacheInputs& caches, const TensorView& k, const TensorView& v) {
  constexpr const char* kOp = "kv_append";
  tw::cuda::TokenArgs a;
  check_caches(kOp, caches, k, v, a.slot);
  a.parts[0] = part(k, caches.cache_k, false, true), a.parts[1] = part(v, caches.cache_v, false, true);
  a.count = 2;
  a.batch = k.dim(0), a.seq = k.dim(2);
  a.type = type_of(k.dtype);
  launch(kOp, where, tw::cuda::move_tokens, a);
}

void rope_append(Where where, const TensorView& q, const TensorView& k, const TensorView& v,
                 const RopeInputs& in, const CacheInputs& caches, const TensorView& out) {
  constexpr const char* kOp = "rope_append";
  tw::cuda::TokenArgs a;
  expect_here(kOp, "q", q);
  check_rope(kOp, q, k, in, a);
  check_caches(kOp, caches, k, v, a.slot);
  expect_here(kOp, "out", out);
  TW_EXPECT(same_shape(out, q) && out.dtype == q.dtype, kOp,
            "out must be as q, " + shape_of(q) + ", got " + shape_of(out));
  expect_unit_stride(kOp, "out", out);
  TW_EXPECT(out.data != q.data || !overlaps_itself(q), kOp,
            "q must not share memory within itself when out is q");
  for (const auto* cache : {&caches.cache_k, &caches.cache_v})
    TW_EXPECT(!overlaps(*cache, q) && !overlaps(*cache, out), kOp,
              "q and out must not share memory with the caches");
  a.parts[0] = part(q, out, true, false);
  a.parts[1] = part(k, caches.cache_k, true, true), a.parts[2] = part(v, caches.cache_v, false, true);
  a.count = 3;
  a.batch = q.dim(0), a.seq = q.dim(2);
  a.type = type_of(q.dtype);
  launch(kOp, where, tw::cuda::move_tokens, a);
}

void kv_append_quantised(Where where, const QuantisedCacheInputs& in, const TensorView& k,
                         const TensorView& v) {
  constexpr const char* kOp = "kv_append";
  TW_EXPECT(in.bits == 4 || in.bits == 8, kOp,
            "QuantizedKV: bits must be 4 or 8, got " + std::to_string(in.bits));
  TW_EXPECT(in.group_size == 32 || in.group_size == 64 || in.group_size == 128, kOp,
            "QuantizedKV: group_size must be 32, 64 or 128, got " + std::to_string(in.group_size));
  TW_EXPECT(in.residual >= 0 && in.max_len >= 0 && in.head_dim >= 1 && in.k_codes.ndim >= 2, kOp,
            "QuantizedKV: residual and max_len must be >= 0 and head_dim >= 1");
  const int64_t batch = in.k_codes.dim(0), kv_heads = in.k_codes.dim(1), slots = batch * kv_heads;
  const int64_t tokens = slots * ((in.max_len + 63) / 64), d = in.head_dim;
  const bool wide = in.bits == 8;
  const int64_t channel_groups = (d + in.group_size - 1) / in.group_size;
  const int64_t tail = wide ? 0 : slots * (in.residual + in.group_size - 1) * d;
  struct Expected {
    const char* name;
    const TensorView& t;
    DType dtype;
    int64_t size;
  };
  const DType scale = wide ? DType::f32 : DType::bf16;
  const int64_t k_scales =
      wide ? tokens * 64
           : slots * ((in.max_len + in.group_size - 1) / in.group_size) * 2 * ((d + 15) / 16 * 16);
  for (const Expected& e :
       {Expected{"k_codes", in.k_codes, DType::u8, tokens * 2 * ((d + 3) / 4) * in.bits * 16},
        Expected{"v_codes", in.v_codes, DType::u8, tokens * ((d + 31) / 32) * 16 * in.bits * 16},
        Expected{"k_scales", in.k_scales, scale, k_scales},
        Expected{"v_scales", in.v_scales, scale, tokens * (wide ? 64 : channel_groups * 128)},
        Expected{"k_tail", in.k_tail, DType::bf16, tail}, Expected{"v_tail", in.v_tail, DType::bf16, tail},
        Expected{"counts", in.counts, DType::i64, 2}}) {
    expect_here(kOp, e.name, e.t);
    TW_EXPECT(e.t.dtype == e.dtype && e.t.is_contiguous() && e.t.numel() == e.size, kOp,
              "QuantizedKV's " + std::string(e.name) + " must be a contiguous tensor of " +
                  std::to_string(e.size) + " " + name_of(e.dtype) + ", got " + name_of(e.t.dtype) + " " +
                  shape_of(e.t) + "; use QuantizedKV.empty and leave its tensors as they are");
    for (const auto* x : {&k, &v})
      TW_EXPECT(!overlaps(e.t, *x), kOp, "k and v must not share memory with the cache");
  }
  for (const auto* x : {&k, &v}) {
    expect_here(kOp, "k and v", *x);
    expect_storage(kOp, "k and v", *x);
    TW_EXPECT(x->dtype == k.dtype && x->ndim == 4 && x->dim(0) == batch && x->dim(1) == kv_heads &&
                  x->dim(2) == k.dim(2) && x->dim(3) == d,
              kOp,
              "k and v must be (batch, kv_heads, seq, head_dim) = (" + std::to_string(batch) + ", " +
                  std::to_string(kv_heads) + ", seq, " + std::to_string(d) +
                  ") with one seq and dtype, got " + shape_of(k) + " and " + shape_of(v));
    expect_unit_stride(kOp, "k and v", *x);
  }
  TW_EXPECT(k.dim(2) <= in.max_len, kOp,
            "QuantizedKV has room for max_len = " + std::to_string(in.max_len) + " tokens, got " +
                std::to_string(k.dim(2)));
  expect_countable(kOp, "tokens", in.max_len + in.residual + in.group_size);
  expect_countable(kOp, "tokens and heads", 2 * slots * std::max<int64_t>(k.dim(2), 1));
  tw::cuda::QuantisedAppendArgs a;
  a.k = heads_of(k), a.v = heads_of(v);
  a.type = type_of(k.dtype);
  a.seq = static_cast<int>(k.dim(2));
  a.codes[0] = in.k_codes.as<uint8_t>(), a.codes[1] = in.v_codes.as<uint8_t>();
  a.scales[0] = in.k_scales.data, a.scales[1] = in.v_scales.data;
  a.tails[0] = in.k_tail.as<uint16_t>(), a.tails[1] = in.v_tail.as<uint16_t>();
  a.counts = in.counts.as<int64_t>();
  a.batch = static_cast<int>(batch), a.kv_heads = static_cast<int>(kv_heads);
  a.max_len = static_cast<int>(in.max_len);
  a.head_dim = static_cast<int>(d), a.bits = static_cast<int>(in.bits),
  a.group = static_cast<int>(in.group_size);
  a.residual = static_cast<int>(in.residual);
  launch(kOp, where, tw::cuda::append_quantised, a);
}

void gather(Where where, const TensorView& from, const TensorView& from_index, const TensorView& to_index,
            const TensorView& to) {
  constexpr const char* kOp = "gather";
  for (const auto* t : {&from, &to}) {
    expect_here(kOp, "every tensor", *t);
    TW_EXPECT(t->ndim == 4, kOp, "tensors must be (rows, heads, tokens, dim), got " + shape_of(*t));
    expect_unit_stride(kOp, "tensors", *t);
  }
  TW_EXPECT(from.dtype == to.dtype && size_of(from.dtype) <= 4 && from.dtype != DType::unsupported &&
                from.dim(1) == to.dim(1) && from.dim(2) == to.dim(2) && from.dim(3) == to.dim(3),
            kOp,
            "tensors must agree in dtype, of up to 4 bytes, and in heads, tokens and dim, got " +
                shape_of(from) + " " + name_of(from.dtype) + " and " + shape_of(to) + " " +
                name_of(to.dtype));
  TW_EXPECT(!overlaps(from, to), kOp, "from and to must not share memory");
  tw::cuda::GatherArgs a;
  a.count = from_index ? from_index.dim(0) : to_index ? to_index.dim(0) : std::min(from.dim(0), to.dim(0));
  for (const auto* t : {&from_index, &to_index}) {
    if (!*t) continue;
    expect_here(kOp, "indices", *t);
    TW_EXPECT(
        t->ndim == 1 && t->dtype == DType::i64 && t->is_contiguous() && t->dim(0) == a.count, kOp,
        "indices must be contiguous int64 of one length, got " + shape_of(*t) + " " + name_of(t->dtype));
  }
  expect_countable(kOp, "rows", a.count);
  for (int i = 1; i < 4; ++i) expect_countable(kOp, "elements of a dimension", from.dim(i));
  a.from = heads_of(from), a.to = heads_of(to);
  a.from_index = from_index.as<const int64_t>(), a.to_index = to_index.as<const int64_t>();
  a.from_rows = from.dim(0), a.to_rows = to.dim(0);
  a.heads = static_cast<int>(from.dim(1)), a.tokens = static_cast<int>(from.dim(2));
  a.dim = static_cast<int>(from.dim(3)), a.item = static_cast<int>(size_of(from.dtype));
  launch(kOp, where, tw::cuda::gather, a);
}

}  // namespace tilewright::cuda
