"""The CUDA kernels of quantised linear layers, executed through their PTX."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import cuda_device
import pytest
import torch
from compare import assert_close, assert_same_bits
from cuda_device import SWEEP
from gpu_linear import BF16, FP16, FP32, Case, inputs, naive
from ptx.compilers import needs_nvcc
from torch import Tensor

import tilewright
from tilewright.ops.linear import quantized_linear_reference
from tilewright.quant import QuantizedWeight
from tilewright.triton_kernels.weight import GpuWeight, gpu_weight

pytestmark = needs_nvcc


# Rows: the kernels for 1, 2 and 4, then tiles of 16, 32, 64 and 128. Columns: 64 or 128 a step, at least three steps of
# each tile in some case, residues of both. Outputs: tiles of 8, 32, 64, 128.
CASES = [
    Case(1, 33, 130), Case(4, 21, 65, "int8", 64, "zero"), Case(2, 40, 1100, "int4", 128, "min", True),
    Case(3, 17, 31, "int6", 16), Case(1, 9, 1100, "int4", -1, "zero", scale=FP32), Case(1, 1, 1, "int8"),
    Case(5, 33, 130), Case(16, 70, 300, "int4", 64, "zero"), Case(17, 65, 129, "int8", -1, "zero"),
    Case(11, 40, 448, "int8", 32, "min", True), Case(40, 97, 96, "int4", 16, "min", True), Case(8, 1, 1),
    Case(33, 66, 520, "int4", -1, "min"), Case(70, 130, 200, "int4", 32, "zero", scale=BF16),
    Case(130, 70, 257, "int8", 32, "min"), Case(140, 136, 320, "int4", -1),
    Case(20, 100, 392, "int5", 96, "none", True), Case(6, 66, 33, "int8", 16, "zero"), Case(66, 64, 264, "int8", 16),
    Case(129, 130, 136, "int8", -1, scale=FP32),
]  # fmt: skip
WAYS = [
    (BF16, "bf16"), (BF16, "int8"), (FP16, "fp32"), (FP32, "int8_token"), (BF16, "int8_token"), (FP16, "int8"),
    (FP32, "int8"), (FP16, "int8_token"),
]  # fmt: skip


def on_gpu(weight: QuantizedWeight) -> GpuWeight:
    return gpu_weight(weight.packed, *weight.spec())


def run(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str, sizes: Tensor | None = None
) -> Tensor:
    w, cuda = on_gpu(weight), cuda_device.module()
    out = torch.full((x.shape[0], w.n // (1 if sizes is None else len(sizes))), torch.nan, dtype=x.dtype)
    workspace, kind = None, activation if activation.startswith("int8") else "float"
    if kind != "float":
        workspace = torch.full((cuda.module.linear_workspace_bytes(*x.shape),), 0xCD, dtype=torch.uint8)
    weights = (w.codes, w.scales, w.offsets, w.bits, w.middle, w.group, w.k, w.offset)
    cuda.linear(x, *weights, bias, sizes, kind, workspace, out)
    return out


def check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str) -> Tensor:
    out = run(x, weight, bias, activation)
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out, ref, naive(x, weight, bias, activation), x.dtype)
    return out


def pairs() -> list:
    return [
        pytest.param(case, *way, id=f"{case}_{str(way[0])[6:]}_{way[1]}")
        for i, case in enumerate(CASES)
        for j, way in enumerate(WAYS)
        if SWEEP or j in (i % 8, (i + 3) % 8)
    ]


@pytest.mark.parametrize(("case", "dtype", "activation"), pairs())
def test_error_rule(case: Case, dtype: torch.dtype, activation: str) -> None:
    check(*inputs(case, dtype), activation)


# Of what 8 ways get in turn: columns a scale, offset, bias, type of scales.
KINDS = [
    (32, "none", False, FP16), (-1, "zero", True, FP32), (16, "min", False, BF16), (64, "none", True, BF16),
    (-1, "min", True, FP16), (32, "zero", False, FP32), (16, "zero", True, FP16), (-1, "none", False, BF16),
    (96, "min", True, FP32),
]  # fmt: skip


def test_every_kernel_runs_everywhere() -> None:
    """Each number of rows that has a kernel, 4 and 8 bits, in every type; odd N and K, and aligned rows
    of x and of the result."""
    kinds, columns, offsets = cycle(KINDS), cycle((331, 392)), cycle(("none", "zero", "min"))
    outputs = cycle((67, 72, 72))
    with cuda_device.module().watched() as launches:
        for m, codes in product((1, 2, 3, 13, 29, 51, 77), ("int4", "int8")):
            for dtype, activation in WAYS:
                check(*inputs(Case(m, next(outputs), next(columns), codes, *next(kinds)), dtype), activation)
            for scale in (FP16, BF16, FP32):
                case = Case(m, next(outputs), next(columns), codes, -1, next(offsets), scale=scale)
                check(*inputs(case, BF16), "int8_token")
        for activation in ("bf16", "int8", "int8_token"):
            test_experts([3, 0, 20, 1], activation)
            test_experts([70, 40, 0, 3], activation)
        test_rows_of_x_with_gaps_and_unaligned()
    left = cuda_device.unexecuted(launches, "linear_gemv", "linear_gemm", "linear_int8", merged=True)
    assert left == [], "\n".join(left)


@pytest.mark.parametrize("m", [1, 6, 20, 40, 66])
@pytest.mark.parametrize("offset", ["none", "zero", "min"])
def test_int8_has_the_bits_of_the_cpu(m: int, offset: str) -> None:
    """Whatever the tile; so a row's bits do not depend on the others either."""
    for codes, group in (("int4", 32), ("int8", 16)):
        x, weight, bias = inputs(Case(m, 40, 330, codes, group, offset, True), BF16)
        assert_same_bits(run(x, weight, bias, "int8"), tilewright.quantized_linear(x, weight, bias, activation="int8"))


