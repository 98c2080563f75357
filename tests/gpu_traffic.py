"""What the GPU kernels did on the PTX interpreter: instructions executed, matrix products, memory traffic.

PYTHONPATH=tests python -m gpu_traffic    writes bench/results/gpu_traffic.json and its table in docs/gpu.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ptx import Report

from tilewright.bench.cuda_resources import section, short_names

ROOT = Path(__file__).parent.parent
FILE = ROOT / "bench" / "results" / "gpu_traffic.json"
DOCS = ROOT / "docs" / "gpu.md"
MEND = "run PYTHONPATH=tests python -m gpu_traffic"
# mma: warps' matrix instructions; loaded: KiB read from global memory in whole sectors; ways: passes over the banks of
# shared memory, and sectors: pieces of 32 bytes, both against the least that the bytes need.
COLUMNS = ("case", "kernel", "instructions", "never", "warp instructions", "mma", "loaded", "ways", "sectors")
MOST_WAYS, MOST_SECTORS = 1.05, 1.1


def row(case: str, report: Report) -> tuple:
    mma = sum(n for i, n in zip(report.instructions, report.executed, strict=True) if i.text.startswith("mma"))
    ways, least = (sum(getattr(t, name) for t in report.traffic) for name in ("wavefronts", "ideal_wavefronts"))
    sectors, ideal = (sum(getattr(t, name) for t in report.traffic) for name in ("sectors", "ideal_sectors"))
    loaded = sum(t.sectors for t in report.traffic if "st.global" not in t.instruction.text) / 32
    return (
        case, short_names([report.kernel])[0], len(report.instructions), len(report.never_executed()),
        report.warp_instructions, mma, round(loaded, 1), round(ways / least, 3) if least else 0.0,
        round(sectors / ideal, 3) if ideal else 0.0,
    )  # fmt: skip


def listed(kind: str) -> list[str]:
    """The cases that the file has of "cuda" or "triton"."""
    table = json.loads(FILE.read_text())
    assert tuple(table["columns"]) == COLUMNS, MEND
    return list(dict.fromkeys(line[0] for line in table[kind]))


def markdown(table: dict[str, Iterable[tuple]]) -> str:
    lines = ["| | case | kernel | mma a KiB read | banks | sectors |", "|---|---|---|---|---|---|"]
    for kind, rows in table.items():
        for case, kernel, _, _, _, mma, loaded, ways, sectors in rows:
            products = f"{mma / loaded:.1f}" if mma else "none"
            banks = f"{ways:.2f}" if ways else "not used"
            lines.append(f"| {kind} | {case} | `{kernel}` | {products} | {banks} | {sectors:.2f} |")
    return "\n".join(lines)


def main() -> None:
    import test_cuda_traffic as cuda
    import test_triton_traffic as triton

    table = {
        kind: [row(case, report) for case in tests.CASES for report in tests.reports(case)]
        for kind, tests in (("cuda", cuda), ("triton", triton))
    }
    FILE.write_text(section({"columns": COLUMNS, **table}) + "\n")
    head, _, rest = DOCS.read_text().partition("<!-- traffic -->\n")
    _, _, tail = rest.partition("<!-- /traffic -->\n")
    DOCS.write_text(f"{head}<!-- traffic -->\n{markdown(table)}\n<!-- /traffic -->\n{tail}")


if __name__ == "__main__":
    main()
