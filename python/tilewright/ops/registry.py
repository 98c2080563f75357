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
# Where Triton's kernels run: torch calls AMD's GPUs "cuda" too.
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
    _library.impl(name, kernel if on_gpu else nowhere, "CUDA")
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"tilewright::{name}", backward, setup_context=setup_context, lib=_library)


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


def record_reference(op: str) -> None:
    """Note for `last_impl` that the reference served ``op``."""
    if not torch.compiler.is_compiling():
        _C.record(op, "reference")


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


def served_by(op: str, backend: str, t: Tensor) -> str:
    """What serves a call with ``t``: "cpu", "triton", or "reference", which has all of float64. Raises
    NotImplementedError where nothing does, or not what ``backend`` names."""
    if backend == "reference" or t.dtype is torch.float64:
        return "reference"
    if backend == "auto" and t.is_cpu:
        return "cpu"
    device = t.device.type
    if backend == "cuda":
        raise NotImplementedError(f"{op}: backend='cuda' is not built; supported: reference, cpu, triton")
    if backend == "triton" or (backend == "auto" and device != "cpu"):
        if device not in TRITON_DEVICES:
            raise NotImplementedError(
                f"{op}: the Triton kernels need tensors on a GPU, got {t.device}; move them there (supported on the "
                "CPU: reference, cpu)"
            )
        if importlib.util.find_spec("triton") is None:
            raise NotImplementedError(
                f"{op}: tensors on {t.device} need Triton, which is not installed (pip install triton); without it "
                "supported are tensors on the CPU"
            )
        if not torch.compiler.is_compiling():
            _C.record(op, "triton")
        return "triton"
    if device != "cpu":
        raise NotImplementedError(f"{op}: backend={backend!r} needs CPU tensors, got {t.device}; move them there")
    return "cpu"


def twin(module: str) -> ModuleType:
    """A module of `tilewright.triton_kernels`, imported on first use: it imports triton."""
    return importlib.import_module(f"tilewright.triton_kernels.{module}")


def contiguous_last(t: Tensor) -> Tensor:
    """``t`` itself if its last dimension is contiguous, else a contiguous copy: kernels never copy."""
    if t.dim() and t.stride(-1) == 1:
        return t
    return t if t.dim() == 0 or t.shape[-1] <= 1 else t.contiguous()
