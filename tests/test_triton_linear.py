"""Triton's quantised linear: the error rule, exact integer arithmetic, and which bits may not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import LinearCase, linear_inputs, seeded
from compare import assert_close, assert_same_bits
from gpu_linear import BF16, FP16, FP32, Case, inputs, naive
from torch import Tensor
from triton_device import INTERPRETED, SWEEP, running

import tilewright
from tilewright import QuantizedWeight
from tilewright.ops import grouped_linear
from tilewright.ops.linear import quantized_linear_reference
from tilewright.quant.weight import CODES, pack
from tilewright.triton_kernels.weight import gpu_weight

# Up to 4 rows the kernel without tensor cores, then tiles of 16, 32, 64 and 128 rows; 64 columns a step, a half each.
CASES = [
    Case(1, 33, 130), Case(4, 70, 65, "int8", 64, "zero"), Case(2, 40, 200, "int4", 128, "min", True),
    Case(3, 17, 31, "int6", 16), Case(1, 9, 1100, "int4", -1, "zero", scale=FP32), Case(5, 33, 130),
    Case(16, 70, 300, "int4", 64, "zero"),
    Case(17, 65, 129, "int8", -1), Case(40, 97, 96, "int4", 16, "min", True), Case(70, 130, 190, "int4", 32, "zero"),
    Case(130, 70, 257, "int8", 32, "min", scale=FP32), Case(140, 65, 320, "int4", -1),
    Case(9, 200, 1000, "int5", 96, "none", True),
    Case(8, 1, 1), Case(1, 1, 1), Case(6, 66, 33, "int8", 16, "zero"),
    # Codes of tables, fp8 and bfloat16 themselves.
    Case(1, 33, 130, "nf4", 64), Case(20, 40, 100, "iq4_nl"), Case(3, 40, 300, "mxfp4", 32), Case(9, 66, 65, "fp4", 64),
    Case(2, 33, 130, "e4m3", -1), Case(17, 65, 129, "e4m3", 128), Case(1, 33, 130, "bf16", -1),
    Case(33, 65, 129, "bf16", -1, "none", True),
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


def run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str, choice: int = 0) -> Tensor:
    with running(choice=choice):
        return tilewright.quantized_linear(x, weight, bias, activation=activation, backend="triton")


@pytest.mark.parametrize(("case", "dtype", "activation"), pairs())
def test_error_rule(case: Case, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = inputs(case, dtype)
    out = run(x, weight, bias, activation)
    assert tilewright.last_impl("quantized_linear") == "triton"
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    assert_close(out, ref, naive(x, weight, bias, activation), dtype)


@pytest.mark.skipif(INTERPRETED, reason="the PTX has the configurations that this is about")
@pytest.mark.parametrize("activation", ("bf16", "int8"))
@pytest.mark.parametrize("m", (16, 30, 60, 130))
def test_other_configurations(m: int, activation: str) -> None:
    x, weight, bias = inputs(Case(m, 130, 200, "int4", 64, "zero", True), BF16)
    ref = quantized_linear_reference(x, weight, bias, activation=activation)
    for choice in (1, 2, 3):
        assert_close(run(x, weight, bias, activation, choice), ref, naive(x, weight, bias, activation), BF16)


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


@pytest.mark.parametrize("activation", ("int8", "int8_token", "fp32"))
@pytest.mark.parametrize("codes", ("int8", "nf4"))
def test_outliers(codes: str, activation: str) -> None:
    for m in (2, 9):
        x, weight, bias = inputs(Case(m, 40, 130, codes, 64, "none", True), FP32)
        weight = replace(weight, outlier_threshold=2.0)
        x[0, 3], x[1, 100], x[1, 7] = 50.0, -70.0, torch.inf
        ref = quantized_linear_reference(x, weight, bias, activation=activation)
        assert_close(run(x, weight, bias, activation), ref, naive(x, weight, bias, activation), FP32)


SIZES = ([3, 0, 1, 70, 7], [1, 1, 1, 1, 1], [0, 0, 9, 0, 0], [16, 16, 32, 0, 17])
GROUPED = [
    ("int4", "none", BF16, "bf16"), ("int4", "zero", FP32, "int8"), ("int8", "min", FP16, "int8_token"),
    ("nf4", "none", FP32, "fp32"), ("bf16", "none", BF16, "bf16"),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("codes", "offset", "dtype", "activation"), GROUPED)
def test_groups_are_single_calls(
    codes: str, offset: str, dtype: torch.dtype, activation: str, sizes: list[int]
) -> None:
    if INTERPRETED and (dtype == BF16 or activation == "bf16"):
        dtype, activation = FP16, "fp32"
    parts = [inputs(Case(sum(sizes), 64, 96, codes, 32, offset, True), dtype, i) for i in range(5)]
    x, weight = parts[0][0], QuantizedWeight.concat([part[1] for part in parts])
    bias = torch.cat([part[2] for part in parts])
    with running():
        out = grouped_linear(x, weight, torch.tensor(sizes), bias, activation=activation, backend="triton")
    ref = quantized_linear_reference(x, weight, bias, activation=activation, group_sizes=torch.tensor(sizes))
    bars = [naive(rows, *part[1:], activation) for rows, part in zip(x.split(sizes), parts, strict=True)]
    assert_close(out, ref, torch.cat(bars), dtype)


@pytest.mark.parametrize("activation", ("int8", "fp32"))
def test_rows_of_no_group_are_nan(activation: str) -> None:
    weight = QuantizedWeight.concat([inputs(Case(1, 64, 96), FP32)[1]] * 2)
    for sizes, known in (([3, 20], 23), ([0, 0], 0), ([40, 40], 60), ([-5, 7], 7), ([1 << 40, 0], 60)):
        with running():
            x = torch.ones(60, 96)
            out = grouped_linear(x, weight, torch.tensor(sizes), activation=activation, backend="triton")
        assert out.isnan().all(1).tolist() == out.isnan().any(1).tolist() == [row >= known for row in range(60)]


@pytest.mark.parametrize("kind", ("IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "Q2_K", "Q6_K"))
def test_scales_of_two_levels(kind: str) -> None:
    x, weight, bias = linear_inputs(LinearCase(kind, 6, 40, 512, kind=kind, bias=FP32), FP32)
    assert_same_bits(gpu_weight(weight.packed, *weight.spec()).rows(torch.arange(40)), weight.dequantize())
    for activation in ("fp32", "int8"):
        ref = quantized_linear_reference(x, weight, bias, activation=activation)
        assert_close(run(x, weight, bias, activation), ref, naive(x, weight, bias, activation), FP32)


@pytest.mark.parametrize("codes", [codes for codes in CODES if codes not in ("iq1", "iq2", "iq3_xxs", "iq3_s")])
def test_the_gpus_order_keeps_every_value(codes: str) -> None:
    for n, k in ((1, 31), (33, 64), (70, 300)):
        for group in (16, 32, 64, -1):
            for offset in ("none", "zero", "min") if codes.startswith("int") else ("none",):
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


def test_residual_and_gated_mlp() -> None:
    x, down, _ = inputs(Case(6, 40, 96), FP32)
    _, gate_up, _ = inputs(Case(6, 192, 40), FP32)
    y, residual = torch.randn(6, 40, generator=seeded("y")), torch.randn(6, 40, generator=seeded("residual"))
    options = {"residual": residual, "activation": "fp32"}
    with running():
        out = tilewright.quantized_linear(x, down, **options, backend="triton")
        mlp = tilewright.ops.gated_mlp(y, gate_up, down, **options, backend="triton")
    assert tilewright.last_impl("silu_mul") == tilewright.last_impl("quantized_linear") == "triton"
    torch.testing.assert_close(out, tilewright.quantized_linear(x, down, **options), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp, tilewright.ops.gated_mlp(y, gate_up, down, **options), rtol=1e-5, atol=1e-5)


def test_empty() -> None:
    weight = inputs(Case(1, 33, 64), FP32)[1]
    assert run(torch.empty(0, 64), weight, None, "fp32").shape == (0, 33)
    empty = pack(torch.empty(5, 0, dtype=torch.uint8), torch.empty(5, 0), None, "int4", 32)
    bias = torch.arange(5.0)
    assert_same_bits(run(torch.empty(2, 0), empty, bias, "int8"), bias.expand(2, 5))


def test_rejected() -> None:
    x, weight, _ = inputs(Case(2, 33, 64), FP32)
    wide = inputs(Case(2, 64, 64), FP32)[1]

    def grouped(x: Tensor, weight: QuantizedWeight, sizes: list) -> Tensor:
        with running():
            return grouped_linear(x, weight, torch.tensor(sizes), backend="triton")

    for call, error, message in (
        (lambda: run(x[:, :60], weight, None, "fp32"), ValueError, "must be the weight's 64|must be 64"),
        (lambda: run(x, weight, torch.ones(4), "fp32"), ValueError, "bias must have shape"),
        (lambda: grouped(x, weight, [1, 1]), ValueError, "multiple of 32 rows"),
        (lambda: grouped(x[0], wide, [1, 1]), ValueError, r"\(rows, columns\)"),
        (lambda: grouped(x, wide, [1.0, 1.0]), ValueError, "int64"),
        (lambda: grouped(x, replace(wide, outlier_threshold=6.0), [1, 1]), ValueError, "outliers"),
        (lambda: run(x.double(), weight, None, "fp32"), ValueError, "float16, got .*float64"),
    ):
        with pytest.raises(error, match=message):
            call()
