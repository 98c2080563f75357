"""PTX from nvcc and from Triton, without a GPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from .library import BUILD, PtxError
from .machine import Module

NVCC_FLAGS = ("-O3", "-std=c++17", "-lineinfo")


def have_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="NO NVCC: CUDA kernels are not compiled and not run")


def cuda_include() -> Path:
    """Headers of the toolkit that nvcc belongs to."""
    done = subprocess.run(["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    for line in done.stderr.splitlines():
        if line.startswith("#$ INCLUDES="):
            return Path(line.split("-I", 1)[1].split('"')[0].strip())
    raise RuntimeError(f"nvcc names no include folder:\n{done.stderr}")


needs_triton = pytest.mark.skipif(not have_triton(), reason="NO TRITON: Triton kernels are not compiled and not run")


def _nvcc(sources: tuple[str | Path, ...], output: str, flags: tuple[str, ...]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nvcc-", dir=_scratch()))
    files = []
    for n, source in enumerate(sources):
        if isinstance(source, str):
            files.append(folder / f"kernel{n or ''}.cu")
            files[-1].write_text(source)
        else:
            files.append(source)
    command = ["nvcc", *flags, *map(str, files), "-o", str(folder / output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PtxError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return folder / output


@functools.cache
def _scratch() -> str:
    BUILD.mkdir(parents=True, exist_ok=True)
    holder = tempfile.TemporaryDirectory(prefix="compiled-", dir=BUILD)
    _scratch.holder = holder  # removed when the process ends
    return holder.name


@functools.cache
def nvcc_module(source: str | Path, flags: tuple[str, ...] = (), arch: str = "sm_80") -> Module:
    """The module that nvcc makes of a .cu file, or of CUDA source text."""
    return Module(_nvcc((source,), "kernel.ptx", (*NVCC_FLAGS, f"-arch={arch}", "-ptx", *flags)).read_text())


@functools.cache
def nvcc_library(*sources: str | Path, flags: tuple[str, ...] = (), arch: str = "sm_80") -> Path:
    """A shared library of .cu files (or texts): host code for the stand-in of the CUDA runtime, kernels inside."""
    link = ("-cudart", "none", "--compress-mode=none", "-Xcompiler", "-fPIC", "-shared")
    return _nvcc(sources, "libkernel.so", (*NVCC_FLAGS, f"-arch={arch}", *link, *flags))


@dataclass(frozen=True)
class TritonKernel:
    """A kernel that Triton compiled, and how to launch it."""

    module: Module
    name: str
    num_warps: int
    shared: int

    def launch(self, grid: tuple[int, ...], args: list[object], **options: object) -> object:
        """Args as for Kernel.launch, without constexprs; Triton's two scratch pointers are added."""
        kernel = self.module.kernel(self.name)
        args = [*args, *[None] * (len(kernel.params) - len(args))]
        return kernel.launch(grid, (32 * self.num_warps,), args, shared=self.shared, **options)


def triton_kernel(
    fn: Callable[..., None],
    signature: Mapping[str, str],
    constexprs: Mapping[str, object] | None = None,
    divisible: Collection[str] = (),
    **options: int,
) -> TritonKernel:
    """Compile a @triton.jit function for sm_80.

    Args:
        signature: the type of each argument that is no constexpr: "*bf16", "i32", "fp32".
        divisible: integers that are multiples of 16, as Triton finds out at a launch; pointers always are. A launch
            with another number then does what the compiled code does with it: expect misaligned accesses.
        options: num_warps, num_stages.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "triton"))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = dict(constexprs or {})
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    attrs = {
        (n,): [["tt.divisibility", 16]]
        for n, (name, t) in enumerate(types.items())
        if t.startswith("*") or name in divisible
    }
    source = ASTSource(fn=fn, signature=types, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True, **options})
    metadata = compiled.metadata
    return TritonKernel(Module(compiled.asm["ptx"]), metadata.name, metadata.num_warps, metadata.shared)
