"""Weights of float8_e4m3fn with scales per tensor, per row or per block, as DeepSeek's and Qwen's FP8 files have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.quant.pieces import FLOATS, expect, fit_groups, in_pieces
from tilewright.quant.weight import QuantizedWeight, pack


def from_fp8(weight: Tensor, scale: Tensor, block_size: Sequence[int] | None = None) -> QuantizedWeight:
    """``w = float(weight) * scale``, kept exactly.

    weight: float8_e4m3fn (N, K). scale, by block_size: None: one for all, () or (1,) or (1, 1), or one a row, (N,)
    or (N, 1); (rows, columns) of a block: (ceil(N / rows), ceil(K / columns)). Files call it weight_scale or, although
    it multiplies, weight_scale_inv. Its dtype is float32, float16, bfloat16, or float8_e8m0fnu, also as the uint8 that
    hold those (2**(byte - 127)). The packed form has one scale a row and block column.

    Raises TypeError or ValueError for other shapes and dtypes, for NaN in the weight, NaN or infinity in scale;
    NotImplementedError for blocks whose columns are no multiple of 16.
    """
    op = "from_fp8"
    weight = expect(op, "weight", weight, (torch.float8_e4m3fn,), (None, None))
    n, k = weight.shape
    scales = _scales(op, scale)
    if block_size is None:
        if scales.numel() != 1 and scales.shape not in ((n,), (n, 1)):
            raise ValueError(f"{op}: scale must have 1 element, or shape ({n},) or ({n}, 1), got {tuple(scale.shape)}")
        return pack_fp8(op, weight, scales.reshape(-1, 1).expand(n, 1), max(k, 1), "fp8")
    rows, group = block_sizes(op, block_size)
    blocks = (-(-n // rows), -(-k // group))
    if scales.shape != blocks:
        raise ValueError(
            f"{op}: scale must have shape {blocks} for blocks of {rows} x {group} of ({n}, {k}), "
            f"got {tuple(scale.shape)}"
        )
    return pack_fp8(op, weight, scales.repeat_interleave(rows, 0)[:n], group, "fp8")


def pack_fp8(op: str, weight: Tensor, scales: Tensor, group: int, source: str) -> QuantizedWeight:
    """weight: float8_e4m3fn (N, K); scales: float32 (N, groups), one for ``group`` columns."""
    codes = weight.view(torch.uint8)
    group, (scales,) = fit_groups(op, group, weight.shape[1], scales)

    def piece(rows: slice) -> QuantizedWeight:
        part = codes[rows].contiguous()
        if bool((part.bitwise_and(0x7F) == 0x7F).any()):
            raise ValueError(f"{op}: weight contains NaN")
        return pack(part, scales[rows].contiguous(), None, "e4m3", group, source=source)

    return in_pieces(weight.shape, piece)


def block_sizes(op: str, given: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a block. Raises ValueError for anything but two positive integers."""
    if (
        not isinstance(given, Sequence)
        or len(given) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**31 for size in given)
    ):
        raise ValueError(f"{op}: block_size must be two positive integers, got {given!r}")
    return given[0], given[1]


def _scales(op: str, scale: Tensor) -> Tensor:
    """float32, any shape of up to two dimensions."""
    dims = (None,) * scale.dim() if isinstance(scale, Tensor) and scale.dim() <= 2 else ()
    scale = expect(op, "scale", scale, (*FLOATS, torch.float8_e8m0fnu, torch.uint8), dims)
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scales = scale.float()
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{op}: scale contains NaN or infinity")
    return scales
