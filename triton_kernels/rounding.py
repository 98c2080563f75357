"""Activations rounded to int8 as the CPU rounds them, for the integer kernels of linear layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewright.triton_kernels.launch import run


def quantised(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """x (m, k) as int8 codes (m, k rounded up to 32) and their scales, (m, 1) or one for each 32 columns."""
    m, k = x.shape
    blocks = triton.cdiv(k, 32)
    padded = blocks * 32
    codes = torch.empty((m, padded), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, 1 if per_token else blocks), dtype=torch.float32, device=x.device)
    columns = min(triton.next_power_of_2(blocks), 64) * 32
    run(
        _quantise,
        m * (1 if per_token else triton.cdiv(padded, columns)),
        {"x": x, "codes": codes, "scales": scales, "x_stride": x.stride(0), "k": k, "padded": padded,
         "PER_TOKEN": per_token, "COLUMNS": columns},
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
    found = (codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)).flatten(1)[:, : x.shape[1]]
    return found.contiguous() if outliers is None else torch.where(outliers, wide, found)


@triton.jit
def _quantise(x, codes, scales, x_stride, k, padded, PER_TOKEN: tl.constexpr, COLUMNS: tl.constexpr):
    """codes = x / scale to the nearest whole number, half to even, with scale = max|x| / 127 of 32 columns or,
    PER_TOKEN, of a row. Of a block with a NaN or infinity the codes are 0 and the scale is NaN. ``padded``: k rounded
    up to 32."""
    parts = 1 if PER_TOKEN else tl.cdiv(padded, COLUMNS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = tl.program_id(0) % parts * COLUMNS
    column = tl.arange(0, COLUMNS)
    block = tl.arange(0, COLUMNS // 32)
    x += row * x_stride
    codes += row * padded
    if PER_TOKEN:
        top = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, k, COLUMNS):
            top = tl.maximum(top, _size(tl.load(x + first + column, mask=first + column < k, other=0.0)))
        scale, good = _scale(tl.max(top, 0))
        tl.store(scales + row, tl.where(good, scale, float("nan")))
        for first in range(0, padded, COLUMNS):
            value = tl.load(x + first + column, mask=first + column < k, other=0.0).to(tl.float32)
            tl.store(codes + first + column, _code(value, scale, good), mask=first + column < padded)
    else:
        value = tl.load(x + start + column, mask=start + column < k, other=0.0).to(tl.float32)
        value = tl.reshape(value, (COLUMNS // 32, 32))
        scale, good = _scale(tl.max(_size(value), 1))
        known = start + block * 32 < padded
        tl.store(scales + row * (padded // 32) + start // 32 + block, tl.where(good, scale, float("nan")), mask=known)
        code = tl.reshape(_code(value, scale[:, None], good[:, None]), (COLUMNS,))
        tl.store(codes + start + column, code, mask=start + column < padded)


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
