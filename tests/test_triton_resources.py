"""What the Triton kernels take of a GPU: the table in bench/results is whole, and a part of it is compiled anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from triton_device import INTERPRETED, SWEEP

if INTERPRETED:
    pytest.skip("needs the compiler", allow_module_level=True)

from tilewright.bench.gpu_resources import COLUMNS, SHIPPED, cases, configurations, describe, problems, row
from tilewright.bench.triton_compile import TARGETS

FILE = Path(__file__).parent.parent / "bench" / "results" / "gpu_resources.json"
MEND = "run python -m bench.gpu_resources --json bench/results/gpu_resources.json --docs docs/gpu.md"


@pytest.mark.parametrize("target", SHIPPED)
def test_the_table_has_every_configuration(target: str) -> None:
    table = json.loads(FILE.read_text())
    assert tuple(table["columns"]) == COLUMNS
    lines = [tuple(line) for line in table[target]]
    wanted = {(case, *describe(launch)) for case, launch in configurations(target)}
    assert {line[:5] for line in lines} == wanted, MEND
    assert [problems(target, line) for line in lines if problems(target, line)] == []


# Kernels that are not executed anywhere: what Triton makes of them for newer GPUs and AMD's.
COMPILED = {
    "sm_90": (
        "attention bfloat16 head_dim=128", "linear int4_g32 bfloat16 bf16 m=64", "decode bfloat16 head_dim=128 rows=16",
    ),
    "sm_100": ("gradients bfloat16 head_dim=64", "linear int4_g128_zero bfloat16 int8 m=128"),
    "gfx942": ("attention bfloat16 head_dim=64", "rms_norm n=4096, residual", "rope_append halves"),
    "sm_120": ("attention bfloat16 head_dim=128",),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS if SWEEP else COMPILED)
def test_configurations_compile_without_spills(target: str) -> None:
    chosen = COMPILED.get(target, ())
    if SWEEP:  # each case for one of the targets: all of them are 2,600 compilations
        chosen = [case for case, _ in cases()][list(TARGETS).index(target) :: len(TARGETS)]
    found = [problems(target, row(target, case, launch)) for case, launch in configurations(target) if case in chosen]
    assert found and not any(found), found
