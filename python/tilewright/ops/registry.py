"""How an op reaches torch: schema, kernel, fake kernel and gradient, registered once per op, and who serves a call.

Every public op function has two ways down. The direct path calls the binding at once; it is taken for plain
strided CPU tensors that need no gradient, outside any dispatch mode, function mode, functorch level or
compilation. Everything else goes through ``torch.ops.tilewright``, which torch.compile and autograd see. An op with
a twin in `tilewright.triton_kernels` has a last argument ``backend`` there, which `served_by` reads.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilewright import _C

_library = torch.library.Library("tilewright", "DEF")

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
# Where the CUDA extension's and Triton's kernels run: torch calls AMD's GPUs "cuda" too.
CUDA_DEVICES = {"cuda"}
TRITON_DEVICES = {"cuda"}


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    on_gpu: bool = False,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define ``tilewright::<schema>`` with its kernel and fake kernel, and a gradient if it has one. The kernel takes
    CPU tensors, and those of a GPU where ``on_gpu`` says so.

    ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``.
    """
    name = schema[: schema.index("(")]

    def nowhere(*arguments: object) -> None:
        raise NotImplementedError(f"{name.rstrip('_')}: has no GPU kernel; move the tensors to the CPU")

    _library.define(schema)
    _library.impl(name, kernel, "CPU")
    _library.impl(name, on_one_device(name, kernel) if on_gpu else nowhere, "CUDA")
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"tilewright::{name}", backward, setup_context=setup_context, lib=_library)


def on_one_device(name: str, kernel: Callable) -> Callable:
    """``kernel``, but a ValueError for tensors of several devices, which the dispatcher lets pass: a GPU's kernel would
    take their addresses for its own."""

    def checked(*arguments: object) -> object:
        devices = {t.device for t in arguments if isinstance(t, Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{name.rstrip('_')}: all tensors must be on one device, got some on {found}; move them")
        return kernel(*arguments)

    return checked


def direct(*tensors: Tensor | None) -> bool:
    """Whether the direct path may be taken with these arguments.

    Raises NotImplementedError for a forward-mode derivative, which no op has and the dispatcher would drop.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if _C.direct(*tensors):
        return True
    if forward_ad._current_level >= 0:
        for t in tensors:
            if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError("tilewright: forward-mode derivatives are not supported; use reverse mode")
    return False


def record(op: str, implementation: str) -> None:
    """Note for `last_impl` that "reference", "cuda" or "triton" served ``op``."""
    if not torch.compiler.is_compiling():
        _C.record(op, implementation)


def record_reference(op: str) -> None:
    """Note for `last_impl` that the reference served ``op``."""
    record(op, "reference")


def check_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors are on one device (the dispatcher lets a meta tensor pass among others)."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {found}")


def check_backend(op: str, backend: str) -> None:
    """Raise ValueError unless ``backend`` names an implementation."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def served_by(op: str, backend: str, t: Tensor, *, cuda_lacks: str = "", triton_lacks: str = "") -> str:
    """What serves a call with ``t``: "cpu", "cuda", "triton", or "reference", which has all of float64. A GPU's tensor
    goes to the CUDA extension if that was built for its architecture, else to Triton. ``cuda_lacks`` and
    ``triton_lacks`` say why one of them cannot. Raises NotImplementedError where nothing serves the call, or not what
    ``backend`` names."""
    if backend == "reference" or t.dtype is torch.float64:
        return "reference"
    if backend == "auto" and t.is_cpu:
        return "cpu"
    device = t.device.type
    without_cuda = ""
    if backend in ("auto", "cuda"):
        without_cuda = _without_cuda(t) or cuda_lacks
        if not without_cuda:
            record(op, "cuda")
            return "cuda"
        if backend == "cuda":
            raise NotImplementedError(f"{op}: backend='cuda': {without_cuda}")
    if backend == "triton" or (backend == "auto" and device != "cpu"):
        if triton_lacks:
            also = f"; {without_cuda}" if without_cuda else ""
            raise NotImplementedError(f"{op}: {triton_lacks}{also}; supported on the CPU: reference, cpu")
        if device not in TRITON_DEVICES:
            raise NotImplementedError(
                f"{op}: the Triton kernels need tensors on a GPU, got {t.device}; move them there (supported on the "
                "CPU: reference, cpu)"
            )
        if importlib.util.find_spec("triton") is None:
            raise NotImplementedError(
                f"{op}: tensors on {t.device} need Triton, which is not installed (pip install triton)"
                f"{f', because {without_cuda}' if without_cuda else ''}; without it supported are tensors on the CPU"
            )
        record(op, "triton")
        return "triton"
    if device != "cpu":
        raise NotImplementedError(f"{op}: backend={backend!r} needs CPU tensors, got {t.device}; move them there")
    return "cpu"


def _without_cuda(t: Tensor) -> str:
    """Why the CUDA extension does not serve ``t``; empty if it does."""
    if t.device.type not in CUDA_DEVICES:
        return f"the CUDA kernels need tensors on a GPU, got {t.device}; move them there (on the CPU: reference, cpu)"
    return importlib.import_module("tilewright.cuda_kernels").missing(t.device)


def twin(server: str, module: str) -> ModuleType:
    """Where `served_by`'s "cuda" and "triton" have the op of this module; imported on first use, with triton."""
    return importlib.import_module("tilewright." + ("cuda_kernels" if server == "cuda" else f"triton_kernels.{module}"))


def contiguous_last(t: Tensor) -> Tensor:
    """``t`` itself if its last dimension is contiguous, else a contiguous copy: kernels never copy."""
    if t.dim() and t.stride(-1) == 1:
        return t
    return t if t.dim() == 0 or t.shape[-1] <= 1 else t.contiguous()
