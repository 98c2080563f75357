"""RMS norm and layer norm of rows, with the residual sum before them: out = norm(x + residual) * weight + bias.

Each element is read once and written once or twice, so memory decides; statistics are float32, the variance is taken
around the mean in a second pass over registers. Rows up to 8,192 columns stay in registers, short ones share a
program; longer rows are read again from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import check_floats, row_offset, rows, run

_REGISTERS = 8192  # columns of a row that stay in registers: 32 a thread with 8 warps
_TILE = 2048  # elements of a program that takes several rows


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """`tilewright.rms_norm`, or with ``centred`` `tilewright.layer_norm`: (normalised, x + residual or None)."""
    op = "layer_norm" if centred else "rms_norm"
    _check(op, x, residual, weight, bias)
    x, *x_rows = rows(x)
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    n = x.shape[-1]
    if x.numel() == 0:
        return out, total
    residual_rows = x_rows
    if residual is not None:
        residual, *residual_rows = rows(residual)
    # The results are laid out as x, or contiguous where x has gaps.
    _, *out_rows = rows(out)
    count, columns = x.numel() // n, min(triton.next_power_of_2(n), _REGISTERS)
    block = max(_TILE // columns, 1)
    warps = 4 if block > 1 or columns <= 2048 else 8
    run(
        _norm,
        triton.cdiv(count, block),
        {"x": x, "residual": residual, "weight": weight, "bias": bias, "out": out, "total": total,
         "x_rows": tuple(x_rows), "residual_rows": tuple(residual_rows), "out_rows": tuple(out_rows), "count": count,
         "n": n, "eps": eps, "CENTRED": centred, "ROWS": block, "COLUMNS": columns, "ONE": n <= columns},
        [triton.Config({}, num_warps=warps, num_stages=1)],
    )  # fmt: skip
    return out, total


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    check_floats(op, x=x, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{op}: residual must have x's shape and dtype {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.shape != x.shape[-1:] or (t.stride(0) != 1 and t.shape[0] > 1):
            raise ValueError(f"{op}: {name} must be contiguous with shape ({x.shape[-1]},), got {tuple(t.shape)}")
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{op}: {name} must be float32 or x's dtype {x.dtype}, got {t.dtype}")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise ValueError(f"{op}: weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}")


@triton.jit
def _summed(x, residual, total, row, first, x_rows, residual_rows, out_rows, count, n, STORE: tl.constexpr,
            COLUMNS: tl.constexpr):  # fmt: skip
    """x + residual, rounded to x's dtype, of columns from ``first`` on, as float32; zero outside."""
    column = first + tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < n)[None, :]
    value = tl.load(x + row_offset(row, x_rows[0], x_rows[1])[:, None] + column[None, :], mask=inside, other=0.0)
    if residual is not None:
        at = row_offset(row, residual_rows[0], residual_rows[1])[:, None] + column[None, :]
        more = tl.load(residual + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        if STORE:
            tl.store(total + row_offset(row, out_rows[0], out_rows[1])[:, None] + column[None, :], value, mask=inside)
    return value.to(tl.float32), inside


@triton.jit
def _finish(value, rstd, weight, bias, out, row, first, inside, out_rows, n, COLUMNS: tl.constexpr):
    """Scales, shifts and stores what is centred already."""
    column = first + tl.arange(0, COLUMNS)
    value *= rstd[:, None]
    if weight is not None:
        value *= tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    at = row_offset(row, out_rows[0], out_rows[1])[:, None] + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _norm(x, residual, weight, bias, out, total, x_rows, residual_rows, out_rows, count, n, eps,
          CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if ONE:
        value, inside = _summed(x, residual, total, row, 0, x_rows, residual_rows, out_rows, count, n, True, COLUMNS)
        if CENTRED:
            value = tl.where(inside, value - (tl.sum(value, 1) / n)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / n + eps)
        _finish(value, rstd, weight, bias, out, row, 0, inside, out_rows, n, COLUMNS)
    else:
        mean = tl.zeros([ROWS], tl.float32)
        if CENTRED:
            for first in range(0, n, COLUMNS):
                value, _ = _summed(x, residual, total, row, first, x_rows, residual_rows, out_rows, count, n, False,
                                   COLUMNS)  # fmt: skip
                mean += tl.sum(value, 1)
            mean /= n
        squares = tl.zeros([ROWS], tl.float32)
        for first in range(0, n, COLUMNS):
            value, inside = _summed(x, residual, total, row, first, x_rows, residual_rows, out_rows, count, n, True,
                                    COLUMNS)  # fmt: skip
            if CENTRED:
                value = tl.where(inside, value - mean[:, None], 0.0)
            squares += tl.sum(value * value, 1)
        rstd = 1.0 / tl.sqrt_rn(squares / n + eps)
        for first in range(0, n, COLUMNS):
            value, inside = _summed(x, residual, total, row, first, x_rows, residual_rows, out_rows, count, n, False,
                                    COLUMNS)  # fmt: skip
            if CENTRED:
                value -= mean[:, None]
            _finish(value, rstd, weight, bias, out, row, first, inside, out_rows, n, COLUMNS)
