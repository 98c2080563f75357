"""HQQ: scales and zero points that leave few large errors, found without any input.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. Their zero points are floats and
their scales stay as rounding to nearest has them; here zero points are whole numbers, so that the packed form stays
codes and zeros, and scales move too, which is all that symmetric grids have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.quant.methods.grid import Grid, Settings, best_of, better, in_pieces, ladder, range_grid, stored

_NORM = 0.7  # the exponent of the errors whose sum is made small
_ROUNDS = 10
_SHARPNESS, _GROWTH = 8.0, 1.2  # of the half-quadratic term, in steps of the grid; multiplied each round
# No step is so fine that a value ends more than half of one beyond the last code. Finer ones make this norm smaller
# and the model worse: a value that is cut off weighs more than many that are a little off.
_RUNGS = (1.0, 0.94, 0.97, 1.03, 1.06, 1.09, 1.12, 1.145)


def hqq_grid(w: Tensor, settings: Settings) -> Grid:
    """Grids for ``w`` float32 (N, groups, columns) whose errors have a small ``sum(|error| ** 0.7)``, at most that of
    rounding to nearest.

    Half-quadratic splitting: errors are split into a part that may stay (`_shrink`, which keeps what is large) and
    one that the grid is fitted to by least squares, alternately.
    """
    return in_pieces(w, lambda rows: _search(rows, settings))


def _search(w: Tensor, settings: Settings) -> Grid:
    def loss(errors: Tensor) -> Tensor:
        return errors.abs().pow_(_NORM).sum(-1)

    best, least = best_of(w, [range_grid(w, settings), *ladder(w, settings, _RUNGS)], loss)
    start, sharpness = best, _SHARPNESS
    current = best
    for _ in range(_ROUNDS):
        codes = current.codes(w)
        step = current.scales.unsqueeze(-1)
        outliers = _shrink((w - current.values(codes)) / torch.where(step != 0, step, 1.0), sharpness) * step
        current = _fit(w - outliers, codes, current, start)
        best, least = better(best, least, current, loss(w - current.values(current.codes(w))))
        sharpness *= _GROWTH
    return best


def _shrink(errors: Tensor, sharpness: float) -> Tensor:
    """The proximal operator of |x| ** 0.7: 0 for small errors, nearly all of large ones."""
    size = errors.abs()
    return errors.sign() * (size - size.clamp(min=1e-8) ** (_NORM - 1) / sharpness).clamp_(min=0)


def _fit(target: Tensor, codes: Tensor, grid: Grid, start: Grid) -> Grid:
    """Zero points, then scales, that fit ``codes`` to ``target`` best, scales near those of ``start``."""
    settings, zeros = grid.settings, grid.zeros
    if zeros is not None:
        step = torch.where(grid.scales != 0, grid.scales, torch.full_like(grid.scales, torch.inf)).unsqueeze(-1)
        zeros = (codes - target / step).mean(-1).round_().clamp_(0, settings.top)
    units = Grid(torch.ones_like(grid.scales), zeros, settings).values(codes)
    ratio = (units * target).sum(-1) / (units.square().sum(-1) * start.scales)
    scales = start.scales * torch.where(torch.isfinite(ratio), ratio, 1.0).clamp_(0.97, 1.03)
    return Grid(stored(scales, settings.scale_dtype), zeros, settings)
