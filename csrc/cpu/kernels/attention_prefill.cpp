// Attention forward for many rows. K and V are packed once per KV head (K transposed) for the register tile;
// a task is kQueryRows rows against every key block that one of them can see: 4 * rows * keys * head_dim
// flops.
#include "cpu/simd.h"
//
#include "cpu/kernels/attention_pack.h"

namespace tilewright {
namespace {

template <class E, class T>
void pack_task(const AttentionArgs& a, AttentionTask task) {
  const Sequence& q = a.sequences[task.sequence];
  const int64_t first = q.k_begin + task.block * kKeyBlock, count = min64(kKeyBlock, q.k_end - first);
  // Keys that no query can see stay unread: they may hold anything.
  const int64_t lo = visible_keys(a, q, 0).begin, hi = visible_keys(a, q, q.q_count - 1).end;
  const int64_t used = min64(count, hi - first), index = packed_index(a, q, task.head, task.block);
  if (used <= 0 || first + kKeyBlock <= lo) return;
  int64_t offsets[kKeyBlock];
  for (int64_t j = 0; j < used; ++j) offsets[j] = key_offset(a, a.k, q, first + j);
  pack_transposed<E>(static_cast<const T*>(a.k.data) + task.head * a.k.head, offsets, a.head_dim, used,
                     static_cast<float*>(a.packed_k) + index * packed_block_elements(a.head_dim));
  for (int64_t j = 0; j < used; ++j) offsets[j] = key_offset(a, a.v, q, first + j);
  a.v_not_finite[index] = pack_interleaved<E>(
      static_cast<const T*>(a.v.data) + task.head * a.v.head, offsets, a.v_dim, padded16(a.v_dim), used,
      static_cast<float*>(a.packed_v) + index * packed_block_elements(a.v_dim));
}

static_assert(kQueryRows % 16 == 0 && kKeyBlock % 32 == 0);  // whole tiles: see multiply

template <class E, class P>
void prefill_task(const AttentionArgs& a, AttentionTask task, float* memory) {
  const int64_t group = a.heads / a.kv_heads, b = task.sequence, h = task.head;
  const Sequence& sequence = a.sequences[b];
  const int64_t first_row = task.block * kQueryRows;
  const int64_t rows = min64(kQueryRows, sequence.q_count * group - first_row);
  const int64_t depth = E::depth, q_elements = padded_k<E>(a.head_dim), q_ld = padded16(a.head_dim);
  [[maybe_unused]] const typename E::Registers registers{};

  State s;
  s.ld = kKeyBlock;
  s.v_pad = padded16(a.v_dim);
  float* q = memory;
  s.scores = q + kQueryRows * q_ld;
  s.probabilities = s.scores + kQueryRows * kKeyBlock;
  s.out = s.probabilities + kQueryRows * kKeyBlock;
  s.max = s.out + kQueryRows * s.v_pad;
  s.sum = s.max + kQueryRows;
  float* v_copy = s.sum + kQueryRows;

  with_storage(a.q.dtype, [&](auto t) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = at<const decltype(t)>(a, a.q, sequence, h, first_row + r);
      P* to = reinterpret_cast<P*>(q + r * q_ld);
      for (int64_t d = 0; d < q_elements * depth; d += W) {
        const int64_t left = a.head_dim - d;
        store(to + d, left >= W ? load(from + d) : load(from + d, left > 0 ? int(left) : 0));
      }
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    s.max[r] = kMinusInf;
    s.sum[r] = 0.0f;
  }
  std::memset(s.out, 0, size_t(rows * s.v_pad) * 4);

  const int64_t lo = visible_keys(a, sequence, first_row / group).begin;
  const int64_t hi = visible_keys(a, sequence, (first_row + rows - 1) / group).end;
  const int64_t begin = sequence.k_begin;
  for (int64_t block = (lo - begin) / kKeyBlock; begin + block * kKeyBlock < hi; ++block) {
    const int64_t first = begin + block * kKeyBlock, index = packed_index(a, sequence, h, block);
    const float* k = static_cast<const float*>(a.packed_k) + index * packed_block_elements(a.head_dim);
    const float* v = static_cast<const float*>(a.packed_v) + index * packed_block_elements(a.v_dim);
    // On the diagonal only the keys that some row sees are multiplied.
    const int64_t count = min64(kKeyBlock, hi - first), width = (count + W - 1) / W * W;
    multiply<E>(rows, width, q, q_ld, k, kKeyBlock, q_elements, s.scores, kKeyBlock, false);
    softmax_rows<P>(a, s, rows, b, h, first_row, first, count);
    if (a.v_not_finite[index]) v = without_unseen<E, P>(a, s, rows, lo - first, hi - first, v, v_copy);
    multiply<E>(rows, s.v_pad, s.probabilities, kKeyBlock / depth, v, s.v_pad, padded_k<E>(width), s.out,
                s.v_pad, true);
  }
  for (int64_t r = 0; r < rows; ++r)
    finish_row(a, b, h, first_row + r, s.max[r], s.sum[r], s.out + r * s.v_pad);
}

}  // namespace

void TW_KERNEL(attention_pack)(const AttentionArgs& a, int64_t task, void*) {
  with_operands(a.k.dtype, [&](auto e, auto) {
    using E = decltype(e);
    if constexpr (E::depth == 2)
      pack_task<E, bf16>(a, a.tasks[task]);
    else
      with_storage(a.k.dtype, [&](auto t) { pack_task<E, decltype(t)>(a, a.tasks[task]); });
  });
}

void TW_KERNEL(attention_prefill)(const AttentionArgs& a, int64_t task, void* memory) {
  with_operands(a.k.dtype, [&](auto e, auto p) {
    prefill_task<decltype(e), decltype(p)>(a, a.tasks[task], static_cast<float*>(memory));
  });
}

}  // namespace tilewright
