// pybind11: argument conversion and m.def of the module tilewright._cuda, nothing else. Importing it needs no
// driver: the CUDA runtime is linked statically and looks for one when it is first asked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bindings_attention.h"
#include "cuda/calls.h"
#include "torch_tensor.h"

namespace py = pybind11;
namespace gpu = tilewright::cuda;
using tilewright::TensorView;

namespace {

// Every call's first arguments are the device's number and torch's current stream there, as an integer.
gpu::Where where(int device, uintptr_t stream) { return {device, reinterpret_cast<cudaStream_t>(stream)}; }

template <class Fn>
void unlocked(Fn&& f) {
  py::gil_scoped_release release;
  f();
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Tilewright's CUDA kernels. Private: use the functions of tilewright.";
  tilewright::fill_torch_handles(true);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const tilewright::NotSupported& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });

  m.def(
      "built_for", [] { return std::string(TILEWRIGHT_CUDA_BUILT_FOR); },
      "The architectures that the kernels were compiled for, such as \"80;90a\".");
  m.def(
      "use_device_type", [](int type) { gpu::device_type = type; },
      "For tests: DLPack's number of the devices whose tensors are taken.");

  m.def("norm", [](int device, uintptr_t stream, const TensorView& x, const std::string& op,
                   const TensorView& residual, const TensorView& weight, const TensorView& bias,
                   const TensorView& out, const TensorView& total, float eps, bool centred) {
    unlocked([&] {
      gpu::norm(where(device, stream), op.c_str(), x, residual, weight, bias, out, total, eps, centred);
    });
  });
  m.def("act_mul", [](int device, uintptr_t stream, const TensorView& gate, const TensorView& up,
                      const TensorView& out, const std::string& activation) {
    unlocked([&] { gpu::act_mul(where(device, stream), gate, up, out, activation); });
  });
  m.def("rope", [](int device, uintptr_t stream, const TensorView& q, const TensorView& k,
                   const TensorView& cos, const TensorView& sin, const TensorView& positions,
                   const TensorView& out_q, const TensorView& out_k, bool interleaved,
                   std::optional<int64_t> rotary_dim) {
    unlocked([&] {
      gpu::rope(where(device, stream), q, k, {cos, sin, interleaved, rotary_dim}, positions, out_q, out_k);
    });
  });
  m.def("kv_append", [](int device, uintptr_t stream, const TensorView& cache_k, const TensorView& cache_v,
                        const TensorView& k, const TensorView& v, const TensorView& positions,
                        const TensorView& block_table, const TensorView& cache_seqlens) {
    unlocked([&] {
      gpu::kv_append(where(device, stream), {cache_k, cache_v, positions, block_table, cache_seqlens}, k, v);
    });
  });
  m.def("rope_append",
        [](int device, uintptr_t stream, const TensorView& q, const TensorView& k, const TensorView& v,
           const TensorView& cos, const TensorView& sin, const TensorView& cache_k, const TensorView& cache_v,
           const TensorView& positions, const TensorView& block_table, const TensorView& cache_seqlens,
           bool interleaved, std::optional<int64_t> rotary_dim, const TensorView& out) {
          unlocked([&] {
            gpu::rope_append(where(device, stream), q, k, v, {cos, sin, interleaved, rotary_dim},
                             {cache_k, cache_v, positions, block_table, cache_seqlens}, out);
          });
        });
  bind_attention(m);
  m.def("linear",
        [](int device, uintptr_t stream, const TensorView& x, const TensorView& codes,
           const TensorView& scales, const TensorView& offsets, int bits, int middle, int64_t group,
           int64_t k, const std::string& offset, const TensorView& bias, const TensorView& group_sizes,
           const std::string& activation, const TensorView& workspace, const TensorView& out) {
          unlocked([&] {
            gpu::linear(where(device, stream), x, {codes, scales, offsets, bits, middle, group, k, offset},
                        bias, group_sizes, activation, workspace, out);
          });
        });
  m.def("linear_workspace_bytes", &gpu::linear_workspace_bytes);
  m.def("kv_append_quantized",
        [](int device, uintptr_t stream, const TensorView& k_codes, const TensorView& v_codes,
           const TensorView& k_scales, const TensorView& v_scales, const TensorView& k_tail,
           const TensorView& v_tail, const TensorView& counts, int64_t bits, int64_t group_size,
           int64_t residual, int64_t max_len, int64_t head_dim, const TensorView& k, const TensorView& v) {
          unlocked([&] {
            gpu::kv_append_quantised(where(device, stream),
                                     {k_codes, v_codes, k_scales, v_scales, k_tail, v_tail, counts, bits,
                                      group_size, residual, max_len, head_dim},
                                     k, v);
          });
        });
  m.def("gather", [](int device, uintptr_t stream, const TensorView& from, const TensorView& from_index,
                     const TensorView& to_index, const TensorView& to) {
    unlocked([&] { gpu::gather(where(device, stream), from, from_index, to_index, to); });
  });
  m.def("sample", [](int device, uintptr_t stream, const TensorView& logits, const TensorView& uniform,
                     const TensorView& out, double temperature, int64_t top_k, double top_p, double min_p) {
    unlocked(
        [&] { gpu::sample(where(device, stream), logits, uniform, out, temperature, top_k, top_p, min_p); });
  });
}
