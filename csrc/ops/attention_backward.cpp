#include <cmath>

#include "ops/attention_call.h"

namespace tilewright {
namespace {

AttentionTensor gradient(const char* name, const TensorView& t, const TensorView& like) {
  const AttentionTensor a = attention_operand(name, t);
  bool same = t.dtype == like.dtype;
  for (int i = 0; i < 4; ++i) same &= t.shape[i] == like.shape[i];
  TW_EXPECT(same, kAttention,
            std::string(name) + " must be " + name_of(like.dtype) + " " + shape_of(like) + ", got " +
                name_of(t.dtype) + " " + shape_of(t));
  return a;
}

const float* statistic(const char* name, const TensorView& t, const TensorView& q) {
  if (!t) return nullptr;
  bool contiguous = t.dtype == DType::f32 && t.ndim == 3;
  for (int i = 0; contiguous && i < 3; ++i) contiguous = t.shape[i] == q.shape[i];
  contiguous = contiguous && t.is_contiguous();
  TW_EXPECT(contiguous && t.device_type == 1, kAttention,
            std::string(name) + " must be contiguous float32 (batch, heads, seq_q), got " + shape_of(t));
  return t.as<const float>();
}

// Tasks (sequence, KV head, split) and where each run of them that one thread must do in order begins: those
// that add to the same elements of the bias's gradient.
struct Units {
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> first;

