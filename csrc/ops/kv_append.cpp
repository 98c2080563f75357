#include <string>
#include <vector>

#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/check.h"
#include "ops/overlap.h"

namespace tilewright {
namespace {

constexpr const char* kOp = "kv_append";
constexpr int64_t kGrain = 16384;  // values: less stays on the calling thread, as for the norms

int64_t integer_at(const TensorView& t, int64_t offset) {
  return t.dtype == DType::i32 ? t.as<const int32_t>()[offset] : t.as<const int64_t>()[offset];
}

// Where each token goes: the index in the cache's first dimension and the slot in its third.
struct Slots {
  std::vector<int64_t> outer, slot;
};

Slots find_slots(const TensorView& cache, int64_t batch, int64_t seq, const TensorView& positions,
                 const TensorView& block_table, const TensorView& cache_seqlens) {
  const int64_t page_size = cache.dim(2);
  const int64_t limit = block_table ? block_table.dim(1) * page_size : page_size;
  const char* const room =
      block_table ? "), block_table's max_blocks times the page size, got " : "), the cache's max_len, got ";
  Slots s;
  s.outer.reserve(static_cast<size_t>(batch * seq));
  s.slot.reserve(static_cast<size_t>(batch * seq));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = cache_seqlens ? integer_at(cache_seqlens, b * cache_seqlens.stride(0)) : 0;
    for (int64_t t = 0; t < seq; ++t) {
      int64_t p = start + t, outer = b;
      if (positions) {
        const int64_t row = positions.ndim == 2 && positions.dim(0) > 1 ? b * positions.stride(0) : 0;
        p = positions.as<const int64_t>()[row + t * positions.stride(-1)];
      }
      if (p < 0 || p >= limit)
        fail(kOp, "token " + std::to_string(t) + " of batch element " + std::to_string(b) +
                      " must go to a slot in [0, " + std::to_string(limit) + room + std::to_string(p));
      if (block_table) {
        outer = block_table
                    .as<const int32_t>()[b * block_table.stride(0) + p / page_size * block_table.stride(1)];
        if (outer < 0 || outer >= cache.dim(0))
          fail(kOp, "block_table[" + std::to_string(b) + ", " + std::to_string(p / page_size) +
                        "] must be in [0, " + std::to_string(cache.dim(0)) +
                        "), the cache's num_blocks, got " + std::to_string(outer));
        p %= page_size;
      }
      s.outer.push_back(outer);
      s.slot.push_back(p);
    }
  }
  return s;
}

void check_shapes(const char* name, const TensorView& cache, const TensorView& x, bool paged) {
  TW_EXPECT(
      cache.ndim == 4 && x.ndim == 4 && cache.dim(1) == x.dim(1) && cache.dim(3) == x.dim(3) &&
          (paged || cache.dim(0) == x.dim(0)),
      kOp,
      std::string(name) + " must be (batch, kv_heads, seq, head_dim) and its cache " +
          (paged ? "(num_blocks, kv_heads, page_size, head_dim)" : "(batch, kv_heads, max_len, head_dim)") +
          ", got " + shape_of(x) + " and " + shape_of(cache));
  expect_storage(kOp, name, x);
  expect_storage(kOp, ("cache_" + std::string(name)).c_str(), cache);
  expect_unit_stride(kOp, name, x);
  expect_unit_stride(kOp, ("cache_" + std::string(name)).c_str(), cache);
}

void append(const TensorView& cache, const TensorView& x, const Slots& slots, bool paged) {
  std::vector<int64_t> offsets(slots.slot.size());
  for (size_t i = 0; i < offsets.size(); ++i)
    offsets[i] = slots.outer[i] * cache.stride(0) + slots.slot[i] * cache.stride(2);
  KvAppendArgs a;
  a.in = {x.data, x.dim(1), x.stride(0), x.stride(1), x.stride(2)};
  a.cache = cache.data;
  a.offsets = offsets.data();
  a.head_stride = cache.stride(1);
  a.seq = x.dim(2), a.head_dim = x.dim(3);
  a.in_dtype = storage_of(x.dtype), a.cache_dtype = storage_of(cache.dtype);
  const auto& kernel = table().kv_append;
  // Batch elements may share a page, so a paged task takes them all, in order.
  const int64_t heads = x.dim(1), batch = x.dim(0), tasks = paged ? heads : heads * batch;
  const int64_t per_task = x.numel() / tasks;
  parallel_ranges(tasks, (kGrain + per_task - 1) / per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (paged)
        kernel.fn(a, i, 0, batch);
      else
        kernel.fn(a, i % heads, i / heads, i / heads + 1);
    }
  });
}

}  // namespace

