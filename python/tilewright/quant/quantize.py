"""quantize_weight: a dense matrix into codes that need nothing but the matrix."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tilewright.quant.methods.grid import Coded, Settings, range_grid
from tilewright.quant.methods.hqq import hqq_grid
from tilewright.quant.pieces import in_pieces
from tilewright.quant.weight import GROUP_SIZES, QuantizedWeight, pack

METHODS = {"rtn": range_grid, "hqq": hqq_grid}


def quantize_weight(
    w: Tensor,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    *,
    method: str = "rtn",
    straight_through: bool = False,
) -> QuantizedWeight:
    """Quantise ``w`` (N, K), any float dtype.

    Each group of ``group_size`` (16, 32, 64, 128, or -1 = a whole row) consecutive columns has one scale; the last
    group of a row may be short. ``method`` "rtn" rounds to nearest. Symmetric:
    ``scale = max|w| / (2**(bits-1) - 1)``. Otherwise the range [min, max], widened to include 0, is spread over all
    codes with an integer zero point. "hqq" searches for scales and zero points that leave fewer large errors
    (`quant.methods.hqq`; Badri and Shaji 2023); it takes some twenty times as long. Scales are rounded to fp16, where
    all of a weight's scales are normal numbers there, before the codes are chosen. With ``straight_through``,
    `quantized_linear` gives ``w`` the gradient that it would give its quantised value.

    Raises ValueError for other bits, group sizes, methods and shapes, and for NaN or inf in ``w``.
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"quantize_weight: w must be a floating-point tensor, got {getattr(w, 'dtype', type(w))}")
    if w.dim() != 2:
        raise ValueError(f"quantize_weight: w must have shape (N, K), got {tuple(w.shape)}")
    if w.is_meta:
        raise ValueError("quantize_weight: w must hold numbers, got a tensor on the meta device")
    if bits not in (4, 8):
        raise ValueError(f"quantize_weight: bits must be 4 or 8, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize_weight: group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    if method not in METHODS:
        raise ValueError(f"quantize_weight: method must be one of {', '.join(METHODS)}, got {method!r}")
    settings = Settings(bits, group_size, bool(symmetric))
    latent, w = w, w.detach()

    def piece(rows: slice) -> QuantizedWeight:
        part = w[rows].float()
        if not bool(part.isfinite().all()):
            raise ValueError("quantize_weight: w contains NaN or infinity")
        return coded_weight(Coded.nearest(part, METHODS[method](settings.split(part), settings)))

    weight = in_pieces((w.shape[0], w.shape[1]), piece)
    return replace(weight, latent=latent) if straight_through else weight


def coded_weight(coded: Coded) -> QuantizedWeight:
    """``coded`` in the packed layout."""
    grid, settings = coded.grid, coded.grid.settings
    zeros = None if grid.zeros is None else grid.zeros.to(coded.codes.dtype)
    offset = "none" if zeros is None else "zero"
    return pack(coded.codes, grid.scales, zeros, f"int{settings.bits}", settings.group_size, offset)
