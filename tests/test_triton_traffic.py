"""What of the Triton kernels' PTX is never executed, and how their accesses meet the memory: each kernel once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from triton_device import INTERPRETED, Device, running, using

if INTERPRETED:
    pytest.skip("the interpreter has no instructions", allow_module_level=True)

import test_triton_mutants
import torch
from gpu_attention import rand
from gpu_traffic import MOST_SECTORS, MOST_WAYS, listed, row
from ptx import Report
from test_triton_mutants import backward

import tilewright

KERNELS = Path(__file__).parent.parent / "triton_kernels"


def norm() -> None:
    with running():
        tilewright.rms_norm(rand("x", 3, 4096, dtype=torch.bfloat16), None, 1e-5, backend="triton")


# The inner loops over a bias: the mutants' are of 50 keys, too few for a tile that nothing cuts.
CASES = {name: run for name, (run, _) in test_triton_mutants.CASES.items()} | {
    "norm_of_4096_columns": norm,
    "bias_of_192_keys": lambda: backward(2, 64, 192, 32, 0.2, bias=rand("b", 2, 64, 192, dtype=torch.bfloat16)),
}


def reports(case: str) -> list[Report]:
    """One for each kernel that the case compiled."""
    with using(Device()) as device:
        CASES[case]()
    return list(device.reports.values())


def source_line(source: str) -> str:
    """The line of triton_kernels that an instruction came from last."""
    for name, number in reversed(re.findall(r"(\w+\.py):(\d+)", source)):
        path = KERNELS / name
        if path.exists():
            return path.read_text().splitlines()[int(number) - 1].strip()
    return source


NO_TURN = "where a loop takes no turn: rows without keys, bounds that do not exist and such are cases of other tests"
MASKED = "of lanes beyond the last row or column, whole instructions in this shape, or of a loop without a turn"
BRANCH = "a branch around work that every program here has"
LOGARITHM = "the logarithm of a number that is not normal"
OTHER_TILES = "of tiles that the last key cuts, or of those that it does not: one of the two is absent here"
OTHER_BIAS = "a sum that this bias does not need; another case's does"
# The beginning of a line of triton_kernels, and why instructions of it may not have been executed.
EXPLAINED = {
    "for ": NO_TURN,
    "key = n + tl.arange(": OTHER_TILES,
    "key, last = n": OTHER_TILES,
    "seen = (key >= 0)": OTHER_TILES,
    "value = _elements(": OTHER_TILES,
    "key_ok = key < length": MASKED,
    "tl.store(lse": LOGARITHM,
    "tl.store(": MASKED,
    "_store(": MASKED,
    "_finish(": MASKED,
    "value, inside = _summed(": MASKED,
    "total += tl.sum(value": NO_TURN,
    "total = tl.sum(sums": NO_TURN,
    "x_scale = tl.load(": MASKED,
    "s, _capped = scores(": MASKED,
    "if tile * BLOCK_": BRANCH,
    "first_m, end, first_n": BRANCH,
    "total = tl.where(column": OTHER_BIAS,
    "total = tl.where(row": OTHER_BIAS,
    "standard.py": OTHER_BIAS,
}
# Sectors against the least where they are more than 1.1, and why.
UNALIGNED = "rows that are no multiple of 16 elements are read an element at a time, from anywhere in a sector"
COSTLY = {
    ("norm", "_norm"): (1.2, UNALIGNED),  # 4,200 columns
    **{
        ("bias_of_rows_and_keys", kernel): (2.4, UNALIGNED)  # 50 columns
        for kernel in ("_forward", "_grad_kv", "_grad_q", "_grad_bias")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_execution(case: str) -> None:
    for report in reports(case):
        lines = {source_line(i.source) for i in report.never_executed()}
        assert [line for line in lines if not line.startswith(tuple(EXPLAINED))] == []
        *_, ways, sectors = row(case, report)
        most, _ = COSTLY.get((case, report.kernel), (MOST_SECTORS, ""))
        assert ways <= MOST_WAYS and sectors <= most, (report.kernel, ways, sectors)


def test_the_table_has_every_case() -> None:
    assert listed("triton") == list(CASES)
