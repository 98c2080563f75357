// What the decode kernels share: a task's rows and keys, its state, and where its result goes. A task is all
// rows of one KV head against one chunk of keys. Included after cpu/simd.h.
#pragma once
#include "cpu/kernels/attention_rows.h"

namespace tilewright {
namespace {

struct DecodeTask {
  const AttentionArgs& a;
  int64_t index, b, h, rows;
  const Sequence& q;
  int64_t lo, hi;      // keys that some row sees
  int64_t begin, end;  // keys of the chunk

  TW_INLINE DecodeTask(const AttentionArgs& args, int64_t task)
      : a(args),
        index(task),
        b(task / args.chunks / args.kv_heads),
        h(task / args.chunks % args.kv_heads),
        rows(args.sequences[b].q_count * (args.heads / args.kv_heads)),
        q(args.sequences[b]),
        lo(visible_keys(args, q, 0).begin),
        hi(visible_keys(args, q, q.q_count - 1).end),
        begin(q.k_begin + task % args.chunks * kDecodeChunk),
        end(begin + kDecodeChunk) {}

  // The rows of q, zero beyond head_dim, and the empty state.
  template <class Q>
  TW_INLINE void start(Q* queries, int64_t q_ld, const State& s) const {
    with_storage(a.q.dtype, [&](auto t) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* from = at<const decltype(t)>(a, a.q, q, h, r);
        for (int64_t d = 0; d < q_ld; d += W) {
          const int64_t left = a.head_dim - d;
          store(queries + r * q_ld + d,
                left >= W ? load(from + d) : load(from + d, left > 0 ? int(left) : 0));
        }
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      s.max[r] = kMinusInf;
      s.sum[r] = 0.0f;
    }
    std::memset(s.out, 0, size_t(rows * s.v_pad) * 4);
  }

  // The rows' result, or what merging the chunks needs of it.
  TW_INLINE void finish(const State& s) const {
    if (a.chunks == 1) {
      for (int64_t r = 0; r < rows; ++r) finish_row(a, b, h, r, s.max[r], s.sum[r], s.out + r * s.v_pad);
      return;
    }
    const int64_t kept = padded16(a.v_dim);
    float* partial = a.partials + index * a.rows * (kept + 2);
    for (int64_t r = 0; r < rows; ++r, partial += kept + 2) {
      partial[0] = s.max[r];
      partial[1] = s.sum[r];
      std::memcpy(partial + 2, s.out + r * s.v_pad, size_t(kept) * 4);
    }
  }
};

}  // namespace
}  // namespace tilewright
