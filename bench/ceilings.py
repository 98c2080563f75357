"""What this machine can do at most: bytes moved and operations a second, by thread count or of a GPU.

Measured, not looked up: the best of ten runs of csrc/cpu/kernels/ceilings.cpp at the ISA level in use; on a GPU of
torch's copy and of its vendor's matrix products. `python -m bench.ceilings` prints them for 1, 2, ... n threads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewright import _C

from .harness import EventTimer
from .machine import threads

UNITS = ("fp32", "bf16", "int8")
MEMORY = 512 << 20  # bytes; sixteen times the largest L3 that a desktop or a slice of a server has
_BEST_OF = 10
_ITERATIONS = 3_000_000  # of 12 instructions that issue two a cycle: 5 to 10 ms


@functools.cache
def peak(unit: str, n_threads: int) -> float:
    """Operations a second of `unit`, one of UNITS; a multiply-add counts two."""
    with threads(n_threads):
        return max(_C.ceiling(unit, None, _ITERATIONS) for _ in range(_BEST_OF))


def read(n_threads: int, nbytes: int = MEMORY) -> float:
    """Bytes read a second, over and over, from a buffer of about `nbytes`: from memory, or from the cache that it
    fits into. Measured at four sizes per octave between 64 KiB and 512 MiB, the next larger one of them."""
    step = 1 << max(nbytes.bit_length() - 3, 14)
    return _read(n_threads, min(max(-(-nbytes // step) * step, 1 << 16), MEMORY))


@functools.cache
def _read(n_threads: int, size: int) -> float:
    with threads(n_threads):
        # Written to, because untouched zeros are one page that stays in L1.
        data = torch.full((size,), 1, dtype=torch.uint8)
        passes = max(1, MEMORY // 2 // size)
        return max(_C.ceiling("read", data, passes) for _ in range(_BEST_OF))


@dataclass(frozen=True)
class Cpu:
    """The ceilings that CPU kernels are held against."""

    n_threads: int
    memory = "read"  # what `bandwidth` counts

    @property
    def name(self) -> str:
        return str(self.n_threads)

    def bandwidth(self, nbytes: int = MEMORY) -> float:
        """As `read`."""
        return read(self.n_threads, nbytes)

    def peak(self, unit: str) -> float:
        """As `peak`."""
        return peak(unit, self.n_threads)


_SIDE = 8192  # of square matrices: bfloat16 ones take some ms, longer than a launch by far
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class Gpu:
    """The ceilings that kernels on one GPU are held against, for work in the current stream."""

    memory = "copy"

    def __init__(
        self, device: torch.device, timer: EventTimer, *, side: int = _SIDE, memory_bytes: int = MEMORY
    ) -> None:
        self.name, self._device, self._timer = str(device), device, timer
        self._side, self._memory_bytes = side, memory_bytes
        self._cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._found: dict[str | int, float] = {}

    def bandwidth(self, nbytes: int = MEMORY) -> float:
        """Bytes read and written a second by a copy within ``nbytes``, over and over: half of the L2 cache stands for
        all that fits into that, half a gigabyte for all else."""
        size = self._cache_bytes // 2 if nbytes <= self._cache_bytes // 2 else self._memory_bytes
        if size not in self._found:
            source, target = torch.ones(2, size // 2, dtype=torch.uint8, device=self._device)
            passes = max(1, self._memory_bytes // size)
            self._found[size] = 2 * source.nbytes * self._rate(lambda: target.copy_(source), passes)
        return self._found[size]

    def peak(self, unit: str) -> float:
        """Operations a second of a large matrix product; fp32 is not rounded to TF32."""
        if unit not in self._found:
            a, b = torch.randn(2, self._side, self._side, device=self._device).to(_DTYPES[unit])
            product = (lambda: torch._int_mm(a, b.t())) if unit == "int8" else (lambda: a @ b.t())
            self._found[unit] = 2 * self._side**3 * self._rate(product, 1)
        return self._found[unit]

    def _rate(self, call: Callable[[], object], passes: int) -> float:
        """Calls a second: the best of ten."""

        def calls() -> None:
            for _ in range(passes):
                call()

        calls()
        return passes / min(self._timer.seconds(calls) for _ in range(_BEST_OF))


Ceilings = Cpu | Gpu


def main() -> int:
    """Print the table."""
    cores = _C.usable_cpus()
    print(f"isa {_C.isa()}")
    print(f"{'threads':>7} {'read GB/s':>10}" + "".join(f"{unit + ' Gop/s':>13}" for unit in UNITS))
    for n in range(1, cores + 1):
        rates = "".join(f"{peak(unit, n) / 1e9:13.0f}" for unit in UNITS)
        print(f"{n:7} {read(n) / 1e9:10.1f}{rates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
