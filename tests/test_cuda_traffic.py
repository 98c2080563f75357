"""How the CUDA kernels' accesses meet the memory, and how many matrix products there are to them: each kernel once."""

from __future__ import annotations

from collections.abc import Callable

import cuda_device
import pytest
import test_cuda_attention_checks as attention
import torch
from gpu_linear import Case, inputs
from gpu_traffic import MOST_SECTORS, MOST_WAYS, listed, row
from ptx import Report, Traffic
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
# Instructions of a kernel, both by how they begin, that take more, and why.
COSTLY = {
    ("gemv_kernel", "ld.global.v4.u32"): "x: the two lanes of a row of w read half a sector each; the L1 cache has it",
    ("quantise_kernel", "st.global"): "scales and sums of a step lie together: a row's 4 are half a sector",
    ("integer_kernel<4, Shape<16,", "st.global.u32"): "a warp's 8 columns of a row of the result are half a sector",
    ("integer_kernel<8, Shape<16,", "st.global.u32"): "the same",
    ("norm_kernel", "ld.global.v4.f32"): "float32 weights of a 16-bit norm: a lane's 8 are 32 bytes, in two halves",
    ("append_codes_kernel", "st.global.u8"): "the cache has the codes of 4 tokens side by side: one's are single bytes",
    ("append_groups_kernel", "st.global.u8"): "the same",
    ("sample_kernel", "atom.shared"): "numbers are counted in bins, and some in the same one",
    ("sample_kernel", "ld.shared.u64"): "a lane adds 8 neighbouring bins, once for each byte of the keys",
    ("sample_kernel", "ld.global.f32"): "a row of 5,000 logits ends within a warp's piece",
}


def reports(case: str) -> list[Report]:
    """One for each kernel that the case launched."""
    with cuda_device.module().watched() as launches:
        CASES[case]()
    return list(cuda_device.reports(launches).values())


def opcode(t: Traffic) -> str:
    return t.instruction.text.split()[1 if t.instruction.text.startswith("@") else 0]


@pytest.mark.parametrize("case", CASES)
def test_no_bank_conflicts_and_whole_sectors(case: str) -> None:
    """In attention, whose tiles end within rows and whose rows come in any order, of all accesses of a kernel together;
    elsewhere of each."""
    for report in reports(case):
        _, kernel, *_, ways, sectors = row(case, report)
        if case.startswith("attention"):
            assert ways <= MOST_WAYS and sectors <= MOST_SECTORS, (kernel, ways, sectors)
            continue
        listed = tuple(begins for name, begins in COSTLY if kernel.startswith(name))
        slow = [
            (str(t.instruction), t.bank_ways, t.sector_ratio)
            for t in report.traffic
            if (t.bank_ways > MOST_WAYS or t.sector_ratio > MOST_SECTORS) and not opcode(t).startswith(listed)
        ]
        assert slow == [], "\n".join(map(str, slow))


def test_the_table_has_every_case() -> None:
    assert listed("cuda") == list(CASES)
