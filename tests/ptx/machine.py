"""Executes PTX kernels on the CPU and reports what they did wrong: docs/ptx_interpreter.md.

module = Module(ptx_text)
report = module.kernel("softmax").launch(grid=(4,), block=(128,), args=[x, out, 4, 1000])
"""

from __future__ import annotations

import ctypes
import json
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np

from .library import Options, PtxError, checked, load

MAX_WARP_INSTRUCTIONS = 50_000_000


class PtxFault(AssertionError):
    """A kernel did something wrong. The report has the details."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"{report.kernel}:\n" + "\n".join(f"  {finding}" for finding in report.findings))
        self.report = report


@dataclass(frozen=True)
class Instruction:
    pc: int
    line: int  # in the PTX
    text: str
    source: str  # "file.cu:12", "" where the PTX names none
    function: str
    is_sync: bool  # orders memory: bar.sync, bar.warp.sync, cp.async.wait_*, fences

    def __str__(self) -> str:
        return f"{self.text} (PTX line {self.line}{', ' + self.source if self.source else ''})"


@dataclass(frozen=True)
class Finding:
    kind: str  # "out of bounds", "shared race", ...
    message: str
    instruction: Instruction
    block: tuple[int, int, int]
    warp: int
    lanes: int  # a bit for each
    times: int

    def __str__(self) -> str:
        lanes = [lane for lane in range(32) if self.lanes >> lane & 1]
        who = f"block {self.block}, warp {self.warp}, lanes {lanes[0]}..{lanes[-1]}" if lanes else f"block {self.block}"
        return f"{self.kind} at {self.instruction}: {self.message} [{who}; {self.times} times]"


@dataclass(frozen=True)
class Traffic:
    """Requests of one memory instruction, added up over warps."""

    instruction: Instruction
    requests: int
    wavefronts: int  # passes over shared memory's banks
    ideal_wavefronts: int
    sectors: int  # pieces of 32 bytes of global memory
    ideal_sectors: int

    @property
    def bank_ways(self) -> float:
        """How many times the passes that the bytes would need: 1 is free of conflicts, 0 is not shared memory."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 0.0

    @property
    def sector_ratio(self) -> float:
        """How many times the sectors that the bytes would need; 0 is not global memory."""
        return self.sectors / self.ideal_sectors if self.ideal_sectors else 0.0


@dataclass
class Report:
    kernel: str
    instructions: list[Instruction]
    findings: list[Finding] = field(default_factory=list)
    executed: list[int] = field(default_factory=list)  # warps that executed each instruction
    traffic: list[Traffic] = field(default_factory=list)
    warp_instructions: int = 0

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def check(self) -> Report:
        """Raise PtxFault if anything was found."""
        if self.findings:
            raise PtxFault(self)
        return self

    def never_executed(self) -> list[Instruction]:
        return [i for i, n in zip(self.instructions, self.executed, strict=True) if n == 0 and i.line]

    def merge(self, other: Report) -> Report:
        """Add the counts and findings of another launch of the same kernel."""
        if other.instructions != self.instructions:
            raise ValueError(f"reports of {self.kernel} and {other.kernel}: expected two launches of one kernel")
        self.findings += other.findings
        self.executed = [a + b for a, b in zip(self.executed, other.executed, strict=True)]
        self.warp_instructions += other.warp_instructions
        both: dict[int, list[int]] = {}
        for t in self.traffic + other.traffic:
            counts = [t.requests, t.wavefronts, t.ideal_wavefronts, t.sectors, t.ideal_sectors]
            both[t.instruction.pc] = [a + b for a, b in zip(both.get(t.instruction.pc, [0] * 5), counts, strict=True)]
        self.traffic = [Traffic(self.instructions[pc], *counts) for pc, counts in sorted(both.items())]
        return self


def parse_report(kernel: str, instructions: list[Instruction], text: bytes) -> Report:
    raw = json.loads(text)
    findings = [
        Finding(f["kind"], f["message"], instructions[f["pc"]], tuple(f["block"]), f["warp"], f["lanes"], f["times"])
        for f in raw["findings"]
    ]
    traffic = [Traffic(instructions[pc], *counts) for pc, *counts in raw["traffic"]]
    return Report(kernel, instructions, findings, raw["executed"], traffic, raw["warp_instructions"])


def extent(array: object) -> tuple[int, int]:
    """First byte and end of a numpy array's or CPU tensor's elements, whatever the strides."""
    if isinstance(array, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(array)
        return low, high if array.size else low
    if array.device.type != "cpu":
        raise ValueError(f"expected a CPU tensor, got one on {array.device}")
    last = sum((n - 1) * stride for n, stride in zip(array.shape, array.stride(), strict=True))
    return array.data_ptr(), array.data_ptr() + (last + 1 if array.numel() else 0) * array.element_size()


def is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) or (hasattr(value, "data_ptr") and hasattr(value, "untyped_storage"))


_registered: dict[tuple[int, int], int] = {}


def _forget(begin: int, end: int) -> None:
    _registered[begin, end] -= 1
    if not _registered[begin, end]:
        del _registered[begin, end]
        load().ptx_memory_remove(begin)


def on_device(array: object, *, defined: bool = True, name: str = "") -> object:
    """Make an array's memory the device's for as long as it lives, and return it.

    With ``defined=False`` its contents may be written and not read: reading them before is undefined data.
    """
    begin, end = extent(array)
    if any(b < end and begin < e and (b, e) != (begin, end) for b, e in _registered):
        raise ValueError("expected memory of its own, got a part of memory that is on the device, or more than it")
    checked(load().ptx_memory_add(begin, end - begin, defined, (name or f"array {tuple(array.shape)}").encode()))
    _registered[begin, end] = _registered.get((begin, end), 0) + 1
    weakref.finalize(array, _forget, begin, end)
    return array


