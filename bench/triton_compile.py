"""Compiles what a launcher of `tilewright.triton_kernels` launches, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import triton
from triton import knobs
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from tilewright.triton_kernels import launch

# name: what Triton calls it, bytes of shared memory that a program may use
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101_376),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:  # the key of a kernel's cache
        return self.target

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch in one configuration: what the launcher passed, and how many programs it asked for."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict
    options: dict
    target: str

    def compiled(self) -> CompiledKernel:
        """The kernel, specialised for the arguments as on a GPU, without machine code: `resources` assembles it."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(driver, "_active", _Driver(TARGETS[self.target][0])))
            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = str(Path(knobs.cache.dir) / "assembly")  # apart: these are no use to a GPU
            stack.enter_context(patch.object(CUDABackend, "make_cubin", lambda *_: b""))
            stack.enter_context(patch.object(HIPBackend, "make_hsaco", lambda *_: b""))
            return self.kernel.warmup(grid=(1,), **self.arguments, **self.options)

    def blocks(self) -> dict[str, int]:
        """The sizes that the configuration chose, or the launcher for it."""
        return {n: v for n, v in self.arguments.items() if n.startswith("BLOCK") or n in _SIZES}


_SIZES = ("ROWS", "COLUMNS", "HEADS", "SPLITS")


@contextmanager
def launches(
    target: str, choice: int | None = 0, run: Callable[[Launch], None] | None = None
) -> Iterator[list[Launch]]:
    """Inside, what launchers launch goes to the list, and to ``run``, instead of to a GPU: as ``target`` would get it,
    in the configuration with the number ``choice``, or the last if there are not so many, or (None) in every one."""
    limit = TARGETS[target][1]
    found: list[Launch] = []

    def note(kernel, grid, arguments, configs, key, options) -> None:
        for config in configs if choice is None else [configs[min(choice, len(configs) - 1)]]:
            chosen = arguments | config.kwargs
            programs = grid(chosen) if callable(grid) else grid
            size = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            if config.maxnreg and TARGETS[target][0].backend == "cuda":
                size["maxnreg"] = config.maxnreg
            found.append(Launch(kernel, programs[0], chosen, options | size, target))
            if run is not None:
                run(found[-1])

    before = launch.start, launch.shared_limit
    launch.start, launch.shared_limit = note, lambda device: limit
    try:
        yield found
    finally:
        launch.start, launch.shared_limit = before


def resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers a thread, spilled bytes, shared memory and warps of a compiled kernel: ptxas's report for NVIDIA's,
    the notes in the assembly for AMD's."""
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            match = re.search(rf"\.{name}:\s+(\d+)", text)
            if match is None:
                raise RuntimeError(f"{compiled.metadata.name}: the assembly has no .{name}")
            return int(match[1])

        found["registers"] = number("vgpr_count")
        found["spilled"] = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        return found
    arch = compiled.metadata.target.arch
    tool = knobs.nvidia.ptxas if arch < 90 else knobs.nvidia.ptxas_blackwell
    options = ["-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"]
    if not compiled.metadata.enable_fp_fusion:
        options.append("--fmad=false")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        report = subprocess.run(
            [tool.path, *options, str(source), "-o", str(source.with_suffix(".cubin"))],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    found["registers"] = int(re.search(r"Used (\d+) registers", report)[1])
    found["spilled"] = int(stores) + int(loads)
    return found
