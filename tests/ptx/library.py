"""Builds the interpreter once and declares its C interface (capi.cpp, cudart.cpp)."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "ptx"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wall", "-Wextra"]


class PtxError(RuntimeError):
    """PTX that cannot be parsed or executed, or a launch that a driver would refuse."""


class Options(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("max_warp_instructions", ctypes.c_uint64),
        ("resident", ctypes.c_int32),
        ("statistics", ctypes.c_int32),
    )


def _cpu_flags() -> list[str]:
    """Vector instructions of this machine; std::fma without -mfma is a slow call."""
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return ["-mavx2", "-mfma"] if {"avx2", "fma"} <= set(words) else []


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PtxError(f"{' '.join(command)}\n{done.stderr}")


def build() -> Path:
    """The shared library, compiled if these sources were not compiled before with these flags."""
    sources, headers = sorted(HERE.glob("*.cpp")), sorted(HERE.glob("*.h"))
    compiler = os.environ.get("CXX", "g++")
    flags = FLAGS + _cpu_flags()
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for path in sources + headers:
        digest.update(path.name.encode() + path.read_bytes())
    folder = BUILD / digest.hexdigest()[:16]
    library = folder / "libptx.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs may start at once
        if library.exists():
            return library
        compile_ = [*([shutil.which("ccache")] if shutil.which("ccache") else []), compiler, *flags, "-c"]
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda p: _run([*compile_, str(p[0]), "-o", str(p[1])]), zip(sources, objects, strict=True)))
        _run([compiler, "-shared", "-o", f"{library}.new", *map(str, objects)])
        os.rename(f"{library}.new", library)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """The library. Its symbols are global, so that host code linked without a CUDA runtime finds the stand-in."""
    lib = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    pointer, text, i64, u64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_uint64
    sizes, options = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(Options)
    for name, result, arguments in (
        ("ptx_error", text, []),
        ("ptx_load", pointer, [text]),
        ("ptx_unload", None, [pointer]),
        ("ptx_kernels", text, [pointer]),
        ("ptx_symbol", i64, [pointer, text]),
        ("ptx_kernel", pointer, [pointer, text]),
        ("ptx_describe", text, [pointer]),
        ("ptx_delete", ctypes.c_int, [pointer, ctypes.c_uint32, ctypes.c_int]),
        ("ptx_launch", ctypes.c_int, [pointer, sizes, sizes, u64, text, u64, options]),
        ("ptx_report", text, [pointer]),
        ("ptx_memory_add", ctypes.c_int, [u64, u64, ctypes.c_int, text]),
        ("ptx_memory_remove", ctypes.c_int, [u64]),
        ("ptx_memory_undefined", i64, [u64, u64]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def checked(result: int | None) -> int:
    """The result of a call that says null or -1 when it failed."""
    if result is None or result == -1:
        raise PtxError(load().ptx_error().decode())
    return result
