// pybind11: argument conversion and m.def, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/table.h"
#include "cpu/team.h"
#include "ops.h"
#include "ops/gguf_blocks.h"
#include "torch_tensor.h"

namespace py = pybind11;
using namespace tilewright;

namespace {

int threads_override = 0;  // set_num_threads or TILEWRIGHT_NUM_THREADS; 0 follows torch

int threads_now() {
  if (threads_override > 0) return threads_override;
  PyObject* n = PyObject_CallNoArgs(torch_handles().get_num_threads);
  if (!n) throw py::error_already_set();
  const long value = PyLong_AsLong(n);
  Py_DECREF(n);
  return std::max(1, std::min<int>(static_cast<int>(value), usable_cpus()));
}

// Runs an op with the thread count that holds now and without the GIL. Every binding goes through it.
template <class Fn>
void launch(Fn&& f) {
  set_num_threads(threads_now());
  py::gil_scoped_release release;
  f();
}

bool truthy(PyObject* result) {
  if (!result) throw py::error_already_set();
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

long number(PyObject* callable) {
  PyObject* result = PyObject_CallNoArgs(callable);
  if (!result) throw py::error_already_set();
  const long value = PyLong_AsLong(result);
  Py_DECREF(result);
  return value;
}

// direct(*tensors_or_None) -> bool: whether these may be handed to a kernel without torch's dispatcher.
// They may not if any is a subclass, not on a CPU, lazily negated, or needs a gradient, or while a dispatch
// mode, function mode or functorch level is active. (Layouts other than strided fail in the DLPack export.)
PyObject* direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  const auto& torch = torch_handles();
  try {
    if (number(torch.dispatch_depth) != 0 || number(torch.function_depth) != 0) Py_RETURN_FALSE;
    PyObject* level = PyObject_CallNoArgs(torch.peek_functorch);
    if (!level) throw py::error_already_set();
    Py_DECREF(level);
    if (level != Py_None) Py_RETURN_FALSE;
    static PyObject* const current_level = PyUnicode_InternFromString("_current_level");
    PyObject* dual = PyObject_GetAttr(torch.forward_ad, current_level);
    if (!dual) throw py::error_already_set();
    const long dual_level = PyLong_AsLong(dual);
    Py_DECREF(dual);
    if (dual_level >= 0) Py_RETURN_FALSE;
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    static PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
    const bool grad = truthy(PyObject_CallNoArgs(torch.is_grad_enabled));
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* t = args[i];
      if (t == Py_None) continue;
      if (Py_TYPE(t) != torch.tensor && Py_TYPE(t) != torch.parameter) Py_RETURN_FALSE;
      if (grad && truthy(PyObject_GetAttr(t, requires_grad))) Py_RETURN_FALSE;
      if (!truthy(PyObject_GetAttr(t, is_cpu))) Py_RETURN_FALSE;
      if (truthy(PyObject_Vectorcall(torch.is_neg, &t, 1, nullptr))) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  }
}

PyMethodDef direct_def = {"direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(direct)),
                          METH_FASTCALL, "Whether these tensors may skip torch's dispatcher."};

py::tuple read_strings(const py::buffer& buffer, int64_t at, int64_t count, uint64_t longest) {
  const py::buffer_info bytes = buffer.request();
  const int64_t size = bytes.size * bytes.itemsize;
  const auto* data = static_cast<const char*>(bytes.ptr);
  py::list found;
  for (int64_t i = 0; i < count && at >= 0 && at + 8 <= size; ++i) {
    uint64_t length;
    std::memcpy(&length, data + at, 8);
    if (length > longest || length > static_cast<uint64_t>(size - at - 8)) break;
    PyObject* text = PyUnicode_DecodeUTF8(data + at + 8, static_cast<Py_ssize_t>(length), "strict");
    if (!text) {
      PyErr_Clear();
      break;
    }
    found.append(py::reinterpret_steal<py::object>(text));
    at += 8 + static_cast<int64_t>(length);
  }
  return py::make_tuple(found, at);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Tilewright's kernels. Private: use the functions of tilewright.";
  fill_torch_handles(true);
  if (const char* n = std::getenv("TILEWRIGHT_NUM_THREADS"); n && *n) {
    char* end = nullptr;
    const long value = std::strtol(n, &end, 10);
    if (*end || value < 1 || value > 1024)
      throw py::value_error("TILEWRIGHT_NUM_THREADS must be a whole number from 1 to 1024, got \"" +
                            std::string(n) + "\"");
    threads_override = static_cast<int>(value);
  }
  active();  // an impossible TILEWRIGHT_ISA fails the import, with its message

  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const NotSupported& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });

  PyObject* f = PyCFunction_NewEx(&direct_def, nullptr, nullptr);
  m.attr("direct") = py::reinterpret_steal<py::object>(f);

  m.def("set_num_threads", [](int n) { threads_override = n; });
  m.def("get_num_threads", &threads_now);
  m.def("usable_cpus", &usable_cpus);
  m.def("isa", [] { return name_of(active()); });
  m.def("isa_found", [] {
    py::list found;
    for (int i = 0; i < static_cast<int>(Isa::count); ++i)
      if (has(static_cast<Isa>(i))) found.append(name_of(static_cast<Isa>(i)));
    return found;
  });
  m.def("amx_is_emulated", &amx_is_emulated);
  m.def("last_impl", [](const std::string& op) -> py::object {
    const char* s = last_implementation(op.c_str());
    return s ? py::object(py::str(s)) : py::none();
  });
  m.def("record", [](const std::string& op, const std::string& implementation) {
    record(op.c_str(), implementation == "reference" ? "reference"
                       : implementation == "cuda"    ? "cuda"
                                                     : "triton");
  });
  m.def("uses_dlpack", [] { return torch_handles().api != nullptr; });
  m.def("use_dlpack", &fill_torch_handles,
        "For tests: read tensors through DLPack or attribute by attribute.");

  m.def("norm",
        [](const std::string& op, const TensorView& x, const TensorView& residual, const TensorView& weight,
           const TensorView& bias, const TensorView& out, const TensorView& sum, float eps, bool centred) {
          launch([&] { norm(op.c_str(), x, residual, weight, bias, out, sum, eps, centred); });
        });

  m.def("linear", [](const TensorView& x, const TensorView& packed, int64_t n, int64_t k, int codes,
                     int64_t group_size, int offset, int scale, const TensorView& bias,
                     const TensorView& residual, const TensorView& columns, const TensorView& group_sizes,
                     const std::string& activation, double outlier_threshold, const TensorView& out) {
    launch([&] {
      linear(x, packed, {n, k, codes, group_size, offset, scale},
             {bias, residual, columns, group_sizes, activation, outlier_threshold}, out);
    });
  });
  m.def(
      "gated_mlp", [](const TensorView& x, const TensorView& gate_up, int64_t gate_up_n, int64_t gate_up_k,
                      int gate_up_codes, int64_t gate_up_group_size, int gate_up_offset, int gate_up_scale,
                      const TensorView& down, int64_t down_n, int64_t down_k, int down_codes,
                      int64_t down_group_size, int down_offset, int down_scale,
                      const TensorView& gate_up_bias, const TensorView& down_bias, const TensorView& residual,
                      const std::string& act, const std::string& activation, const TensorView& out) {
        launch([&] {
          gated_mlp(x, gate_up,
                    {gate_up_n, gate_up_k, gate_up_codes, gate_up_group_size, gate_up_offset, gate_up_scale},
                    down, {down_n, down_k, down_codes, down_group_size, down_offset, down_scale},
                    {gate_up_bias, down_bias, residual, act, activation}, out);
        });
      });
  m.def("packed_block_bytes", [](int64_t n, int64_t k, int codes, int64_t group_size, int offset, int scale) {
    return packed_block_bytes({n, k, codes, group_size, offset, scale});
  });
  m.def("pack_codes",
        [](const TensorView& codes, const TensorView& scales, const TensorView& offsets,
           const TensorView& out, int64_t n, int64_t k, int kind, int64_t group_size, int offset, int scale) {
          launch([&] { pack_codes(codes, scales, offsets, out, {n, k, kind, group_size, offset, scale}); });
        });
  m.def("pack_bf16", [](const TensorView& w, const TensorView& out, int64_t n, int64_t k, int codes,
                        int64_t group_size, int offset, int scale) {
    launch([&] { pack_bf16(w, out, {n, k, codes, group_size, offset, scale}); });
  });
  m.def("gguf_types", [] {
    py::list types;
    for (const GgufType& t : gguf_types())
      types.append(
          py::make_tuple(t.name, int(t.codes), t.group, int(t.offset), int(t.scale), t.columns, t.bytes));
    return types;
  });
  m.def("read_strings", &read_strings,
        "Up to `count` strings, each a uint64 length and UTF-8, from `at` on, and where the reader stopped: "
        "at the "
        "first that is cut off, longer than `longest` or no UTF-8.");
  m.def("pack_gguf", [](const TensorView& raw, const std::string& type, const TensorView& out, int64_t n,
                        int64_t k) { launch([&] { pack_gguf(raw, type, out, n, k); }); });
  m.def("weight_rows", [](const TensorView& index, const TensorView& packed, int64_t n, int64_t k, int codes,
                          int64_t group_size, int offset, int scale, const TensorView& out) {
    launch([&] { weight_rows(index, packed, {n, k, codes, group_size, offset, scale}, out); });
  });

  m.def("ceiling", [](const std::string& kind, const TensorView& data, int64_t iterations) {
    double rate = 0;
    launch([&] { rate = ceiling(kind, data, iterations); });
    return rate;
  });

  m.def(
      "attention", [](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
                      const TensorView& bias, const TensorView& alibi, const TensorView& sinks,
                      const TensorView& q_start, const TensorView& q_end, const TensorView& k_start,
                      const TensorView& k_end, const TensorView& k_batch, const TensorView& block_table,
                      const TensorView& seed, float scale, float softcap, int causal, int64_t window_left,
                      int64_t window_right, double dropout_p, const TensorView& out, const TensorView& lse) {
        launch([&] {
          attention(
              {q, k, v, mask, bias, alibi, sinks, q_start, q_end, k_start, k_end, k_batch, block_table, seed},
              {scale, softcap, causal, window_left, window_right, dropout_p}, out, lse);
        });
      });
  m.def("attention_backward",
        [](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& mask,
           const TensorView& bias, const TensorView& alibi, const TensorView& sinks,
           const TensorView& q_start, const TensorView& q_end, const TensorView& k_start,
           const TensorView& k_end, const TensorView& k_batch, const TensorView& block_table,
           const TensorView& seed, float scale, float softcap, int causal, int64_t window_left,
           int64_t window_right, double dropout_p, const TensorView& out, const TensorView& lse,
           const TensorView& grad_out, const TensorView& grad_lse, const TensorView& delta,
           const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v,
           const TensorView& grad_bias, const TensorView& grad_alibi, const TensorView& grad_sinks) {
          launch([&] {
            attention_backward({q, k, v, mask, bias, alibi, sinks, q_start, q_end, k_start, k_end, k_batch,
                                block_table, seed},
                               {scale, softcap, causal, window_left, window_right, dropout_p},
                               {out, lse, grad_out, grad_lse, delta, grad_q, grad_k, grad_v, grad_bias,
                                grad_alibi, grad_sinks});
          });
        });
  m.def("rope", [](const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
                   const TensorView& positions, const TensorView& out_q, const TensorView& out_k,
                   bool interleaved, std::optional<int64_t> rotary_dim) {
    launch([&] { rope(q, k, cos, sin, positions, out_q, out_k, interleaved, rotary_dim); });
  });
  m.def("act_mul",
        [](const TensorView& gate, const TensorView& up, const TensorView& out,
           const std::string& activation) { launch([&] { act_mul(gate, up, out, activation); }); });
  m.def("kv_append",
        [](const TensorView& cache_k, const TensorView& cache_v, const TensorView& k, const TensorView& v,
           const TensorView& positions, const TensorView& block_table, const TensorView& cache_seqlens) {
          launch([&] { kv_append(cache_k, cache_v, k, v, positions, block_table, cache_seqlens); });
        });
  m.def("attention_quantized",
        [](const TensorView& q, const TensorView& k_codes, const TensorView& v_codes,
           const TensorView& k_scales, const TensorView& v_scales, const TensorView& k_tail,
           const TensorView& v_tail, const TensorView& counts, int bits, int64_t group_size, int64_t residual,
           int64_t max_len, int64_t head_dim, const TensorView& mask, const TensorView& bias,
           const TensorView& alibi, const TensorView& sinks, const TensorView& seed, float scale,
           float softcap, int causal, int64_t window_left, int64_t window_right, double dropout_p,
           const TensorView& out, const TensorView& lse) {
          const TensorView none;
          launch([&] {
            attention_quantised(
                {q, none, none, mask, bias, alibi, sinks, none, none, none, none, none, none, seed},
                {k_codes, v_codes, k_scales, v_scales, k_tail, v_tail, counts, bits, group_size, residual,
                 max_len, head_dim},
                {scale, softcap, causal, window_left, window_right, dropout_p}, out, lse);
          });
        });
  m.def("kv_append_quantized",
        [](const TensorView& k_codes, const TensorView& v_codes, const TensorView& k_scales,
           const TensorView& v_scales, const TensorView& k_tail, const TensorView& v_tail,
           const TensorView& counts, int bits, int64_t group_size, int64_t residual, int64_t max_len,
           int64_t head_dim, const TensorView& k, const TensorView& v) {
          launch([&] {
            kv_append_quantised({k_codes, v_codes, k_scales, v_scales, k_tail, v_tail, counts, bits,
                                 group_size, residual, max_len, head_dim},
                                k, v);
          });
        });
  m.def("sample", [](const TensorView& logits, const TensorView& uniform, const TensorView& out,
                     double temperature, int64_t top_k, double top_p, double min_p) {
    launch([&] { sample(logits, uniform, out, temperature, top_k, top_p, min_p); });
  });
}
