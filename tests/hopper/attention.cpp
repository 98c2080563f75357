#include "attention_wgmma.cu"  // as model.py rewrites it

using namespace tw::cuda;

// numbers: batch, heads, kv_heads, seq_q, head_dim, v_dim, keys, causal, left, right, f16, then the strides
// (batch, head, token) of q, k, v and out.
TW_C int hopper_attention(void* q, void* k, void* v, void* out, float* lse, const float* sinks,
                          const int64_t* numbers, float scale) {
  AttentionArgs a;
  const auto heads = [&](void* base, int i) {
    const int64_t* s = numbers + 11 + 3 * i;
    return Heads{base, s[0], s[1], s[2]};
  };
  a.q = heads(q, 0), a.k = heads(k, 1), a.v = heads(v, 2), a.out = heads(out, 3);
  a.lse = lse, a.sinks = sinks, a.scale = scale;
  a.batch = a.k_rows = numbers[0], a.heads = numbers[1], a.kv_heads = numbers[2], a.seq_q = numbers[3];
  a.head_dim = numbers[4], a.v_dim = numbers[5], a.capacity = numbers[6];
  a.causal = CausalMask(numbers[7]), a.window_left = numbers[8], a.window_right = numbers[9];
  a.type = numbers[10] ? Type::f16 : Type::bf16;
  return attention_wgmma(prepared(a, nullptr, 1), nullptr);
}
