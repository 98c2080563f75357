"""Triton's quantised linear: the error rule, exact integer arithmetic, and which bits may not change."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import seeded
from compare import assert_close, assert_same_bits
from torch import Tensor
from triton_device import INTERPRETED, SWEEP, running

import tilewright
from tilewright import QuantizedWeight
from tilewright.ops.linear import quantized_linear_reference, rounded_activations
from tilewright.quant.weight import pack, pack_bf16
from tilewright.triton_kernels.weight import gpu_weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    codes: str = "int4"
    group: int = 32
    offset: str = "none"
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}_{self.codes}_g{self.group}_{self.offset}"


# Up to 4 rows the kernel without tensor cores, then tiles of 16, 32, 64 and 128 rows; 64 columns a step, a half each.
CASES = [
    Case(1, 33, 130), Case(4, 70, 65, "int8", 64, "zero"), Case(2, 40, 200, "int4", 128, "min", True),
    Case(3, 17, 31, "int6", 16), Case(1, 9, 1100, "int4", -1, "zero"), Case(5, 33, 130),
    Case(16, 70, 300, "int4", 64, "zero"),
    Case(17, 65, 129, "int8", -1), Case(40, 97, 96, "int4", 16, "min", True), Case(70, 130, 190, "int4", 32, "zero"),
    Case(130, 70, 257, "int8", 32, "min"), Case(140, 65, 320, "int4", -1), Case(9, 200, 1000, "int5", 96, "none", True),
    Case(8, 1, 1), Case(1, 1, 1), Case(6, 66, 33, "int8", 16, "zero"),
]  # fmt: skip
WAYS = [
    (BF16, "bf16"), (FP32, "int8"), (FP16, "fp32"), (FP32, "fp32"), (BF16, "int8"), (FP32, "bf16"),
    (FP16, "int8_token"),
]  # fmt: skip


def pairs() -> list:
    found = []
    for i, case in enumerate(CASES):
        for j, (dtype, activation) in enumerate(WAYS):
            if INTERPRETED and (dtype == BF16 or activation == "bf16"):
                continue
            if SWEEP or j in (i % 7, (i + 3) % 7):
                found.append(pytest.param(case, dtype, activation, id=f"{case}_{str(dtype)[6:]}_{activation}"))
    return found


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, QuantizedWeight, Tensor | None]:
    c, g = case, seeded(str(case))
    groups = 1 if c.group == -1 else -(-c.k // c.group)
    top = 1 << int(c.codes[3])
    codes = torch.randint(0, top, (c.n, c.k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(c.n, groups, generator=g) * 0.02 + 0.001).half().float()
    offsets = None
    if c.offset == "zero":
        offsets = torch.randint(0, top, (c.n, groups), generator=g, dtype=torch.uint8)
    elif c.offset == "min":
        offsets = torch.randn(c.n, groups, generator=g).half().float() * 0.1
    weight = pack(codes, scales, offsets, c.codes, c.group, c.offset)
    bias = torch.randn(c.n, generator=g) if c.bias else None
    return torch.randn(c.m, c.k, generator=g).to(dtype), weight, bias


def naive(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str) -> Tensor:
    w = weight.dequantize()
    if activation.startswith("int8"):
        out = rounded_activations(x, weight, activation).float() @ w.t()
    else:
        dtype = BF16 if activation == "bf16" else x.dtype
        out = (x.to(dtype) @ w.to(dtype).t()).float()
    return (out if bias is None else out + bias).to(x.dtype)


def run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str) -> Tensor:
    with running():
        return tilewright.quantized_linear(x, weight, bias, activation=activation, backend="triton")


@pytest.mark.parametrize(("case", "dtype", "activation"), pairs())
def test_error_rule(case: Case, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = inputs(case, dtype)
    out = run(x, weight, bias, activation)
    assert tilewright.last_impl("quantized_linear") == "triton"
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out, ref, naive(x, weight, bias, activation), dtype)


@pytest.mark.parametrize("m", (1, 6, 70))
def test_one_column_alone(m: int) -> None:
    """Each border of steps, halves and groups in turn is the only column of x that is not 0."""
    case = Case(m, 70, 330, "int4", 32, "zero")
    _, weight, _ = inputs(case, FP32)
    columns = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 319, 320, 328, 329]
    dtype = FP16 if INTERPRETED else BF16
    w = weight.dequantize().to(dtype)
    for first in range(0, len(columns), m):
        x = torch.zeros(m, 330, dtype=dtype)
        for row, column in enumerate(columns[first : first + m]):
            x[row, column] = 1
        out = run(x, weight, None, "fp32")
        for row, column in enumerate(columns[first : first + m]):
            assert_same_bits(out[row] + 0, w[:, column] + 0)  # + 0: the sign of zero


@pytest.mark.parametrize(("dtype", "activation", "ranges"), [
    (FP32, "int8", [(1, 3, 16, 40, 70, 130)]), (FP16, "fp32", [(1, 2, 4), (5, 16, 17, 40, 70, 130)]),
])  # fmt: skip
def test_bits_do_not_depend_on_the_number_of_rows(dtype: torch.dtype, activation: str, ranges: list) -> None:
    x, weight, _ = inputs(Case(130, 65, 200, "int4", 64), dtype)
    for sizes in ranges:
        whole = run(x[: sizes[-1]], weight, None, activation)
        for m in sizes[:-1]:
            assert_same_bits(run(x[:m], weight, None, activation), whole[:m])


def test_layouts_of_x() -> None:
    x, weight, bias = inputs(Case(6, 40, 64, bias=True), FP32)
    expected = run(x, weight, bias, "fp32")
    for y in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :64], x.view(2, 3, 64), x.view(3, 2, 64).transpose(0, 1)):
        out = run(y, weight, bias, "fp32")
        assert out.shape == (*y.shape[:-1], 40)
        if y.dim() == 3 and y.is_contiguous():
            assert_same_bits(out.view(6, 40), expected)
        elif y.dim() == 2:
            assert_same_bits(out, expected)
        else:
            assert_same_bits(out.transpose(0, 1).reshape(6, 40), expected)


def test_values_that_are_not_finite() -> None:
    x, weight, _ = inputs(Case(6, 40, 96), FP32)
    x[1, 5], x[2, 40], x[4, 95] = torch.nan, torch.inf, -torch.inf
    for activation in ("fp32", "int8", "int8_token"):
        out = run(x, weight, None, activation)
        ref = quantized_linear_reference(x, weight, activation=activation)
        assert_close(out, ref, naive(x, weight, None, activation), FP32)


def test_order_of_columns_and_gradients() -> None:
    g = seeded("columns")
    columns = torch.randperm(64, generator=g)
    codes = torch.randint(0, 16, (40, 64), generator=g, dtype=torch.uint8)
    weight = pack(codes, torch.rand(40, 2, generator=g).half().float(), None, "int4", 32, columns=columns)
    x = torch.randn(6, 64, generator=g, requires_grad=True)
    bias = torch.randn(40, generator=g, requires_grad=True)
    with running():
        out = tilewright.quantized_linear(x, weight, bias, activation="fp32", backend="triton")
        out.sum().backward()
    assert_close(out.detach(), quantized_linear_reference(x.detach(), weight, bias.detach(), activation="fp32"),
                 x.detach() @ weight.dequantize().t() + bias.detach(), FP32)  # fmt: skip
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(6, 64))
    torch.testing.assert_close(bias.grad, torch.full((40,), 6.0))


@pytest.mark.parametrize("codes", ("int4", "int5", "int6", "int8"))
def test_the_gpus_order_keeps_every_value(codes: str) -> None:
    for n, k in ((1, 31), (33, 64), (70, 300)):
        for group in (16, 32, 64, -1):
            for offset in ("none", "zero", "min"):
                _, weight, _ = inputs(Case(1, n, k, codes, group, offset), FP32)
                rows = gpu_weight(weight.packed, *weight.spec()).rows(torch.arange(n))
                assert_same_bits(rows, weight.dequantize())


def test_the_gpus_order_is_made_once_and_anew_after_a_write() -> None:
    _, weight, _ = inputs(Case(1, 33, 64), FP32)
    first = gpu_weight(weight.packed, *weight.spec())
    assert gpu_weight(weight.packed, *weight.spec()) is first
    _, other, _ = inputs(Case(2, 33, 64), FP32)
    weight.packed.copy_(other.packed)
    assert_same_bits(gpu_weight(weight.packed, *weight.spec()).rows(torch.arange(33)), other.dequantize())


def test_empty() -> None:
    weight = inputs(Case(1, 33, 64), FP32)[1]
    assert run(torch.empty(0, 64), weight, None, "fp32").shape == (0, 33)
    empty = pack(torch.empty(5, 0, dtype=torch.uint8), torch.empty(5, 0), None, "int4", 32)
    bias = torch.arange(5.0)
    assert_same_bits(run(torch.empty(2, 0), empty, bias, "int8"), bias.expand(2, 5))


def test_rejected() -> None:
    x, weight, _ = inputs(Case(2, 33, 64), FP32)
    for call, error, message in (
        (lambda: run(x[:, :60], weight, None, "fp32"), ValueError, "must be the weight's 64|must be 64"),
        (lambda: run(x, weight, torch.ones(4), "fp32"), ValueError, "bias must have shape"),
        (lambda: run(x, pack_bf16(torch.ones(33, 64)), None, "bf16"), NotImplementedError, "read int4.*not 'bf16'"),
        (lambda: run(x.double(), weight, None, "fp32"), ValueError, "float16, got torch.float64"),
    ):
        with pytest.raises(error, match=message):
            call()
