// What the kernels of attention's gradient share. With P = exp(S - lse) and delta = rowsum(dO * O) - dlse:
// dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q
// (Dao, https://arxiv.org/abs/2307.08691).
#pragma once
#include "attention_tiles.cuh"

namespace tw::cuda {

struct GradientLaunch : AttentionLaunch {
  Heads grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;
  float *delta = nullptr, *slopes = nullptr, *grad_alibi = nullptr, *grad_sinks = nullptr,
        *grad_bias = nullptr;
  int64_t bias_sizes[4] = {};
};

// A row as its scores' gradients need it.
struct GradientRow {
  ScoreRow score;  // of a general call
  float lse, delta;
  Range seen;
};
template <bool kGeneral>
__device__ inline GradientRow gradient_row(const GradientLaunch& a, const Sequence& s, int kv_head, int row,
                                           int rows) {
  GradientRow r;
  const Folded f = folded(a, kv_head, min(row, rows - 1));
  if constexpr (kGeneral) r.score = score_row(a, s, f.head, f.query);
  const int64_t at = lse_index(a, s, f.head, f.query);
  r.lse = a.lse[at], r.delta = a.delta[at];
  r.seen = visible_keys(a, s, f.query);
  if (row >= rows || r.lse == -kInfinity) r.seen.end = 0;
  return r;
}

// From a row's product with a key, and its grad_out's product with the value: the weight after dropout, the
// score's gradient, and that of scale * q k^T. All are 0 where the row does not attend the key, whatever that
// holds.
struct ScoreGradient {
  float weight, score, product;
};
template <bool kGeneral>
__device__ inline ScoreGradient score_gradient(const GradientLaunch& a, const GradientRow& r, float product,
                                               float grad_weight, int key, bool sees,
                                               const ScoreTerms& terms) {
  if (!sees) return {0, 0, 0};
  if constexpr (!kGeneral) {
    const float p = exp2_fast(fmaf(product, a.scale * kLog2e, -r.lse * kLog2e));
    const float grad = p * (grad_weight - r.delta);
    return {p, grad, grad};
  }
  float slant;
  const float x = general_score(a, r.score, product, key, terms, slant);
  if (x == -kInfinity) return {0, 0, 0};
  const float p = exp2_fast((x - r.lse) * kLog2e);
  float weight = p;
  if (a.keep < 1.0f) {
    const float grow = a.keep > 0 && is_kept(r.score, drop_limit(a), key) ? __fdividef(1.0f, a.keep) : 0.0f;
    weight = grow == 0.0f ? 0.0f : p * grow;
    grad_weight = grow == 0.0f ? 0.0f : grad_weight * grow;
  }
  const float grad = p * (grad_weight - r.delta);
  return {weight, grad, grad * slant};
}

// Where row `row` of a KV head's folded rows lies in x, which has q's layout of sequences.
__device__ inline uint16_t* row_of(const AttentionLaunch& a, const Sequence& s, const Heads& x, int kv_head,
                                   int row) {
  const Folded f = folded(a, kv_head, row);
  return static_cast<uint16_t*>(x.base) + s.q_outer * x.batch + f.head * x.head +
         int64_t(s.q_first + f.query) * x.token;
}
// The same of key `key`; keys are neither paged nor codes.
__device__ inline uint16_t* key_of(const Sequence& s, const Heads& x, int kv_head, int key) {
  return static_cast<uint16_t*>(x.base) + s.k_row * x.batch + kv_head * x.head +
         int64_t(s.k_begin + key) * x.token;
}

cudaError_t gradient_of_keys(const GradientLaunch& a, cudaStream_t stream);
cudaError_t gradient_of_queries(const GradientLaunch& a, cudaStream_t stream);
cudaError_t gradient_of_bias(const GradientLaunch& a, cudaStream_t stream);

template <class Kernel>
cudaError_t launch_shared(Kernel kernel, int64_t blocks, int threads, int bytes, const GradientLaunch& a,
                          cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return e;
  kernel<<<unsigned(blocks), threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace tw::cuda
