"""GPTQ: columns are rounded one after the other, and each one's error is made good by the columns to come.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, arXiv:2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.quant.methods.grid import Coded, Grid, Settings, quadratic_grid

# Errors reach the columns behind a block in one product; groups of 16 to 128 columns divide it.
_BLOCK = 128


def gptq(w: Tensor, hessian: Tensor, settings: Settings, *, damping: float = 0.01, act_order: bool = False) -> Coded:
    """Codes of ``w`` float32 (N, K) such that ``(w - values) @ hessian @ (w - values).T`` is small.

    hessian: (K, K), the mean of ``x.T @ x`` over the inputs x of calibration. ``damping`` times the mean of its
    diagonal is added to the diagonal. act_order: the columns with the largest inputs first, groups fitted to ``w``
    beforehand; else columns in their order, a group fitted when its first column is reached.
    Raises ValueError for a hessian that is not finite or not positive semi-definite.
    """
    n, k = w.shape
    hessian = damped(hessian, damping)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k)
    size = k if settings.group_size == -1 else settings.group_size
    group_of = order // max(size, 1)
    fitted = quadratic_grid(settings.split(w), settings.split_square(hessian.float()), settings) if act_order else None
    factor = _inverse_factor(hessian[order][:, order]).float()

    left = w.t()[order].contiguous()  # (K, N): what is left to round, column by column of w
    codes = torch.empty_like(left)
    grids: list[Grid] = []
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = torch.empty(stop - start, n)
        for j in range(start, stop):
            if fitted is not None:
                grid = fitted.column(group_of[j])
            else:
                if j % size == 0:
                    grids.append(_fit_group(left[j : j + size], factor[j : j + size, j : j + size], settings))
                grid = grids[-1]
            column = grid.codes(left[j].view(n, 1, 1))
            codes[j] = column.view(n)
            errors[j - start] = (left[j] - grid.values(column).view(n)) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        left[stop:] -= factor[start:stop, stop:].t() @ errors
    in_order = torch.empty_like(codes).index_copy_(0, order, codes).t()
    return Coded(in_order.to(torch.uint8).contiguous(), fitted if fitted is not None else _beside(grids, settings))


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` in float64 with ``damping`` times the mean of its diagonal added to the diagonal; the identity for
    inputs that were all zero."""
    hessian = hessian.double()
    mean = float(hessian.diagonal().mean()) if len(hessian) else 1.0
    if not 0 <= mean < float("inf"):
        raise ValueError(f"gptq: hessian must be finite with a diagonal of squares, got a mean of {mean} there")
    if mean == 0:
        return torch.eye(len(hessian), dtype=torch.float64)
    return hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular u with u.T @ u = inverse of ``hessian``. Row j, divided by its diagonal, says what an error in
    column j does to the best choice of the columns behind it, those before it being fixed."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise ValueError("gptq: hessian must be positive definite after damping; use more calibration text or damping")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _fit_group(columns: Tensor, factor: Tensor, settings: Settings) -> Grid:
    """The grid of one group. columns: (size, N); factor: the group's block of the inverse's factor, which says how
    much of an error is left once all columns behind the group have done their best."""
    inverse = torch.linalg.solve_triangular(factor.double(), torch.eye(len(factor), dtype=torch.float64), upper=True)
    metric = (inverse @ inverse.t()).float()
    return quadratic_grid(columns.t().unsqueeze(1), metric.unsqueeze(0), settings)


def _beside(grids: list[Grid], settings: Settings) -> Grid:
    zeros = None if settings.symmetric else torch.cat([grid.zeros for grid in grids], dim=1)
    return Grid(torch.cat([grid.scales for grid in grids], dim=1), zeros, settings)
