"""Activations rounded to int8 as the CPU rounds them, for the integer kernels of linear layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import run


def quantised(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """x (m, k) as int8 codes (m, k rounded up to 32) and their scales, a row of m for each 32 columns or, per_token,
    one row: products read the scales of neighbouring rows together."""
    m, k = x.shape
    blocks = triton.cdiv(k, 32)
    padded = blocks * 32
    codes = torch.empty((m, padded), dtype=torch.int8, device=x.device)
    scales = torch.empty((1 if per_token else blocks, m), dtype=torch.float32, device=x.device)
    rows = 1 if per_token else min(triton.next_power_of_2(m), 8)  # 8 scales are 32 bytes, what memory moves at least
    columns = min(triton.next_power_of_2(blocks), 64 // rows) * 32
    run(
        _quantise,
        triton.cdiv(m, rows) * (1 if per_token else triton.cdiv(padded, columns)),
        {"x": x, "codes": codes, "scales": scales, "x_stride": x.stride(0), "m": m, "k": k, "padded": padded,
         "PER_TOKEN": per_token, "TILE": rows, "COLUMNS": columns},
        [triton.Config({}, num_warps=4, num_stages=1)],
        fuse=False,
    )  # fmt: skip
    return codes, scales


def rounded(x: Tensor, per_token: bool, outlier_threshold: float) -> Tensor:
    """x quantised and back, float32; values of at least ``outlier_threshold`` as they are and not part of a scale."""
    wide, outliers = x.float(), None
    if outlier_threshold:
        outliers = (wide.abs() >= outlier_threshold) & wide.isfinite()
        x = wide.masked_fill(outliers, 0)
    codes, scales = quantised(x, per_token)
    found = (codes.unflatten(1, (scales.shape[0], -1)) * scales.t().unsqueeze(2)).flatten(1)[:, : x.shape[1]]
    return found.contiguous() if outliers is None else torch.where(outliers, wide, found)


@triton.jit(do_not_specialize=["m"])
def _quantise(x, codes, scales, x_stride, m, k, padded, PER_TOKEN: tl.constexpr, TILE: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    """codes = x / scale to the nearest whole number, half to even, with scale = max|x| / 127 of 32 columns or,
    PER_TOKEN, of a row. Of a block with a NaN or infinity the codes are 0 and the scale is NaN. ``padded``: k rounded
    up to 32."""
    if PER_TOKEN:
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, COLUMNS)
        x += row * x_stride
        codes += row * padded
        top = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, k, COLUMNS):
            top = tl.maximum(top, _size(tl.load(x + first + column, mask=first + column < k, other=0.0)))
        scale, good = _scale(tl.max(top, 0))
        tl.store(scales + row, tl.where(good, scale, float("nan")))
        for first in range(0, padded, COLUMNS):
            value = tl.load(x + first + column, mask=first + column < k, other=0.0).to(tl.float32)
            tl.store(codes + first + column, _code(value, scale, good), mask=first + column < padded)
    else:
        parts = tl.cdiv(padded, COLUMNS)
        row = tl.program_id(0) // parts * TILE + tl.arange(0, TILE)
        start = tl.program_id(0) % parts * COLUMNS
        block = start // 32 + tl.arange(0, COLUMNS // 32)
        column = (block[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]
        inside = (row < m)[:, None] & (block * 32 < padded)[None, :]
        at = row.to(tl.int64)[:, None, None] * x_stride + column
        value = tl.load(x + at, mask=inside[:, :, None] & (column < k), other=0.0).to(tl.float32)
        scale, good = _scale(tl.max(_size(value), 2))
        at = block.to(tl.int64)[None, :] * m + row[:, None]
        tl.store(scales + at, tl.where(good, scale, float("nan")), mask=inside)
        # In another shape than x was read in: with one shape, a thread reads as many elements of x as it stores bytes.
        code = tl.reshape(_code(value, scale[:, :, None], good[:, :, None]), (TILE, COLUMNS))
        at = row.to(tl.int64)[:, None] * padded + start + tl.arange(0, COLUMNS)[None, :]
        tl.store(codes + at, code, mask=(row < m)[:, None] & (start + tl.arange(0, COLUMNS) < padded)[None, :])


@triton.jit
def _size(x):
    """|x| with infinity for NaN."""
    size = tl.abs(x.to(tl.float32))
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _scale(top):
    """(top / 127, whether it is finite)."""
    scale = tl.math.div_rn(top, 127.0)
    return scale, top < float("inf")


@triton.jit
def _code(x, scale, good):
    ratio = tl.math.div_rn(x, tl.where(good & (scale > 0.0), scale, 1.0))
    whole = (ratio + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is behind the point is rounded away
    return tl.where(good & (scale > 0.0), tl.minimum(tl.maximum(whole, -127.0), 127.0), 0.0).to(tl.int8)
