"""llama.cpp's matrix product by itself: ggml's mul_mat through ctypes, from the library in llama-cpp-python.

A weight goes into the buffer type that llama.cpp would choose for it on a CPU: a repacked one where ggml has kernels
for that, else plain memory. fp32 activations are quantised inside the call, as ours are.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}  # enum ggml_type
_POINTER, _SIZE, _INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_SIGNATURES = {
    "ggml_init": (_POINTER, None),  # its argument is a struct
    "ggml_free": (None, (_POINTER,)),
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, ctypes.c_int, _INT64, _INT64)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, (_POINTER, _POINTER)),
    "ggml_backend_tensor_set": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_tensor_get": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_graph_compute": (ctypes.c_int, (_POINTER, _POINTER)),
    "ggml_backend_get_device": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_backend_reg": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_POINTER, _POINTER)),
    "ggml_backend_reg_get_proc_address": (_POINTER, (_POINTER, ctypes.c_char_p)),
    "ggml_backend_buft_alloc_buffer": (_POINTER, (_POINTER, _SIZE)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_POINTER,)),
    "ggml_backend_buffer_free": (None, (_POINTER,)),
    "ggml_backend_cpu_buffer_type": (_POINTER, ()),
}
_CONTEXT_BYTES = 1 << 20
_BUFFER_FIELD = 8  # of struct ggml_tensor: the pointer after its type


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The library and a CPU backend of it. Raises ImportError without llama-cpp-python."""

    def __init__(self) -> None:
        import llama_cpp

        # Its names include those of the libraries it depends on; opening those by path would load second copies.
        lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libllama.so"))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype = result
            if arguments is not None:
                function.argtypes = arguments
            setattr(self, name.removeprefix("ggml_").removeprefix("backend_"), function)
        lib.ggml_backend_cpu_init.restype = _POINTER
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)(lambda *_: None)
        lib.ggml_log_set(self._silent, None)
        self.backend = _POINTER(lib.ggml_backend_cpu_init())
        lib.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        self.device = self.get_device(self.backend)
        extra = self.reg_get_proc_address(self.dev_backend_reg(self.device), b"ggml_backend_dev_get_extra_bufts")
        self.buffer_types = []
        if extra:
            found = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(extra)(self.device)
            while found[len(self.buffer_types)]:
                self.buffer_types.append(found[len(self.buffer_types)])
        self.buffer_types.append(self.cpu_buffer_type())

    def context(self) -> int:
        """A context whose tensors get their memory later."""
        return self.init(_InitParams(_CONTEXT_BYTES, None, True))


@functools.cache
def library() -> _Ggml:
    """Loaded once; raises ImportError without llama-cpp-python."""
    return _Ggml()


class MulMat:
    """x (m, k), contiguous float32, times a weight (n, k) of a GGUF type, whose bytes are `raw` (n, bytes a row)."""

    def __init__(self, x: Tensor, raw: Tensor, type_name: str) -> None:
        self.arguments = (x, raw, type_name)
        (m, k), n = x.shape, raw.shape[0]
        g, self.shape = library(), (m, n)
        self.contexts = [g.context(), g.context()]
        self.weight = g.new_tensor_2d(self.contexts[0], TYPES[type_name], k, n)
        self.x = g.new_tensor_2d(self.contexts[1], TYPES["F32"], k, m)
        self.out = g.mul_mat(self.contexts[1], self.weight, self.x)
        self.graph = g.new_graph(self.contexts[1])
        g.build_forward_expand(self.graph, self.out)
        kind = next(kind for kind in g.buffer_types if self._supported(kind))
        self.buffer_type = g.buft_name(kind).decode()
        self.buffers = [
            g.alloc_ctx_tensors_from_buft(self.contexts[0], kind),
            g.alloc_ctx_tensors_from_buft(self.contexts[1], g.cpu_buffer_type()),
        ]
        g.tensor_set(self.weight, raw.data_ptr(), 0, raw.nbytes)
        g.tensor_set(self.x, x.data_ptr(), 0, x.nbytes)

    def _supported(self, kind: int) -> bool:
        """As llama.cpp asks: with an empty buffer of that kind."""
        g, field = library(), ctypes.cast(self.weight + _BUFFER_FIELD, ctypes.POINTER(_POINTER))
        buffer = g.buft_alloc_buffer(kind, 0)
        field[0] = buffer
        supported = g.dev_supports_op(g.device, self.out)
        field[0] = None
        g.buffer_free(buffer)
        return supported

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.arguments[1].nbytes

    def __deepcopy__(self, memo: dict) -> MulMat:
        return MulMat(*self.arguments)

    def __del__(self) -> None:
        g = library()
        for buffer in getattr(self, "buffers", ()):
            g.buffer_free(buffer)
        for context in getattr(self, "contexts", ()):
            g.free(context)

    def run(self) -> MulMat:
        """Compute; raises RuntimeError where ggml refuses."""
        status = library().graph_compute(library().backend, self.graph)
        if status:
            raise RuntimeError(f"ggml: graph_compute returned {status}")
        return self

    def result(self) -> Tensor:
        """float32 (m, n)."""
        out = torch.empty(self.shape)
        library().tensor_get(self.out, out.data_ptr(), 0, out.nbytes)
        return out
