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
}
