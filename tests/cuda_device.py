"""The module tilewright._cuda without a GPU: its bindings and launchers as they are, kernels on the PTX interpreter.

`module()` compiles csrc/cuda once (what changed since the last time) against the stand-in for the CUDA runtime. Its
functions take CPU tensors and remember what they launched.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch
from ptx import Instruction, PtxFault, Report
from ptx.compilers import NVCC_FLAGS, cuda_include
from ptx.library import BUILD, load
from ptx.runtime import HostLibrary, Launch

CSRC = Path(__file__).parent.parent / "csrc"
SWEEP = os.environ.get("TILEWRIGHT_CUDA_SWEEP", "") == "1"
PTX_ONLY = ("-gencode=arch=compute_80,code=compute_80", "--compress-mode=none", "-Xcompiler=-fPIC", "-I", str(CSRC))


@functools.cache
def _included(source: Path) -> frozenset[Path]:
    """The source and the project's headers that it includes, directly or not."""
    found = {source}
    for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE):
        path = next(p for p in (source.parent / name, CSRC / name) if p.exists())
        found |= _included(path.resolve())
    return frozenset(found)


def _compiled(source: Path) -> Path:
    """The object of a source, compiled if these sources were not compiled before."""
    if source.suffix == ".cu":
        command = ["nvcc", *NVCC_FLAGS, *PTX_ONLY]
    else:
        include = ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include"), "-I", str(cuda_include())]
        built_for = ['-DTILEWRIGHT_CUDA_BUILT_FOR="80"']
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-I", str(CSRC), *include, *built_for]
        if shutil.which("ccache"):
            command.insert(0, "ccache")
    read = b"".join(path.read_bytes() for path in sorted(_included(source)))
    digest = hashlib.sha256(" ".join(command).encode() + read).hexdigest()[:16]
    target = BUILD / "cuda" / f"{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-c", str(source), "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} {source}\n{done.stdout}{done.stderr}")
        fresh.rename(target)
    return target


