"""What this machine can do at most: bytes read and operations a second, by thread count.

Measured, not looked up: the best of ten runs of csrc/cpu/kernels/ceilings.cpp at the ISA level in use.
`python -m bench.ceilings` prints them for 1, 2, ... n threads.
"""

from __future__ import annotations

import functools
import sys

import torch

from tilewright import _C

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