@pytest.mark.parametrize(("m", "codes"), [(1, "int4"), (1, "int8"), (6, "int4"), (6, "int8"), (70, "int4")])
def test_one_column_alone(m: int, codes: str) -> None:
    """Each border of steps, halves and groups in turn is the only column of x that is not 0: no column is lost or read
    twice, and each meets its own scale."""
    case = Case(m, 24, 330, codes, 32, "zero")
    _, weight, _ = inputs(case, BF16)
    columns = [0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 192, 255, 256, 319, 320, 328, 329]
    w = weight.dequantize().bfloat16()
    for some in (columns[i : i + m] for i in range(0, len(columns), m)):
        x = torch.zeros(m, 330, dtype=BF16)
        for row, column in enumerate(some):
            x[row, column] = 1
        expected = torch.zeros(m, 24, dtype=BF16)
        expected[: len(some)] = w[:, some].t()
        found = run(x, weight, None, "bf16")
        assert ((found - expected).abs() <= expected.abs() * 2**-7).all()
        assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("m", [3, 9])
def test_what_is_not_finite_stays_in_its_row(m: int) -> None:
    for activation in ("bf16", "int8"):
        x, weight, _ = inputs(Case(m, 33, 200), BF16)
        x[0, 5], x[1, 70], x[2, 199] = torch.nan, torch.inf, -torch.inf
        found, ref = run(x, weight, None, activation), quantized_linear_reference(x, weight, activation=activation)
        assert torch.equal(found.isnan(), ref.isnan()) and torch.equal(found.isinf(), ref.isinf())


def test_rows_of_x_with_gaps_and_unaligned() -> None:
    for m in (2, 20):
        x, weight, bias = inputs(Case(m, 33, 136, "int4", 32, "none", True), BF16)
        wide = torch.full((m, 300), torch.nan, dtype=BF16)
        for start in (8, 3):
            wide[:, start : start + 136] = x
            for activation in ("bf16", "int8"):
                assert_same_bits(
                    run(wide[:, start : start + 136], weight, bias, activation), run(x, weight, bias, activation)
                )


