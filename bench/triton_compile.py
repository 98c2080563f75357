"""Compiles what a launcher of `tilewright.triton_kernels` launches, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
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


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel compiled as the launcher's arguments and options specialise it."""

    compiled: CompiledKernel
    programs: int
    arguments: dict


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


@contextmanager
def compiling(
    target: str, every: bool = False, run: Callable[[CompiledKernel, int, dict], None] | None = None
) -> Iterator[list[Launch]]:
    """Inside, a launch compiles its kernel for ``target``, in its first configuration or in ``every`` one, and adds a
    `Launch` to the list. ``run`` is then called with the kernel, the number of programs and the arguments."""
    gpu, limit = TARGETS[target]
    found: list[Launch] = []

    def compile_only(kernel, grid, arguments, configs, key, options) -> None:
        for config in configs if every else configs[:1]:
            chosen = arguments | config.all_kwargs()
            compiled = kernel.warmup(grid=(1,), **chosen, **options)
            programs = grid(chosen) if callable(grid) else grid
            found.append(Launch(compiled, programs[0], chosen))
            if run is not None:
                run(compiled, programs[0], chosen)

    before = launch.start, launch.shared_limit, driver._active
    launch.start, launch.shared_limit = compile_only, lambda device: limit
    driver.set_active(_Driver(gpu))
    try:
        yield found
    finally:
        launch.start, launch.shared_limit, driver._active = before


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


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


__all__ = ["TARGETS", "Launch", "compiling", "describe", "resources", "triton"]
