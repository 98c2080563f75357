"""Instruction-set levels: TILEWRIGHT_ISA lowers the level, refuses the impossible, and last_impl tells which ran."""

from __future__ import annotations

import os

import pytest
import torch
from cases import LEVELS
from fresh import run_fresh

import tilewright
from tilewright import _C

# A run of every op that has kernels of its own, and what served it.
OPS = """
import torch, tilewright
q = torch.randn(1, 2, 20, 16)
tilewright.attention(q, q, q)
tilewright.quantized_linear(torch.randn(3, 64), tilewright.quantize_weight(torch.randn(40, 64)))
tilewright.rms_norm(torch.randn(3, 64), torch.ones(64), 1e-5)
print(tilewright.isa(), *(tilewright.last_impl(op) for op in ("attention", "quantized_linear", "rms_norm")))
"""
# Set by who built the extension with TILEWRIGHT_EMULATE_AMX; no wheel is, so the suite fails where one was.
EMULATED = "TILEWRIGHT_EMULATE_AMX" in os.environ
# The strongest level at or below each that has kernels of its own.
EXPECTED = {
    "scalar": ("scalar", "scalar", "scalar"),
    "avx2": ("avx2", "avx2", "avx2"),
    "avxvnni": ("avx2", "avxvnni", "avx2"),
    "avx512": ("avx512", "avx512", "avx512"),
    "avx512bf16": ("avx512bf16", "avx512", "avx512"),
    "amx": ("amx", "amx", "avx512"),
}


def test_found_levels_agree_with_the_kernel() -> None:
    """CPUID against what Linux reports in /proc/cpuinfo."""
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        flags = next(set(line.split(":")[1].split()) for line in f if line.startswith("flags"))
    needs = {
        "scalar": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    }
    needs["avx512bf16"] = needs["avx512"] | {"avx512_bf16"}
    needs["amx"] = needs["avx512bf16"] | (set() if EMULATED else {"amx_tile", "amx_int8", "amx_bf16"})
    found = _C.isa_found()
    assert [level for level in LEVELS if level in found] == found
    expected = [level for level in LEVELS if needs[level] <= flags]
    if "amx" in expected and "amx" not in found:  # needs the kernel's permission too
        expected.remove("amx")
    assert found == expected


def test_every_level_by_name() -> None:
    found = _C.isa_found()
    names = (*LEVELS, "AVX2", "avx", "sse2", "avx512 ", "0", "native")
    results = run_fresh(*(({"TILEWRIGHT_ISA": name}, OPS) for name in (*names, "")))
    for name, result in zip(names, results, strict=False):
        if name in found:
            assert (result.status, result.output.split()) == (0, [name, *EXPECTED[name]]), name
        else:
            assert result.status == 1, name
            message = result.output.strip().splitlines()[-1]
            assert message.startswith("ImportError: ") and f"TILEWRIGHT_ISA={name}: " in message
            assert f"this machine has {', '.join(found)}; the variable may only lower the level" in message
    assert results[-1].output.split()[0] == found[-1], "an empty variable means the strongest level"


def test_levels_agree() -> None:
    """The same inputs at every level of this machine: results within rounding of each other."""
    code = """
import torch, tilewright
torch.manual_seed(0)
q, k, x = torch.randn(2, 6, 33, 40), torch.randn(2, 2, 150, 40), torch.randn(9, 160)
w = tilewright.quantize_weight(torch.randn(40, 160), 4, 32, False)
out = [tilewright.attention(q, k, k, causal="bottom_right"), tilewright.attention(q[:, :, :1], k, k)]
out += [tilewright.quantized_linear(x, w, activation=a) for a in ("int8", "fp32")]
print(*(v for t in out for v in t.flatten().tolist()))
"""
    found = _C.isa_found()
    results = run_fresh(*(({"TILEWRIGHT_ISA": name}, code) for name in found))
    assert all(r.status == 0 for r in results), results
    values = [torch.tensor([float(v) for v in r.output.split()]) for r in results]
    for level, value in zip(found, values, strict=True):
        torch.testing.assert_close(value, values[0], rtol=2e-5, atol=2e-5, msg=lambda m, at=level: f"{at}: {m}")


def test_last_impl() -> None:
    assert tilewright.last_impl("no such op") is None
    q = torch.randn(1, 1, 20, 8)
    tilewright.attention(q, q, q)
    assert tilewright.last_impl("attention") == EXPECTED[tilewright.isa()][0]
    tilewright.attention(q, q, q, backend="reference")
    assert tilewright.last_impl("attention") == "reference"
    few, decodes = q[:, :, :2], "avx512bf16" if tilewright.isa() == "amx" else EXPECTED[tilewright.isa()][0]
    tilewright.attention(few, q, q)
    assert tilewright.last_impl("attention") == decodes
    tilewright.attention(q.double(), q.double(), q.double())
    assert tilewright.last_impl("attention") == "reference"
    tilewright.attention(q[:0], q[:0], q[:0])
    assert tilewright.last_impl("attention") == decodes


def test_emulation_is_named() -> None:
    """The build is the one that whoever runs the tests believes it to be, and `info` says so."""
    assert _C.amx_is_emulated() == EMULATED
    assert ("amx (emulated)" in tilewright.info()["isa_found"]) == (EMULATED and "amx" in _C.isa_found())
    assert (tilewright.info()["isa"] == "amx (emulated)") == (EMULATED and tilewright.isa() == "amx")


@pytest.mark.parametrize("name", ["isa", "isa_found", "cpus_usable", "threads", "torch", "tilewright"])
def test_info(name: str) -> None:
    assert tilewright.info()[name]