def empty(shape: int | tuple[int, ...], dtype: object) -> np.ndarray:
    """A numpy array in the device's memory whose contents are undefined."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xCD)
    return on_device(array, defined=False)


def undefined_bytes(array: object) -> int:
    """How many bytes of an array hold undefined data."""
    begin, end = extent(array)
    return checked(load().ptx_memory_undefined(begin, end - begin))


@contextmanager
def _launch_memory(arrays: list[object]) -> Iterator[None]:
    """Arrays that are not on the device yet are there, defined, for one launch. Overlapping ones become one piece."""
    spans = sorted({extent(a) for a in arrays} - set(_registered))
    merged: list[list[int]] = []
    for begin, end in spans:
        if any(b <= begin and end <= e for b, e in _registered):
            continue
        if any(b < end and begin < e for b, e in _registered):
            raise ValueError("an argument reaches beyond the memory that on_device was given")
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        elif end > begin:
            merged.append([begin, end])
    with ExitStack() as stack:
        for n, (begin, end) in enumerate(merged):
            checked(load().ptx_memory_add(begin, end - begin, True, f"argument memory {n}".encode()))
            stack.callback(load().ptx_memory_remove, begin)
        yield


class Kernel:
    """A kernel of a module, decoded. Raises PtxError if it holds an instruction that is not supported."""

    def __init__(self, handle: int, keep: object) -> None:
        self._handle, self._keep = handle, keep
        text = load().ptx_describe(handle)
        checked(None if text is None else 0)
        raw = json.loads(text)
        self.name: str = raw["name"]
        self.params: list[tuple[int, int]] = [tuple(p) for p in raw["params"]]  # (offset, bytes)
        self.static_shared: int = raw["static_shared"]
        self.instructions = [Instruction(pc, *rest) for pc, rest in enumerate(raw["instructions"])]
        self._param_bytes: int = raw["param_bytes"]

    @property
    def sync_instructions(self) -> list[Instruction]:
        return [i for i in self.instructions if i.is_sync]

    def find(self, text: str) -> list[Instruction]:
        """The instructions whose text contains ``text``."""
        return [i for i in self.instructions if text in i.text]

    @contextmanager
    def without(self, instruction: Instruction) -> Iterator[None]:
        """Launches inside the block execute nothing in the place of this instruction."""
        checked(load().ptx_delete(self._handle, instruction.pc, True))
        try:
            yield
        finally:
            checked(load().ptx_delete(self._handle, instruction.pc, False))

    def _pack(self, args: Sequence[object]) -> bytes:
        if len(args) != len(self.params):
            raise ValueError(f"{self.name}: expected {len(self.params)} arguments, got {len(args)}")
        out = bytearray(self._param_bytes)
        for n, (value, (at, size)) in enumerate(zip(args, self.params, strict=True)):
            if is_array(value):
                bits = struct.pack("<Q", extent(value)[0] if isinstance(value, np.ndarray) else value.data_ptr())
            elif value is None:
                bits = bytes(size)
            elif isinstance(value, bytes):
                bits = value
            elif isinstance(value, np.generic):
                bits = value.tobytes()
            elif isinstance(value, float):
                bits = struct.pack({4: "<f", 8: "<d"}[size], value)
            else:
                bits = int(value).to_bytes(size, "little", signed=int(value) < 0)
            if len(bits) != size:
                raise ValueError(f"{self.name}: argument {n} has {len(bits)} bytes, expected {size}")
            out[at : at + size] = bits
        return bytes(out)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[object],
        *,
        shared: int = 0,
        seed: int = 0,
        resident: int = 1,
        max_warp_instructions: int = MAX_WARP_INSTRUCTIONS,
        statistics: bool = True,
        check: bool = True,
    ) -> Report:
        """Execute the kernel.

        Args:
            grid, block: up to three sizes each.
            args: numpy arrays and CPU tensors (their memory is the device's memory), None, numbers in the size of
                the parameter, or bytes.
            shared: bytes of dynamic shared memory.
            seed: 0 runs each warp until it must wait; another number interleaves warps, and blocks, at random.
            resident: blocks that run at a time, for kernels whose blocks wait for each other.
            check: raise PtxFault if anything was found.
        Raises:
            PtxError: what a driver would refuse.
            PtxFault: what the checks found.
        """
        sizes = [(ctypes.c_uint32 * 3)(*[*size, 1, 1][:3]) for size in (grid, block)]
        params = self._pack(args)
        options = Options(seed, max_warp_instructions, resident, statistics)
        with _launch_memory([a for a in args if is_array(a)]):
            checked(load().ptx_launch(self._handle, *sizes, shared, params, len(params), ctypes.byref(options)))
        report = parse_report(self.name, self.instructions, load().ptx_report(self._handle))
        return report.check() if check else report


class Module:
    """PTX text, parsed. Its global variables are allocated and initialised."""

    def __init__(self, text: str) -> None:
        self._handle = checked(load().ptx_load(text.encode()))
        weakref.finalize(self, load().ptx_unload, self._handle)
        self.kernels: list[str] = json.loads(load().ptx_kernels(self._handle))

    def kernel(self, name: str | None = None) -> Kernel:
        """A kernel by its (mangled) name, or part of it; without a name, the module's only one."""
        found = [k for k in self.kernels if name is None or k == name] or [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise PtxError(f"expected one kernel named {name!r}, got {found} of {self.kernels}")
        return Kernel(checked(load().ptx_kernel(self._handle, found[0].encode())), self)

    def symbol(self, name: str) -> int:
        """The address of a global variable."""
        return checked(load().ptx_symbol(self._handle, name.encode()))