  Units(const AttentionGradArgs& g) {
    const AttentionArgs& a = g.a;
    const int64_t batch = a.batch, heads = a.kv_heads;
    const bool one_batch = g.grad_bias && g.bias_batch == 0, one_head = g.grad_bias && g.bias_head == 0;
    for (int64_t split = 0; split < g.splits; ++split)
      for (int64_t b = 0; b < (one_batch ? 1 : batch); ++b)
        for (int64_t h = 0; h < (one_head ? 1 : heads); ++h) {
          first.push_back(int64_t(tasks.size()));
          for (int64_t bb = b; bb < (one_batch ? batch : b + 1); ++bb)
            for (int64_t hh = h; hh < (one_head ? heads : h + 1); ++hh)
              tasks.push_back({int32_t(bb), int32_t(hh), int32_t(split)});
        }
    first.push_back(int64_t(tasks.size()));
  }
};

}  // namespace

void attention_backward(const AttentionInputs& in, const AttentionOptions& options,
                        const AttentionGradients& grads) {
  AttentionCall call(in, options);
  AttentionGradArgs g;
  TW_EXPECT(!in.block_table && !in.k_batch, kAttention, "paged and indexed keys have no gradient");
  AttentionArgs& a = call.a;
  a.out = gradient("out", grads.out, grads.grad_out);
  TW_EXPECT(grads.grad_out.dtype == in.q.dtype && grads.grad_out.shape[0] == in.q.shape[0] &&
                grads.grad_out.shape[1] == a.heads && grads.grad_out.shape[2] == in.q.shape[2] &&
                grads.grad_out.shape[3] == a.v_dim,
            kAttention,
            "grad_out must have q's dtype and shape up to v's head_dim, got " + shape_of(grads.grad_out));
  g.grad_out = attention_operand("grad_out", grads.grad_out);
  g.grad_q = gradient("grad_q", grads.grad_q, in.q);
  g.grad_k = gradient("grad_k", grads.grad_k, in.k);
  g.grad_v = gradient("grad_v", grads.grad_v, in.v);
  a.lse = const_cast<float*>(statistic("lse", grads.lse, in.q));
  a.lse_rows = in.q.shape[2];
  g.grad_lse = statistic("grad_lse", grads.grad_lse, in.q);
  g.delta = const_cast<float*>(statistic("delta", grads.delta, in.q));
  const bool no_rows = in.q.shape[0] * a.heads * in.q.shape[2] == 0;  // then their pointers are null
  TW_EXPECT((a.lse && g.delta) || no_rows, kAttention, "the gradient needs lse and delta");
  if (grads.grad_bias) {
    const TensorView &t = grads.grad_bias, &bias = in.bias;
    TW_EXPECT(bias && t.dtype == DType::f32 && t.is_contiguous() && t.ndim == bias.ndim &&
                  t.numel() == bias.numel(),
              kAttention, "grad_bias must be contiguous float32 of bias's shape");
    int64_t* strides[4] = {&g.bias_batch, &g.bias_head, &g.bias_row, &g.bias_key};
    for (int i = 1; i <= t.ndim; ++i) *strides[4 - i] = t.dim(-i) == 1 ? 0 : t.stride(-i);
    g.grad_bias = t.as<float>();
  }
  const Table& t = table();
  record(kAttention, t.attention_grad_keys.isa);
  if (a.batch == 0 || a.heads == 0 || call.most_rows == 0) return;

  const int64_t group = a.heads / a.kv_heads, slots = a.batch * a.kv_heads;
  const int64_t q_pad = padded16(a.head_dim), v_pad = padded16(a.v_dim);
  std::vector<AttentionTask> rows;
  int64_t most_blocks = 1;
  for (size_t b = 0; b < call.sequences.size(); ++b) {
    AttentionSequence& s = call.sequences[b];
    s.first_rows = g.total_row_blocks;
    s.row_blocks = (s.q_count * group + kGradRows - 1) / kGradRows;
    g.total_row_blocks += s.row_blocks;
    most_blocks = std::max(most_blocks, s.blocks);
    for (int64_t h = 0; h < a.kv_heads; ++h)
      for (int64_t i = 0; i < s.row_blocks; ++i) rows.push_back({int32_t(b), int32_t(h), int32_t(i)});
  }
  g.total_row_blocks *= a.kv_heads;
  // Enough tasks for 16 threads, however few the heads; each split costs a dQ of its own.
  constexpr int64_t kTasks = 16;
  // Splits must not add to the same elements of the bias's gradient. Blocks count from a sequence's first
  // key, so those of sequences that share the bias, but begin at different keys, overlap.
  const bool key_shared = g.grad_bias && g.bias_key == 0;
  bool overlap = false;
  for (const AttentionSequence& s : call.sequences) overlap |= s.k_begin != call.sequences[0].k_begin;
  overlap &= g.grad_bias && g.bias_batch == 0;
  g.splits = key_shared || overlap ? 1 : std::min(most_blocks, std::max<int64_t>(1, kTasks / slots));
  g.lse_size = in.q.shape[0] * a.heads * in.q.shape[2];

  const int64_t blocks = total_blocks(call),
                row_bytes = int64_t(rows.size()) * grad_rows_elements(q_pad, v_pad) * 4;
  const int64_t key_bytes = blocks * grad_keys_elements(q_pad, v_pad) * 4;
  const int64_t q_bytes = g.splits * g.total_row_blocks * kGradRows * q_pad * 4;
  const int64_t slope_bytes = grads.grad_alibi ? g.splits * g.lse_size * 4 : 0;
  Workspace memory(row_bytes + key_bytes + q_bytes + slope_bytes + blocks);
  g.rows = memory.floats();
  g.keys = g.rows + row_bytes / 4;
  g.partial_q = g.keys + key_bytes / 4;
  if (grads.grad_alibi) {
    g.slopes = g.partial_q + q_bytes / 4;
    std::fill_n(g.slopes, g.splits * g.lse_size, 0.0f);
  }
  g.k_not_finite = reinterpret_cast<uint8_t*>(g.partial_q + (q_bytes + slope_bytes) / 4);
  std::fill_n(g.k_not_finite, blocks, uint8_t(0));

  const std::vector<AttentionTask> keys = key_tasks(call);
  const Units units = [&] {
    g.a = a;
    return Units(g);
  }();
  const bool serial = call.is_small();
  g.a.tasks = rows.data();
  run_tasks(int64_t(rows.size()), serial, 64, [&](int64_t i, void* m) { t.attention_grad_rows.fn(g, i, m); });
  g.a.tasks = keys.data();
  run_tasks(blocks, serial, 64, [&](int64_t i, void* m) { t.attention_grad_pack.fn(g, i, m); });
  g.a.tasks = units.tasks.data();
  run_tasks(int64_t(units.first.size()) - 1, serial, grad_scratch_elements(q_pad, v_pad) * 4,
            [&](int64_t i, void* m) {
              for (int64_t task = units.first[size_t(i)]; task < units.first[size_t(i) + 1]; ++task)
                t.attention_grad_keys.fn(g, task, m);
            });
  g.a.tasks = rows.data();
  run_tasks(int64_t(rows.size()), serial, 64, [&](int64_t i, void* m) { t.attention_grad_q.fn(g, i, m); });

  // Sums over all rows, in order.
  const auto each_row = [&](auto&& f) {
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t head = 0; head < a.heads; ++head) {
        const AttentionSequence& s = call.sequences[size_t(b)];
        const int64_t first = (s.q_batch * a.heads + head) * a.lse_rows + s.q_first;
        for (int64_t i = 0; i < s.q_count; ++i) f(b, head, first + i);
      }
  };
  if (grads.grad_alibi) {
    TW_EXPECT(grads.grad_alibi.dtype == DType::f32 && grads.grad_alibi.is_contiguous() &&
                  grads.grad_alibi.numel() == in.alibi.numel(),
              kAttention, "grad_alibi must be contiguous float32 of alibi_slopes' shape");
    float* to = grads.grad_alibi.as<float>();
    std::vector<double> sums(size_t(a.batch * a.heads));
    each_row([&](int64_t b, int64_t head, int64_t at) {
      for (int64_t split = 0; split < g.splits; ++split)
        sums[size_t((a.alibi_batch ? b * a.heads : 0) + head)] -= g.slopes[split * g.lse_size + at];
    });
    for (int64_t i = 0; i < grads.grad_alibi.numel(); ++i) to[i] = float(sums[size_t(i)]);
  }
  if (grads.grad_sinks) {
    TW_EXPECT(grads.grad_sinks.dtype == DType::f32 && grads.grad_sinks.is_contiguous() &&
                  grads.grad_sinks.numel() == a.heads && a.sinks,
              kAttention, "grad_sinks must be contiguous float32 of sinks' shape");
    std::vector<double> sums(size_t(a.heads));
    each_row([&](int64_t, int64_t head, int64_t at) {
      if (a.lse[at] != -HUGE_VALF)
        sums[size_t(head)] -= double(std::exp(a.sinks[head] - a.lse[at])) * g.delta[at];
    });
    for (int64_t i = 0; i < a.heads; ++i) grads.grad_sinks.as<float>()[i] = float(sums[size_t(i)]);
  }
}

}  // namespace tilewright
