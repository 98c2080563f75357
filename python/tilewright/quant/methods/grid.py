"""Grids: the values that the codes of a group can stand for, rounding to them, and the search for good ones.

A group is `group_size` consecutive columns of a row, -1 a whole row; the last one of a row may be short. Its grid is
``scale * (code - zero)`` with a whole zero, which for symmetric grids is 2**(bits-1). Matrices are worked on as
(N, groups, columns), short groups filled up with zeros, which are on every grid and widen no range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FP16_MIN_NORMAL, _FP16_MAX = 6.103515625e-05, 65504.0
# Rows are searched in pieces of about this many values: a dozen temporaries of that size stay near the cache.
_PIECE = 1 << 20
# Steps tried in a search, as parts of the one that covers the range exactly: 15 of them on a geometric ladder.
_LADDER = tuple(1.15 * 0.97**i for i in range(15))


@dataclass(frozen=True)
class Settings:
    """What the codes of a matrix are: bits 4 or 8; symmetric grids or zero points; the dtype that scales are stored
    in and therefore rounded to before codes are chosen, None: float16 where all scales are normal numbers there,
    else float32."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of symmetric grids."""
        return 2 ** (self.bits - 1)

    def split(self, w: Tensor) -> Tensor:
        """(N, K) as (N, groups, columns)."""
        n, k = w.shape
        size = k if self.group_size == -1 else self.group_size
        if not k:
            return w.reshape(n, 0, 1)
        return F.pad(w, (0, -k % size)).reshape(n, -(-k // size), size)

    def split_square(self, h: Tensor) -> Tensor:
        """The blocks on the diagonal of a (K, K) matrix that belong to the groups, (groups, columns, columns)."""
        size = h.shape[0] if self.group_size == -1 else self.group_size
        pad = -h.shape[0] % size
        h = F.pad(h, (0, pad, 0, pad))
        return torch.stack([h[i : i + size, i : i + size] for i in range(0, h.shape[0], size)])


@dataclass(frozen=True)
class Grid:
    """The grids of all groups of a matrix: scales float32 (N, groups), 0 where a group has no value but 0; zeros
    float32 (N, groups), None for symmetric grids."""

    scales: Tensor
    zeros: Tensor | None
    settings: Settings

    def codes(self, w: Tensor) -> Tensor:
        """The nearest codes to ``w`` (N, groups, columns), float32; half to even."""
        step = torch.where(self.scales != 0, self.scales, torch.full_like(self.scales, torch.inf)).unsqueeze(-1)
        # Farther from zero a value would be infinite.
        reach = torch.floor(torch.finfo(torch.float32).max / step.abs())
        codes = (w / step).round_()
        codes = torch.minimum(torch.maximum(codes, -reach, out=codes), reach, out=codes)
        return codes.add_(self._zero()).clamp_(0, self.settings.top)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (N, groups, columns) stand for."""
        return (codes - self._zero()) * self.scales.unsqueeze(-1)

    def column(self, group: int | Tensor) -> Grid:
        """The grid of one group of every row."""
        zeros = None if self.zeros is None else self.zeros[:, group, None]
        return Grid(self.scales[:, group, None], zeros, self.settings)

    def _zero(self) -> Tensor | int:
        return self.settings.middle if self.zeros is None else self.zeros.unsqueeze(-1)


@dataclass(frozen=True)
class Coded:
    """A matrix as codes on grids: codes uint8 (N, K)."""

    codes: Tensor
    grid: Grid

    @classmethod
    def nearest(cls, w: Tensor, grid: Grid) -> Coded:
        """``w`` (N, K) rounded to ``grid``."""
        return cls.of_groups(grid.codes(grid.settings.split(w)), grid, w.shape[1])

    @classmethod
    def of_groups(cls, codes: Tensor, grid: Grid, k: int) -> Coded:
        """From codes (N, groups, columns), of which a row has k."""
        return cls(codes.to(torch.uint8).flatten(1)[:, :k].contiguous(), grid)

    def dequantize(self) -> Tensor:
        """float32 (N, K)."""
        n, k = self.codes.shape
        return self.grid.values(self.grid.settings.split(self.codes.float())).reshape(n, -1)[:, :k].contiguous()

    def rows(self, start: int, stop: int) -> Coded:
        """Some of the rows."""
        zeros = None if self.grid.zeros is None else self.grid.zeros[start:stop]
        return Coded(self.codes[start:stop], Grid(self.grid.scales[start:stop], zeros, self.grid.settings))


def stored(scales: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Scales as they will be stored, float32; see `Settings.scale_dtype`."""
    if dtype is None:
        normal = scales[scales != 0].abs()
        fits = normal.numel() and float(normal.min()) >= _FP16_MIN_NORMAL and float(normal.max()) <= _FP16_MAX
        dtype = torch.float16 if fits else torch.float32
    return scales.to(dtype).float()


def range_grid(w: Tensor, settings: Settings) -> Grid:
    """The grids of rounding to nearest, which reach as far as the values ``w`` (N, groups, columns) do: symmetric
    ``scale = max|w| / (2**(bits-1) - 1)``, else [min, max], widened to include 0, spread over all codes."""
    low, high = torch.aminmax(w, dim=-1) if w.numel() else (w.sum(-1), w.sum(-1))
    if settings.symmetric:
        return Grid(stored(torch.maximum(-low, high) / (settings.middle - 1), settings.scale_dtype), None, settings)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = stored(high / settings.top - low / settings.top, settings.scale_dtype)  # high - low may overflow
    return Grid(scales, _zeros(low, scales, settings), settings)


def ladder(w: Tensor, settings: Settings, rungs: tuple[float, ...] = _LADDER) -> list[Grid]:
    """Grids with coarser and finer steps, for a search. The step that covers the range is a rung of 1: symmetric
    grids have one code more on the negative side, which the largest value takes, with a negative scale where that
    value is positive (and, since the other side may be nearly as long, with the other sign too)."""
    if not settings.symmetric:
        low, high = (x.clamp(max=0) if i == 0 else x.clamp(min=0) for i, x in enumerate(torch.aminmax(w, dim=-1)))
        grids = []
        for rung in rungs:
            scales = stored((high / settings.top - low / settings.top) * rung, settings.scale_dtype)
            grids.append(Grid(scales, _zeros(low * rung, scales, settings), settings))
        return grids
    longest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1) / settings.middle
    steps = [sign * rung * longest for rung in rungs for sign in (-1, 1)]
    return [Grid(stored(step, settings.scale_dtype), None, settings) for step in steps]


def best_of(w: Tensor, grids: list[Grid], loss: Callable[[Tensor], Tensor]) -> tuple[Grid, Tensor]:
    """For every group the grid with the smallest loss, and that. loss: errors (N, groups, columns) -> (N, groups)."""
    best, least = grids[0], loss(w - grids[0].values(grids[0].codes(w)))
    for grid in grids[1:]:
        best, least = better(best, least, grid, loss(w - grid.values(grid.codes(w))))
    return best, least


def better(best: Grid, least: Tensor, other: Grid, loss: Tensor) -> tuple[Grid, Tensor]:
    """Group by group, the one of two grids with the smaller loss; the first where they are equal."""
    wins = loss < least
    zeros = None if best.zeros is None else torch.where(wins, other.zeros, best.zeros)
    return Grid(torch.where(wins, other.scales, best.scales), zeros, best.settings), torch.where(wins, loss, least)


def quadratic_grid(w: Tensor, metric: Tensor, settings: Settings, rounds: int = 2) -> Grid:
    """The grids with the smallest ``e @ metric @ e`` over a ladder of steps, then refined: alternately the best codes
    for the step and the best step for the codes. w: (N, groups, columns), metric: (groups, columns, columns)."""

    def times(x: Tensor) -> Tensor:
        return torch.matmul(x.transpose(0, 1), metric).transpose(0, 1)

    def loss(errors: Tensor) -> Tensor:
        return (times(errors) * errors).sum(-1)

    def fit(w: Tensor) -> Grid:
        best, least = best_of(w, ladder(w, settings), loss)
        for _ in range(rounds):
            units = Grid(torch.ones_like(best.scales), best.zeros, settings).values(best.codes(w))
            pulled = times(units)
            scales = (pulled * w).sum(-1) / (pulled * units).sum(-1)
            scales = torch.where(torch.isfinite(scales), stored(scales, settings.scale_dtype), best.scales)
            other = Grid(scales, best.zeros, settings)
            best, least = better(best, least, other, loss(w - other.values(other.codes(w))))
        return best

    return in_pieces(w, fit)


def in_pieces(w: Tensor, fit: Callable[[Tensor], Grid]) -> Grid:
    """``fit`` on some rows of ``w`` (N, groups, columns) at a time."""
    rows = max(_PIECE // max(w[0].numel(), 1), 1) if len(w) else 1
    grids = [fit(piece) for piece in w.split(rows)]
    zeros = None if grids[0].zeros is None else torch.cat([grid.zeros for grid in grids])
    return Grid(torch.cat([grid.scales for grid in grids]), zeros, grids[0].settings)


def _zeros(low: Tensor, scales: Tensor, settings: Settings) -> Tensor:
    step = torch.where(scales > 0, scales, torch.full_like(scales, torch.inf))
    return (-low / step).round().clamp(0, settings.top)
