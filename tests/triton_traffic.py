"""What the Triton kernels did on the PTX interpreter: instructions executed, matrix products, memory traffic.

PYTHONPATH=tests python -m triton_traffic    writes the part "executed" of bench/results/gpu_resources.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import test_triton_mutants
import torch
from gpu_attention import rand
from ptx import Report
from test_triton_mutants import backward
from triton_device import Device, using

from tilewright.bench.gpu_resources import write

ROOT = Path(__file__).parent.parent
FILE = ROOT / "bench" / "results" / "gpu_resources.json"
# mma: warps' matrix instructions; loaded: KiB read from global memory in whole sectors; ways: passes over the banks of
# shared memory, and sectors: pieces of 32 bytes, both against the least that the bytes need.
COLUMNS = ("case", "kernel", "instructions", "never", "warp instructions", "mma", "loaded", "ways", "sectors")
# The inner loops over a bias: the mutants' are of 50 keys, too few for a tile that nothing cuts.
CASES = test_triton_mutants.CASES | {
    "bias_of_192_keys": (lambda: backward(2, 64, 192, 32, 0.2, bias=rand("b", 2, 64, 192, dtype=torch.bfloat16)), {}),
}  # fmt: skip


def reports(case: str) -> list[Report]:
    """One for each kernel that the case compiled."""
    with using(Device()) as device:
        CASES[case][0]()
    return list(device.reports.values())


def row(case: str, report: Report) -> tuple:
    mma = sum(n for i, n in zip(report.instructions, report.executed, strict=True) if i.text.startswith("mma"))
    ways, least = (sum(getattr(t, name) for t in report.traffic) for name in ("wavefronts", "ideal_wavefronts"))
    sectors, ideal = (sum(getattr(t, name) for t in report.traffic) for name in ("sectors", "ideal_sectors"))
    loaded = sum(t.sectors for t in report.traffic if "st.global" not in t.instruction.text) // 32
    return (
        case, report.kernel, len(report.instructions), len(report.never_executed()), report.warp_instructions, mma,
        loaded, round(ways / least, 3) if least else 0.0, round(sectors / ideal, 3) if ideal else 0.0,
    )  # fmt: skip


def source_line(source: str) -> str:
    """The line of triton_kernels that an instruction came from last."""
    for name, number in reversed(re.findall(r"(\w+\.py):(\d+)", source)):
        path = ROOT / "triton_kernels" / name
        if path.exists():
            return path.read_text().splitlines()[int(number) - 1].strip()
    return source


def main() -> None:
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    lines = [row(case, report) for case in CASES for report in reports(case)]
    table["executed"] = [list(COLUMNS), *map(list, lines)]
    write(FILE, {name: found for name, found in table.items() if name != "columns"})


if __name__ == "__main__":
    main()
