"""What of the Triton kernels' PTX is never executed, and how their accesses meet the memory: each kernel once."""

from __future__ import annotations

import pytest
from triton_device import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter has no instructions", allow_module_level=True)

from triton_traffic import CASES, reports, row, source_line

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
# (passes over the banks, sectors) against the least, where they are more than 1.05 and 1.1.
COSTLY = {
    ("norm", "_norm"): (1.05, 1.2),  # 4,200 columns: the last line is short
    ("forward_split", "_merge"): (1.05, 1.2),  # two numbers a row
    **{
        ("bias_of_rows_and_keys", kernel): (1.05, 2.4)  # 50 columns: an element at a time
        for kernel in ("_forward", "_grad_kv", "_grad_q", "_grad_bias")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_execution(case: str) -> None:
    for report in reports(case):
        lines = {source_line(i.source) for i in report.never_executed()}
        assert [line for line in lines if not line.startswith(tuple(EXPLAINED))] == []
        *_, ways, sectors = row(case, report)
        most_ways, most_sectors = COSTLY.get((case, report.kernel), (1.05, 1.1))
        assert ways <= most_ways and sectors <= most_sectors, (report.kernel, ways, sectors)
