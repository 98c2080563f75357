"""How codes are chosen: each method against its definition, and against rounding to nearest in what it makes small."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from torch import Tensor

from tilewright import quantize_weight
from tilewright.quant.methods.awq import awq_codes, awq_scales
from tilewright.quant.methods.gptq import gptq
from tilewright.quant.methods.grid import Coded, Grid, Settings, quadratic_grid, range_grid
from tilewright.quant.methods.hqq import hqq_grid
from tilewright.quant.quantize import coded_weight

FORMATS = [
    Settings(bits, group_size, symmetric, dtype)
    for bits, group_size, symmetric, dtype in [
        (4, 32, True, torch.float16),
        (4, 32, False, torch.float16),
        (4, 16, True, torch.bfloat16),
        (4, 128, False, torch.bfloat16),  # one short group
        (4, 64, True, torch.float32),  # the last group is short
        (4, -1, True, torch.float16),
        (8, 32, True, torch.float16),
        (8, -1, False, torch.float32),
    ]
]


def name(settings: Settings) -> str:
    kind = "symmetric" if settings.symmetric else "zero"
    return f"int{settings.bits}-g{settings.group_size}-{kind}-{str(settings.scale_dtype).removeprefix('torch.')}"


formats = pytest.mark.parametrize("settings", FORMATS, ids=name)


def inputs(tokens: int = 400, k: int = 96, outliers: int = 0) -> Tensor:
    """Correlated activations; some columns twenty times as large as the others."""
    x = torch.randn(tokens, k) @ (torch.randn(k, k) / k**0.5 + 0.5 * torch.eye(k))
    x[:, torch.randperm(k)[:outliers]] *= 20
    return x


def nearest(w: Tensor, settings: Settings) -> Coded:
    return Coded.nearest(w, range_grid(settings.split(w), settings))


def output_error(w: Tensor, values: Tensor, x: Tensor) -> float:
    return float((x.double() @ (w - values).double().t()).square().mean())


# GPTQ.


def optimal_brain_quantiser(w: Tensor, hessian: Tensor, settings: Settings, damping: float, order: Tensor) -> Tensor:
    """Codes (N, K) by the definition, float64: round a column, spread its error over those not yet rounded by the
    inverse of their hessian, take the column out of that inverse. Grids are fitted when a group starts, or, when
    ``order`` is not the columns' own, beforehand."""
    n, k = w.shape
    size = k if settings.group_size == -1 else settings.group_size
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(k)
    static = not torch.equal(order, torch.arange(k))
    if static:
        grid = quadratic_grid(settings.split(w), settings.split_square(hessian.float()), settings)
    left, codes = w.double().clone(), torch.zeros(n, k)
    remaining = list(range(k))
    for j in order.tolist():
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        if static:
            column = grid.column(j // size)
        elif j % size == 0:
            # With the columns behind the group at their best, an error in it costs by its Schur complement.
            columns = [c for c in remaining if c < j + size]
            metric = torch.linalg.inv(inverse[: len(columns), : len(columns)])
            column = quadratic_grid(left[:, columns].float().unsqueeze(1), metric.float().unsqueeze(0), settings)
        code = column.codes(left[:, j].float().view(n, 1, 1))
        codes[:, j] = code.view(n)
        place = remaining.index(j)
        error = (left[:, j] - column.values(code).double().view(n)) / inverse[place, place]
        left[:, remaining] -= error[:, None] * inverse[place]
        remaining.remove(j)
    return codes.to(torch.uint8)


@formats
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_optimal_brain_quantiser(settings: Settings, act_order: bool) -> None:
    w, x = torch.randn(5, 160), inputs(600, 160, 3)
    hessian = x.t() @ x / len(x)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(160)
    expected = optimal_brain_quantiser(w, hessian, settings, 0.01, order)
    got = gptq(w, hessian, settings, damping=0.01, act_order=act_order).codes
    # A value within fp32's rounding of the middle between two codes may go to either, and moves what comes after it.
    same_rows = (got == expected).all(1)
    assert same_rows.sum() >= 4, f"{(got != expected).sum()} codes differ"
    assert (got.int() - expected.int()).abs().max() <= 1


@formats
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_changes_outputs_less(settings: Settings, act_order: bool) -> None:
    w, x = torch.randn(40, 96), inputs(outliers=4)
    coded = gptq(w, x.t() @ x / len(x), settings, act_order=act_order)
    rounded = output_error(w, nearest(w, settings).dequantize(), x)
    assert output_error(w, coded.dequantize(), x) < (0.7 if settings.bits == 4 else 0.95) * rounded


def test_gptq_without_correlations_rounds_to_the_nearest() -> None:
    settings = Settings(4, 32, True, torch.float16)
    w, hessian = torch.randn(9, 100), torch.rand(100).diag() + torch.eye(100)
    for act_order in (False, True):
        coded = gptq(w, hessian, settings, act_order=act_order)
        assert torch.equal(coded.codes, Coded.nearest(w, coded.grid).codes)


def test_gptq_hessians() -> None:
    settings = Settings(4, 32, True, torch.float16)
    w = torch.randn(4, 64)
    seldom = torch.eye(64)
    seldom[10, 10] = 0  # an input that never was anything but 0
    for hessian in (torch.zeros(64, 64), seldom, torch.ones(64, 64), 1e12 * torch.eye(64), 1e-12 * torch.eye(64)):
        error = (gptq(w, hessian, settings).dequantize() - w).abs().max()
        assert error < 1.5
    for bad in (torch.full((64, 64), torch.nan), torch.full((64, 64), torch.inf), -torch.eye(64)):
        with pytest.raises(ValueError, match="hessian must be"):
            gptq(w, bad, settings)
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 5
    with pytest.raises(ValueError, match="positive definite"):
        gptq(w, indefinite, settings)


# AWQ.


@formats
def test_awq_changes_outputs_less(settings: Settings) -> None:
    w, x = torch.randn(40, 96), inputs(outliers=4)
    hessian = x.t() @ x / len(x)
    scales = awq_scales(w, hessian, x.abs().mean(0), settings)
    scaled = w * scales
    rounded = output_error(w, nearest(w, settings).dequantize(), x)
    only_scaled = output_error(w, nearest(scaled, settings).dequantize() / scales, x)
    clipped = awq_codes(scaled, hessian / scales / scales[:, None], settings).dequantize() / scales
    assert only_scaled <= rounded
    assert output_error(w, clipped, x) < (0.8 if settings.bits == 4 else 1.0) * rounded


def test_awq_scales_favour_large_inputs() -> None:
    settings = Settings(4, 32, True, torch.float16)
    w, x = torch.randn(64, 96), torch.randn(500, 96)
    x[:, 7] *= 50
    scales = awq_scales(w, x.t() @ x / len(x), x.abs().mean(0), settings)
    assert int(scales.argmax()) == 7 and bool((scales > 0).all())
    # Inputs of one size leave nothing to favour; columns that see nothing are no reason for infinite factors.
    assert torch.equal(awq_scales(w, torch.eye(96), torch.ones(96), settings), torch.ones(96))
    dead = torch.ones(96)
    dead[3] = 0
    assert awq_scales(w, dead.diag(), dead, settings).isfinite().all()
    assert torch.equal(awq_scales(w, torch.zeros(96, 96), torch.zeros(96), settings), torch.ones(96))


# HQQ.


@formats
def test_hqq_in_its_own_norm(settings: Settings) -> None:
    w = torch.randn(30, 150) ** 3  # long tails
    grouped = settings.split(w)
    losses = []
    for grid in (range_grid(grouped, settings), hqq_grid(grouped, settings)):
        losses.append((grouped - grid.values(grid.codes(grouped))).abs().pow(0.7).sum(-1))
    assert bool((losses[1] <= losses[0]).all())
    assert losses[1].sum() < 0.99 * losses[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_by_name(symmetric: bool) -> None:
    w = torch.randn(70, 200)
    got = quantize_weight(w, 4, 64, symmetric, method="hqq")
    plain = quantize_weight(w, 4, 64, symmetric)
    assert got.format == plain.format and got.nbytes == plain.nbytes
    settings = Settings(4, 64, symmetric)
    assert_same_bits(got.dequantize(), Coded.nearest(w, hqq_grid(settings.split(w), settings)).dequantize())
    assert (got.dequantize() - w).square().mean() < (plain.dequantize() - w).square().mean()
    assert_same_bits(quantize_weight(w[:32], 4, 64, symmetric, method="hqq").dequantize(), got.dequantize()[:32])
    with pytest.raises(ValueError, match="method must be one of rtn, hqq, got 'best'"):
        quantize_weight(w, method="best")
    with pytest.raises(ValueError, match="NaN"):
        quantize_weight(torch.full((2, 32), torch.nan), method="hqq")


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1), (2, 33)])
def test_small_shapes(method: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    for symmetric in (True, False):
        got = quantize_weight(w, 8, 32, symmetric, method=method).dequantize()
        torch.testing.assert_close(got, w, rtol=0, atol=0.05)


# Grids and codes.


@formats
def test_codes_pack_as_they_are(settings: Settings) -> None:
    w = torch.randn(37, 100)
    w[5] = 0
    for grid in (range_grid, hqq_grid):
        coded = Coded.nearest(w, grid(settings.split(w), settings))
        assert_same_bits(coded_weight(coded).dequantize(), coded.dequantize())
        assert torch.equal(coded.grid.scales, coded.grid.scales.to(settings.scale_dtype).float())
        assert not coded.dequantize()[5].any()
        assert_same_bits(coded.rows(3, 9).dequantize(), coded.dequantize()[3:9])


def test_quadratic_grid_uses_its_metric() -> None:
    """A column that counts for nothing may be cut off; one that counts for much may not."""
    settings = Settings(4, 32, True, torch.float32)
    w = torch.randn(20, 32)
    w[:, 3] = 30
    metric = torch.eye(32)
    metric[3, 3] = 0
    free = quadratic_grid(w.view(20, 1, 32), metric.unsqueeze(0), settings)
    held = quadratic_grid(w.view(20, 1, 32), 1e4 * torch.eye(32).unsqueeze(0) + metric.unsqueeze(0), settings)
    assert bool((free.scales.abs() < 0.8 * held.scales.abs()).all())
    errors = w - Coded.nearest(w, held).dequantize()
    assert errors[:, 3].abs().max() < 2.5


def test_range_grid_of_huge_and_tiny_values() -> None:
    settings = Settings(4, 32, False)
    w = torch.tensor([[3e38, -3e38] * 16, [1e-40, -1e-40] * 16, [0.0] * 32])
    values = Coded.nearest(w, range_grid(settings.split(w), settings)).dequantize()
    assert values.isfinite().all()
    assert isinstance(range_grid(settings.split(w), settings), Grid)
    assert (values[0] - w[0]).abs().max() < 3e37