def build() -> Path:
    """The extension as a shared library, without a CUDA runtime in it."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "cuda").glob("*.cpp")), CSRC / "torch_tensor.cpp"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(_compiled, sources))
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = BUILD / "cuda" / digest / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", "-o", str(fresh), *map(str, objects)], check=True)
        fresh.rename(library)
    return library


DEVICE, STREAM = 1, 0x5EED  # not the current ones


class Interpreted:
    """The functions of tilewright._cuda for CPU tensors. Those that launch are called without device and stream: they
    must launch on DEVICE and STREAM, and leave the device that was current."""

    def __init__(self) -> None:
        load()
        path = build()
        self.host = HostLibrary(path)
        loader = importlib.machinery.ExtensionFileLoader("tilewright._cuda", str(path))
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader("tilewright._cuda", loader))
        loader.exec_module(self.module)
        self.module.use_device_type(1)
        self.launches: list[Launch] = []
        self.options: dict[str, object] = {}

    def __getattr__(self, name: str) -> Callable[..., list[Launch]]:
        function = getattr(self.module, name)

        def call(*args: object) -> list[Launch]:
            # As inside a captured CUDA graph: allocation and synchronisation fail.
            options = {"capturing": True, **self.options}
            with self.host.running([a for a in args if isinstance(a, torch.Tensor)], **options) as launches:
                function(DEVICE, STREAM, *args)
            assert {(launch.device, launch.stream) for launch in launches} <= {(DEVICE, STREAM)}, name
            assert load().ptx_runtime_device() == 0, f"{name} left another device current"
            self.launches += launches
            return launches

        return call

    @contextmanager
    def watched(self, **options: object) -> Iterator[list[Launch]]:
        """Inside, launches run with these options of HostLibrary.running; the list holds them."""
        before, self.launches = self.launches, []
        kept, self.options = self.options, self.options | options
        try:
            yield self.launches
        finally:
            self.launches, self.options = before, kept


@functools.cache
def module() -> Interpreted:
    return Interpreted()


@contextmanager
def serving() -> Iterator[list[Launch]]:
    """Inside, public functions called with ``backend="cuda"`` take CPU tensors; torch.empty gives NaN, so that nothing
    relies on old contents."""
    from tilewright import cuda_kernels
    from tilewright.ops import registry

    changes = {
        "missing": lambda device: "",
        "extension": lambda: module().module,
        "launch": lambda name, *arguments: getattr(module(), name)(*arguments),
    }
    before = {name: getattr(cuda_kernels, name) for name in changes}
    registry.CUDA_DEVICES.add("cpu")
    torch.use_deterministic_algorithms(True)
    try:
        for name, change in changes.items():
            setattr(cuda_kernels, name, change)
        with module().watched() as launches:
            yield launches
    finally:
        for name, function in before.items():
            setattr(cuda_kernels, name, function)
        torch.use_deterministic_algorithms(False)
        registry.CUDA_DEVICES.discard("cpu")


def reports(launches: Sequence[Launch]) -> dict[str, Report]:
    """Reports by kernel, added up."""
    found: dict[str, Report] = {}
    for launch in launches:
        found[launch.kernel] = found[launch.kernel].merge(launch.report) if launch.kernel in found else launch.report
    return found


# Operations that tell ways through a line apart, unlike arithmetic with addresses.
_OF_ITS_OWN = r"(ld|st|cp|ldmatrix|mma|bar|barrier|atom|red|shfl|vote)\b(?!\.param)"


@functools.cache
def _own_line(source: str) -> str:
    """The last line of csrc/cuda of those that an instruction came from, "file:number: text"."""
    for place in source.split(","):
        file, _, number = place.strip().rpartition(":")
        path = CSRC / "cuda" / file.rpartition(" ")[2]
        if path.is_file():
            return f"{path.name}:{number}: {path.read_text().splitlines()[int(number) - 1].strip()}"
    return source


def unexecuted(launches: Sequence[Launch], *sources: str, merged: bool = False) -> list[str]:
    """Of csrc/cuda/<source>.cu: kernels that were not launched, and instructions that no warp executed. Branches are
    none: what they would jump over or to is looked at.

    ``merged``: it is enough that a line's instructions are executed in one of the kernels, each kind of access,
    barrier, shuffle and matrix product for itself: for templates with more features than each kernel is given.
    """
    found = reports(launches)
    wanted = [
        name.decode()
        for source in sources
        for name in re.findall(rb"\.entry (\w+)\(", _compiled(CSRC / "cuda" / f"{source}.cu").read_bytes())
    ]
    left = [f"{name}: never launched" for name in wanted if name not in found]
    times: dict[tuple[str, ...], int] = {}
    for name in set(wanted) & set(found):
        for i, n in zip(found[name].instructions, found[name].executed, strict=True):
            text = re.sub(r"^@!?%p\d+ ", "", i.text)
            if i.line and not text.startswith("bra"):
                operation = text.split()[0]
                kind = operation if re.match(_OF_ITS_OWN, operation) else ""
                key = (_own_line(i.source), kind) if merged else (_own_line(i.source), name, str(i))
                times[key] = times.get(key, 0) + n
    return left + [f"{line} [{' '.join(which)}]" for (line, *which), n in times.items() if n == 0]


def surviving_mutants(run: Callable[[], object]) -> dict[str, list[Instruction]]:
    """By kernel, the barriers and waits without which ``run`` still passes: it must raise AssertionError."""
    cuda = module()
    with cuda.watched() as launches:
        run()
    survivors: dict[str, list[Instruction]] = {}
    for name in dict.fromkeys(launch.kernel for launch in launches):
        kernel = cuda.host.kernel(name)
        for instruction in kernel.sync_instructions:
            with kernel.without(instruction):
                try:
                    run()
                except (AssertionError, PtxFault):
                    continue
            survivors.setdefault(name, []).append(instruction)
    return survivors
