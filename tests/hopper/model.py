"""Compiles the kernels for sm_90a with g++ against model.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from pathlib import Path

from ptx.compilers import cuda_include

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
BUILD = HERE.parent.parent / "build" / "hopper"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing"]
_FUNCTION = re.compile(r"^(?:template <.*>\n)?__device__ [^{;]*\{(?:.*\}\n|\n[\s\S]*?^\}\n)", re.MULTILINE)


def rewritten(source: str) -> str:
    """CUDA as g++ takes it: functions of inline PTX are left to the model, as are launches and shared memory."""
    source = _FUNCTION.sub(lambda found: "" if re.search(r"\basm\b", found[0]) else found[0], source)
    source = re.sub(r"(\w+)<<<(.*), stream>>>\((.*)\);", r"model::launch(\2, [=] { \1(\3); });", source)
    return source.replace("extern __shared__ uint8_t memory[];", "uint8_t* const memory = model::shared_memory();")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The library of ``name``.cpp, compiled if these sources were not compiled before."""
    sources = sorted([*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), CUDA / f"{name}_wgmma.cu"])
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [*sources, HERE / f"{name}.cpp", HERE / "model.h", HERE / "model.py"]:
        digest.update(path.read_bytes())
    folder = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    target = folder / "kernel.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in sources:
            (folder / path.name).write_text(rewritten(path.read_text()))
        fresh = folder / f"kernel.{os.getpid()}"
        command = [os.environ.get("CXX", "g++"), *FLAGS, "-I", str(folder), "-isystem", str(cuda_include())]
        command += ["-include", str(HERE / "model.h"), str(HERE / f"{name}.cpp"), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        fresh.rename(target)
    found = ctypes.CDLL(str(target))
    found.hopper_fault.restype = ctypes.c_char_p
    return found


def lines(of: ctypes.CDLL) -> list[int]:
    """The kernel's lines that waited or arrived since hopper_options."""
    numbers = (ctypes.c_int * 100)()
    return numbers[: of.hopper_lines(numbers, 100)]
