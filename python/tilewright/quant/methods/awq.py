"""AWQ: weights that meet large inputs are scaled up before they are rounded, and their inputs down.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", 2023, arXiv:2306.00978.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.quant.methods.grid import Coded, Settings, quadratic_grid, range_grid

_STEPS = 20  # powers of the inputs' magnitude that are tried: 0, 1/20, ... 19/20


def awq_scales(w: Tensor, hessian: Tensor, magnitude: Tensor, settings: Settings) -> Tensor:
    """The factors (K,) by which to multiply the columns of ``w`` (and to divide its inputs) before rounding.

    Powers of ``magnitude``, the mean of |x| over the inputs of calibration (K,), of which the one is chosen whose
    rounding to nearest changes the outputs least: ``sum((w - values) @ hessian * (w - values))``, hessian (K, K)
    being the mean of ``x.T @ x``.
    """
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max()) or 1.0)
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(_STEPS):
        scales = magnitude ** (step / _STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = w * scales
        errors = Coded.nearest(scaled, range_grid(settings.split(scaled), settings)).dequantize().sub_(scaled)
        errors /= scales
        loss = float(((errors @ hessian) * errors).sum())
        if loss < least:
            best, least = scales, loss
    return best


def awq_codes(w: Tensor, hessian: Tensor, settings: Settings) -> Coded:
    """Codes of ``w`` on the grids that change its outputs least, group by group: AWQ's clipping, a search over steps
    up to much finer ones than cover the range. w: with its columns multiplied by `awq_scales` already, and the
    hessian that of the smaller inputs."""
    grid = quadratic_grid(settings.split(w), settings.split_square(hessian), settings)
    return Coded.nearest(w, grid)
