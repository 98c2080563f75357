#include "cuda/bindings_attention.h"

#include "cuda/calls_attention.h"
#include "torch_tensor.h"

namespace py = pybind11;
namespace gpu = tilewright::cuda;
using tilewright::TensorView;

void bind_attention(py::module_& m) {
  m.def("attention_workspace", [](int device, const TensorView& q, const TensorView& k, const TensorView& v,
                                  const TensorView& q_start, const TensorView& q_end,
                                  const TensorView& k_batch, const TensorView& block_table) {
    const TensorView none;
    return gpu::attention_workspace(
        device, {q, k, v, none, none, none, none, q_start, q_end, none, none, k_batch, block_table, none});
  });
  m.def("attention",
        [](int device, uintptr_t stream, const TensorView& q, const TensorView& k, const TensorView& v,
           const TensorView& mask, const TensorView& bias, const TensorView& alibi, const TensorView& sinks,
           const TensorView& q_start, const TensorView& q_end, const TensorView& k_start,
           const TensorView& k_end, const TensorView& k_batch, const TensorView& block_table,
           const TensorView& seed, float scale, float softcap, int causal, int64_t left, int64_t right,
           double dropout_p, const TensorView& out, const TensorView& lse, const TensorView& workspace) {
          const py::gil_scoped_release release;
          gpu::attention(
              {device, reinterpret_cast<cudaStream_t>(stream)},
              {q, k, v, mask, bias, alibi, sinks, q_start, q_end, k_start, k_end, k_batch, block_table, seed},
              {scale, softcap, causal, left, right, dropout_p}, out, lse, workspace);
        });
  m.def("attention_quantized_workspace",
        [](int device, const TensorView& q, const TensorView& k_codes, const TensorView& v_codes,
           const TensorView& k_scales, const TensorView& v_scales, const TensorView& k_tail,
           const TensorView& v_tail, const TensorView& counts, int bits, int64_t group_size, int64_t residual,
           int64_t max_len, int64_t head_dim) {
          return gpu::attention_quantised_workspace(device, q,
                                                    {k_codes, v_codes, k_scales, v_scales, k_tail, v_tail,
                                                     counts, bits, group_size, residual, max_len, head_dim});
        });
  m.def("attention_quantized",
        [](int device, uintptr_t stream, const TensorView& q, const TensorView& k_codes,
           const TensorView& v_codes, const TensorView& k_scales, const TensorView& v_scales,
           const TensorView& k_tail, const TensorView& v_tail, const TensorView& counts, int bits,
           int64_t group_size, int64_t residual, int64_t max_len, int64_t head_dim, const TensorView& mask,
           const TensorView& bias, const TensorView& alibi, const TensorView& sinks, const TensorView& seed,
           float scale, float softcap, int causal, int64_t left, int64_t right, double dropout_p,
           const TensorView& out, const TensorView& lse, const TensorView& workspace) {
          const py::gil_scoped_release release;
          const TensorView none;
          gpu::attention_quantised(
              {device, reinterpret_cast<cudaStream_t>(stream)},
              {q, none, none, mask, bias, alibi, sinks, none, none, none, none, none, none, seed},
              {k_codes, v_codes, k_scales, v_scales, k_tail, v_tail, counts, bits, group_size, residual,
               max_len, head_dim},
              {scale, softcap, causal, left, right, dropout_p}, out, lse, workspace);
        });
  m.def(
      "attention_backward",
      [](int device, uintptr_t stream, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& bias, const TensorView& alibi, const TensorView& sinks,
         const TensorView& q_start, const TensorView& q_end, const TensorView& k_start,
         const TensorView& k_end, const TensorView& k_batch, const TensorView& block_table,
         const TensorView& seed, float scale, float softcap, int causal, int64_t left, int64_t right,
         double dropout_p, const TensorView& out, const TensorView& lse, const TensorView& grad_out,
         const TensorView& grad_lse, const TensorView& delta, const TensorView& grad_q,
         const TensorView& grad_k, const TensorView& grad_v, const TensorView& grad_bias,
         const TensorView& grad_alibi, const TensorView& grad_sinks, const TensorView& slopes) {
        const py::gil_scoped_release release;
        gpu::attention_backward(
            {device, reinterpret_cast<cudaStream_t>(stream)},
            {q, k, v, mask, bias, alibi, sinks, q_start, q_end, k_start, k_end, k_batch, block_table, seed},
            {scale, softcap, causal, left, right, dropout_p},
            {out, lse, grad_out, grad_lse, delta, grad_q, grad_k, grad_v, grad_bias, grad_alibi, grad_sinks},
            slopes);
      });
}
