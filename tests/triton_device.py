"""Runs the launchers of `tilewright.triton_kernels` without a GPU: import this before any of them.

In a process with TRITON_INTERPRET=1 they run in Triton's own interpreter, whose bfloat16 is wrong. Otherwise a launch
compiles for sm_80, and the PTX that Triton emitted runs in tests/ptx, with its checks. Either way public functions
called inside `running` with ``backend="triton"`` take CPU tensors. With TILEWRIGHT_TRITON_SWEEP=1 tests run all of
their cases, else a choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
SWEEP = os.environ.get("TILEWRIGHT_TRITON_SWEEP", "") == "1"
triton = pytest.importorskip("triton", reason="NO TRITON: Triton kernels are not compiled and not run")

from tilewright.ops import registry  # noqa: E402

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

    from tilewright.bench.triton_compile import Launch, launches

# What Triton's interpreter computes rightly, or what the kernels take.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)


class Device:
    """Where launches go inside `running`. ``reports``: what the PTX interpreter saw, by the hash of what was compiled;
    ``kernels``: what it ran."""

    def __init__(self, seed: int = 0) -> None:
        self.reports: dict[str, Report] = {}
        self.kernels: dict[str, object] = {}
        self.seed = seed  # of the interpreter's schedule

    def launch(self, launch: Launch) -> None:
        compiled = launch.compiled()
        key = compiled.metadata.hash
        if key not in self.kernels:
            self.kernels[key] = Module(compiled.asm["ptx"]).kernel(compiled.metadata.name)
        kernel = self.kernels[key]
        values = list(_leaves(compiled.src.signature, launch.arguments))
        values += [None] * (len(kernel.params) - len(values))  # Triton's two scratch pointers
        block, shared = (32 * compiled.metadata.num_warps,), compiled.metadata.shared
        report = kernel.launch((launch.programs,), block, values, shared=shared, seed=self.seed)
        self.reports[key] = self.reports[key].merge(report) if key in self.reports else report


_devices = [Device()]  # its compiled kernels last for the whole run


@contextmanager
def using(device: Device) -> Iterator[Device]:
    """Inside, `running` uses this device."""
    _devices.append(device)
    try:
        yield device
    finally:
        _devices.pop()


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
def running(device: Device | None = None, choice: int = 0) -> Iterator[Device]:
    """Inside, ``backend="triton"`` takes CPU tensors and runs on ``device``, or else on what `using` named, each kernel
    in the configuration with the number ``choice`` (or the last). torch.empty gives NaN, so that nothing relies on old
    contents."""
    device = device or _devices[-1]
    registry.TRITON_DEVICES.add("cpu")
    torch.use_deterministic_algorithms(True)
    try:
        if INTERPRETED:
            yield device
            return
        with launches("sm_80", choice, device.launch):
            yield device
    finally:
        torch.use_deterministic_algorithms(False)
        registry.TRITON_DEVICES.discard("cpu")