@pytest.mark.parametrize("activation", ["bf16", "int8", "int8_token"])
@pytest.mark.parametrize("sizes", [[3, 0, 20, 1], [0, 0, 9, 0], [70, 40, 0, 3], [0, 0, 0, 0]])
def test_experts(sizes: list[int], activation: str) -> None:
    experts, n, m = len(sizes), 32, sum(sizes)
    case = Case(m, experts * n, 136, "int4", -1 if activation == "int8_token" else 32, "zero", True)
    x, weight, bias = inputs(case, BF16)
    found = run(x, weight, bias, activation, torch.tensor(sizes))
    at = 0
    for e, size in enumerate(sizes):
        if size:
            part = slice(e * n, (e + 1) * n)
            one = replace(weight, packed=weight.packed[e : e + 1], shape=(n, 136))
            rows = x[at : at + size]
            ref = quantized_linear_reference(rows, one, bias[part], activation=activation)
            assert_close(found[at : at + size], ref, naive(rows, one, bias[part], activation), BF16)
        at += size
    # Rows that no expert has.
    more = torch.cat((x, x[:3]))
    found = run(more, weight, bias, activation, torch.tensor(sizes))
    assert found[m:].isnan().all() and found[:m].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 63, dtype=BF16)}, "x must be"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "float32, bfloat16"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"workspace": torch.zeros(8, dtype=torch.uint8), "activation": "int8"}, "workspace must have"),
        ({"activation": "int7"}, "activation must be"),
        ({"group_sizes": torch.zeros(3, dtype=torch.int64)}, "group_sizes must be"),
        ({"scales": torch.zeros(1, 8)}, r"\(2, 8\)"),
        ({"out": torch.zeros(2, 9, dtype=BF16)}, "out must be"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 64, dtype=BF16), "codes": torch.zeros(8, 32, dtype=torch.uint8),
        "scales": torch.zeros(2, 8), "offsets": None, "bits": 4, "middle": 8, "group": 32, "k": 64, "offset": "none",
        "bias": None, "group_sizes": None, "activation": "float", "workspace": None,
        "out": torch.zeros(2, 8, dtype=BF16),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cuda_device.module().linear(*(arguments | change).values())
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        wide = {"x": torch.zeros(2, 64), "out": torch.zeros(2, 8)}
        cuda_device.module().linear(*(arguments | wide).values())


# One instantiation of each kernel; three steps of x and w and more, so that every stage is used again.
MUTANTS = {
    "gemv": (Case(2, 12, 1100), "bf16"),
    "gemm 16": (Case(6, 33, 330), "bf16"),
    "gemm 64": (Case(40, 64, 330, "int8"), "bf16"),
    "gemm 128": (Case(65, 64, 330), "bf16"),
    "int8": (Case(6, 33, 650, "int4", 32, "min"), "int8"),
    "int8 row": (Case(6, 33, 650, "int4", -1, "zero"), "int8_token"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_barrier_and_wait_is_needed(name: str) -> None:
    case, activation = MUTANTS[name]
    x, weight, bias = inputs(case, BF16)
    survivors = cuda_device.surviving_mutants(lambda: check(x, weight, bias, activation))
    left = [f"{name}: {i}" for name, found in survivors.items() for i in found]
    assert left == [], "\n".join(left)


@pytest.mark.parametrize("name", MUTANTS)
def test_warps_and_blocks_in_any_order(name: str) -> None:
    case, activation = MUTANTS[name]
    x, weight, bias = inputs(case, BF16)
    expected = run(x, weight, bias, activation)
    for seed in (1, 2):
        with cuda_device.module().watched(seed=seed, resident=2):
            assert_same_bits(run(x, weight, bias, activation), expected)
