#include "cpu/quantised_kv.h"
#include "ops/attention_call.h"
#include "ops/kv_quant.h"

namespace tilewright {
namespace {

// Blocks of query rows, the last ones of each sequence first: when causal they see the most keys. Longer
// sequences come before shorter ones.
std::vector<AttentionTask> row_tasks(const AttentionCall& call) {
  const AttentionArgs& a = call.a;
  const int64_t group = a.heads / a.kv_heads;
  const auto blocks_of = [&](const AttentionSequence& s) {
    return (s.q_count * group + kQueryRows - 1) / kQueryRows;
  };
  std::vector<AttentionTask> tasks;
  const int64_t most = (call.most_rows + kQueryRows - 1) / kQueryRows;
  for (int64_t back = 0; back < most; ++back)
    for (size_t b = 0; b < call.sequences.size(); ++b) {
      const int64_t block = blocks_of(call.sequences[b]) - 1 - back;
      for (int64_t h = 0; block >= 0 && h < a.kv_heads; ++h)
        tasks.push_back({int32_t(b), int32_t(h), int32_t(block)});
    }
  const auto keys = [&](const AttentionTask& t) {
    const AttentionSequence& s = call.sequences[size_t(t.sequence)];
    return s.k_end - s.k_begin;
  };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const AttentionTask& x, const AttentionTask& y) { return keys(x) > keys(y); });
  return tasks;
}

}  // namespace

void attention(const AttentionInputs& in, const AttentionOptions& options, const TensorView& out,
               const TensorView& lse) {
  AttentionCall call(in, options);
  AttentionArgs& a = call.a;
  a.out = attention_operand("out", out);
  TW_EXPECT(out.dtype == in.q.dtype && out.shape[0] == in.q.shape[0] && out.shape[1] == a.heads &&
                out.shape[2] == in.q.shape[2] && out.shape[3] == a.v_dim,
            kAttention, "out must have q's dtype and shape up to v's head_dim, got " + shape_of(out));
  if (lse) {
    TW_EXPECT(lse.dtype == DType::f32 && lse.numel() == in.q.shape[0] * a.heads * in.q.shape[2], kAttention,
              "lse has a wrong shape");
    a.lse = lse.as<float>();
    a.lse_rows = in.q.shape[2];
  }
  a.kv = in.quantised;
  const Table& t = table();
  const bool decode = call.most_rows <= kDecodeRows;
  record(kAttention, (decode ? t.attention_decode : t.attention_prefill).isa);
  if (a.batch == 0 || a.heads == 0 || call.most_rows == 0 || (a.v_dim == 0 && !a.lse)) return;

  const int64_t slots = a.batch * a.kv_heads, v_pad = padded16(a.v_dim);
  const bool serial = call.is_small();
  if (decode) {
    a.rows = call.most_rows;
    a.chunks = std::max<int64_t>(1, (call.longest + kDecodeChunk - 1) / kDecodeChunk);
    Workspace partials(a.chunks == 1 ? 0 : slots * a.chunks * a.rows * (v_pad + 2) * 4);
    a.partials = partials.floats();
    const int64_t bytes = a.kv ? quantised_decode_bytes(a.head_dim) : decode_bytes(a.head_dim, a.v_dim);
    const AttentionKernel chunk = a.kv ? t.attention_decode_quantised.fn : t.attention_decode.fn;
    run_tasks(slots * a.chunks, serial, bytes, [&](int64_t task, void* memory) { chunk(a, task, memory); });
    if (a.chunks > 1)
      run_tasks(slots * a.rows, serial, v_pad * 4,
                [&](int64_t task, void* memory) { t.attention_merge.fn(a, task, memory); });
    return;
  }
  const int64_t blocks = total_blocks(call);
  const int64_t k_bytes = blocks * packed_block_elements(a.head_dim) * 4,
                v_bytes = blocks * packed_block_elements(a.v_dim) * 4;
  Workspace packed(k_bytes + v_bytes + blocks);
  a.packed_k = packed.floats();
  a.packed_v = reinterpret_cast<char*>(packed.floats()) + k_bytes;
  a.v_not_finite = reinterpret_cast<uint8_t*>(packed.floats()) + k_bytes + v_bytes;
  const std::vector<AttentionTask> packing = key_tasks(call), rows = row_tasks(call);
  a.tasks = packing.data();
  const AttentionKernel pack = a.kv ? t.attention_pack_quantised.fn : t.attention_pack.fn;
  run_tasks(blocks, serial, 64, [&](int64_t task, void* memory) { pack(a, task, memory); });
  a.tasks = rows.data();
  const int64_t q_pad = padded16(a.head_dim);
  const int64_t bytes = (kQueryRows * (q_pad + 2 * kKeyBlock + v_pad + 2) + kKeyBlock * v_pad) * 4;
  run_tasks(int64_t(rows.size()), serial, bytes,
            [&](int64_t task, void* memory) { t.attention_prefill.fn(a, task, memory); });
}

void attention_quantised(const AttentionInputs& in, const QuantisedKvInputs& cache,
                         const AttentionOptions& options, const TensorView& out, const TensorView& lse) {
  const QuantisedKv kv = quantised_kv(kAttention, cache);
  TensorView shape;  // keys and values as (batch, kv_heads, length, head_dim) in q's dtype, without data
  shape.dtype = in.q.dtype;
  shape.ndim = 4;
  shape.device_type = 1;
  const int64_t sizes[4] = {kv.batch, kv.kv_heads, kv.length, kv.head_dim};
  for (int i = 0; i < 4; ++i) shape.shape[i] = sizes[i], shape.strides[i] = i == 3;
  attention({in.q, shape, shape, in.mask, in.bias, in.alibi, in.sinks, in.q_start, in.q_end, in.k_start,
             in.k_end, in.k_batch, in.block_table, in.seed, &kv},
            options, out, lse);
}

}  // namespace tilewright
