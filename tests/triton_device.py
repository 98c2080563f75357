"""Runs the launchers of `tilewright.triton_kernels` without a GPU.

In a process with TRITON_INTERPRET=1 they run in Triton's own interpreter, whose bfloat16 is wrong. Otherwise a launch
compiles for sm_80, and the PTX that Triton emitted runs in tests/ptx, with its checks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "triton"))
triton = pytest.importorskip("triton", reason="NO TRITON: Triton kernels are not compiled and not run")

if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

    _splat = InterpreterBuilder.create_splat

    def _create_splat(self, ret_ty, arg):
        """Broadcasting the result of a scalar comparison makes int64 of it; masks must stay boolean."""
        result = _splat(self, ret_ty, arg)
        if arg.data.dtype == bool:
            result.data = result.data.astype(bool)
        return result

    InterpreterBuilder.create_splat = _create_splat
else:
    from ptx import Module, Report

    from tilewright.bench.triton_compile import compiling

# What bfloat16 is not asked of: Triton's interpreter.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)


class Device:
    """Where launches go inside `running`. ``reports``: what the PTX interpreter saw, by kernel and its hash."""

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}
        self.kernels: dict[str, object] = {}
        self.seed = 0  # of the interpreter's schedule

    def launch(self, compiled, programs: int, arguments: dict) -> None:
        key = compiled.metadata.hash
        if key not in self.kernels:
            self.kernels[key] = Module(compiled.asm["ptx"]).kernel(compiled.metadata.name)
        kernel = self.kernels[key]
        values = list(_leaves(compiled.src.signature, arguments))
        values += [None] * (len(kernel.params) - len(values))  # Triton's two scratch pointers
        report = kernel.launch(
            (programs,), (32 * compiled.metadata.num_warps,), values, shared=compiled.metadata.shared, seed=self.seed
        )
        self.reports[key] = self.reports[key].merge(report) if key in self.reports else report


def _leaves(types: object, values: object) -> Iterator[object]:
    """What a kernel is passed: the arguments that are no constants, tuples taken apart."""
    if isinstance(types, dict):
        for name, kind in types.items():
            yield from _leaves(kind, values.get(name))
    elif isinstance(types, tuple):
        for kind, value in zip(types, values, strict=True):
            yield from _leaves(kind, value)
    elif types != "constexpr":
        yield values


@contextmanager
def running(device: Device) -> Iterator[Device]:
    """Inside, a launch on CPU tensors runs."""
    if INTERPRETED:
        yield device
        return
    with compiling("sm_80", run=device.launch):
        yield device
