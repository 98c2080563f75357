"""How the CUDA kernels' accesses meet the memory, and how many matrix products there are to them: each kernel once."""

from __future__ import annotations

from collections.abc import Callable

import cuda_device
import pytest
import test_cuda_attention_checks as attention
import torch
from gpu_linear import Case, inputs
from gpu_traffic import MOST_SECTORS, MOST_WAYS, listed, row
from ptx import Report
from ptx.compilers import needs_nvcc
from test_cuda_cache import check_appends, gathered, tokens
from test_cuda_linear import run as run_linear
from test_cuda_norm import numbers, run_act, run_norm
from test_cuda_rope import append, run_rope, tables
from test_cuda_sample import draw

from tilewright import QuantizedKV

pytestmark = needs_nvcc
BF16 = torch.bfloat16


def linear(m: int, codes: str, activation: str) -> Callable[[], object]:
    x, weight, _ = inputs(Case(m, 128, 512, codes, 32), BF16)
    return lambda: run_linear(x, weight, None, activation)


def norm(n: int, weight: torch.dtype) -> None:
    x = numbers("x", 4, n, dtype=BF16)
    run_norm(x, x, numbers("w", n, dtype=weight), None, False)


def rope() -> None:
    q = numbers("q", 1, 8, 4, 128, dtype=BF16)
    run_rope(q, q, *tables(128, 8), None, False)


def dense_append() -> None:
    k = numbers("k", 1, 8, 4, 128, dtype=BF16)
    append((torch.zeros(1, 8, 4, 128, dtype=BF16), torch.zeros(1, 8, 4, 128, dtype=BF16)), k, k)


def quantised_append(bits: int) -> None:
    check_appends(QuantizedKV.empty(1, 2, 192, 128, bits), [tokens(f"{bits}", 1, 2, 192, 128)])


def gather() -> None:
    source = numbers("s", 4, 2, 8, 64, dtype=BF16)
    gathered(source, torch.tensor([1, 0]), None, torch.zeros(2, 2, 8, 64, dtype=BF16))


def sample() -> None:
    draw(numbers("logits", 1, 5000), torch.tensor([0.4]).double(), top_k=500, top_p=0.8)


CASES = {
    **{f"attention {name}": check for name, (check, _) in attention.MUTANTS.items()},
    **{
        f"linear {codes} {activation} m={m}": linear(m, codes, activation)
        for codes in ("int4", "int8")
        for activation in ("bf16", "int8")
        for m in (1, 4, 16, 32, 64, 128)
    },
    "rms_norm n=4096": lambda: norm(4096, BF16),
    "rms_norm n=16384": lambda: norm(16384, BF16),
    "rms_norm n=4096, float32 weight": lambda: norm(4096, torch.float32),
    "silu_mul": lambda: run_act(*numbers("act", 4, 4096, dtype=BF16).chunk(2, -1), "silu"),
    "rope": rope,
    "kv_append": dense_append,
    "kv_append 8 bits": lambda: quantised_append(8),
    "kv_append 4 bits": lambda: quantised_append(4),
    "gather": gather,
    "sample": sample,
}  # fmt: skip
# (passes over the banks, sectors) against the least, where they are more, and why.
HALVES = "two lanes share a row of w, and each reads its half of a sector of x, which the L1 cache holds"
FLOATS = "a lane's 8 weights are 32 bytes, read in two halves"
BYTES = "the order of these caches has the codes of 4 tokens side by side: a token's are written a byte at a time"
BINS = "numbers are counted in bins, and some in the same one"
COSTLY = {
    ("linear int4 bf16 m=1", "gemv_kernel"): (MOST_WAYS, 1.2, HALVES),
    ("linear int4 bf16 m=4", "gemv_kernel"): (MOST_WAYS, 1.5, HALVES),
    ("linear int8 bf16 m=1", "gemv_kernel"): (MOST_WAYS, 1.15, HALVES),
    ("linear int8 bf16 m=4", "gemv_kernel"): (MOST_WAYS, 1.35, HALVES),
    ("rms_norm n=4096, float32 weight", "norm_kernel"): (MOST_WAYS, 1.35, FLOATS),
    ("sample", "sample_kernel"): (1.1, MOST_SECTORS, BINS),
    ("kv_append 8 bits", "append_codes_kernel"): (MOST_WAYS, 1.95, BYTES),
    ("kv_append 4 bits", "append_groups_kernel"): (MOST_WAYS, 1.4, BYTES),
}  # fmt: skip


def reports(case: str) -> list[Report]:
    """One for each kernel that the case launched."""
    with cuda_device.module().watched() as launches:
        CASES[case]()
    return list(cuda_device.reports(launches).values())


@pytest.mark.parametrize("case", CASES)
def test_no_bank_conflicts_and_whole_sectors(case: str) -> None:
    for report in reports(case):
        _, kernel, *_, ways, sectors = row(case, report)
        most_ways, most_sectors, _ = COSTLY.get((case, kernel.partition("<")[0]), (MOST_WAYS, MOST_SECTORS, ""))
        assert ways <= most_ways and sectors <= most_sectors, (kernel, ways, sectors)


def test_the_table_has_every_case() -> None:
    assert listed("cuda") == list(CASES)
