"""What the library runs on: ISA level, threads, versions, and which implementation served an op."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import torch

from tilewright import _C
from tilewright._version import __version__


def isa() -> str:
    """The ISA level in use: the strongest that the machine has, or what TILEWRIGHT_ISA lowered it to."""
    return _C.isa()


def last_impl(op: str) -> str | None:
    """The implementation that last served ``op`` ("attention", "quantized_linear", ...): an ISA level,
    "reference", "cuda" or "triton"; None before its first call."""
    return _C.last_impl(op)


def set_num_threads(n: int) -> None:
    """Use ``n`` >= 1 threads from now on, instead of following ``torch.set_num_threads``."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= 1024:
        raise ValueError(f"set_num_threads: n must be a whole number from 1 to 1024, got {n!r}")
    _C.set_num_threads(n)


def get_num_threads() -> int:
    """Threads that an op may use: what `set_num_threads` or TILEWRIGHT_NUM_THREADS said, else torch's number
    bounded by the cores and the cgroup quota of this process."""
    return _C.get_num_threads()


def info() -> dict[str, object]:
    """CPU, ISA levels found and used, threads, CUDA and Triton, versions."""
    return {
        "tilewright": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "isa_found": [_described(level) for level in _C.isa_found()],
        "isa": _described(_C.isa()),
        "cpus_usable": _C.usable_cpus(),
        "threads": _C.get_num_threads(),
        "cuda": _cuda(),
        "triton": _triton(),
        "dlpack_c_exchange": _C.uses_dlpack(),
    }


def _cuda() -> str:
    """The architectures that the CUDA extension was built for."""
    found = importlib.import_module("tilewright.cuda_kernels").extension()
    return "not built" if found is None else f"built for {found.built_for()}"


def _triton() -> str:
    """Its version, without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _described(level: str) -> str:
    return "amx (emulated)" if level == "amx" and _C.amx_is_emulated() else level


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