void kv_append(const TensorView& cache_k, const TensorView& cache_v, const TensorView& k, const TensorView& v,
               const TensorView& positions, const TensorView& block_table, const TensorView& cache_seqlens) {
  for (const auto* t : {&cache_k, &cache_v, &k, &v, &positions, &block_table, &cache_seqlens})
    if (*t) expect_cpu(kOp, "every tensor", *t);
  const bool paged = bool(block_table);
  check_shapes("k", cache_k, k, paged);
  check_shapes("v", cache_v, v, paged);
  const int64_t batch = k.dim(0), seq = k.dim(2);
  for (int i = 0; i < 3; ++i)
    TW_EXPECT(k.dim(i) == v.dim(i) && cache_k.dim(i) == cache_v.dim(i), kOp,
              "k and v, and their caches, may differ in head_dim only, got " + shape_of(k) + ", " +
                  shape_of(v) + " and " + shape_of(cache_k) + ", " + shape_of(cache_v));
  TW_EXPECT(!positions || !cache_seqlens, kOp, "positions and cache_seqlens exclude each other, got both");
  if (positions) {
    const bool fits = positions.ndim == 1 ? positions.dim(0) == seq
                                          : positions.ndim == 2 && positions.dim(1) == seq &&
                                                (positions.dim(0) == batch || positions.dim(0) == 1);
    TW_EXPECT(fits && positions.dtype == DType::i64, kOp,
              "positions must be int64 of shape (" + std::to_string(seq) + ",) or (" + std::to_string(batch) +
                  ", " + std::to_string(seq) + "), got " + shape_of(positions) + " " +
                  name_of(positions.dtype));
  }
  if (cache_seqlens)
    TW_EXPECT(cache_seqlens.ndim == 1 && cache_seqlens.dim(0) == batch &&
                  (cache_seqlens.dtype == DType::i32 || cache_seqlens.dtype == DType::i64),
              kOp,
              "cache_seqlens must be int32 or int64 of shape (" + std::to_string(batch) + ",), got " +
                  shape_of(cache_seqlens) + " " + name_of(cache_seqlens.dtype));
  if (block_table)
    TW_EXPECT(block_table.ndim == 2 && block_table.dim(0) == batch && block_table.dtype == DType::i32, kOp,
              "block_table must be int32 of shape (" + std::to_string(batch) + ", max_blocks), got " +
                  shape_of(block_table) + " " + name_of(block_table.dtype));
  const Slots slots = find_slots(cache_k, batch, seq, positions, block_table, cache_seqlens);
  TW_EXPECT(!overlaps_itself(cache_k) && !overlaps_itself(cache_v) && !overlaps(cache_k, cache_v), kOp,
            "the caches must not share memory, with each other or within themselves (expanded)");
  for (const auto* cache : {&cache_k, &cache_v})
    for (const auto* x : {&k, &v})
      TW_EXPECT(!overlaps(*cache, *x), kOp, "k and v must not share memory with the caches");
  record(kOp, table().kv_append.isa);
  if (k.numel() > 0) append(cache_k, k, slots, paged);
  if (v.numel() > 0) append(cache_v, v, slots, paged);
}

}  // namespace tilewright
