"""Rows of a packed weight as floats: embedding look-ups, and whole weights for gradients and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import direct, register, twin

SPEC = "int n, int k, int codes, int group_size, int offset, int scale"


def weight_rows(index: Tensor, packed: Tensor, spec: tuple[int, int, int, int, int, int]) -> Tensor:
    """float32 (len(index), k) of the rows ``index`` (int64, contiguous, 1-D) of a packed weight (see
    `QuantizedWeight.spec`). Raises IndexError for a row outside the weight."""
    if direct(index, packed):
        return _rows(index, packed, *spec)
    return torch.ops.tilewright.weight_rows(index, packed, *spec)


def _rows(index, packed, n, k, codes, group_size, offset, scale):
    if not packed.is_cpu:
        return twin("triton", "weight").gpu_weight(packed, n, k, codes, group_size, offset, scale).rows(index)
    out = torch.empty(index.shape[0], k, dtype=torch.float32, device="cpu")
    _C.weight_rows(index, packed, n, k, codes, group_size, offset, scale, out)
    return out


register(
    f"weight_rows(Tensor index, Tensor packed, {SPEC}) -> Tensor",
    _rows,
    lambda index, packed, n, k, *_: index.new_empty((index.shape[0], k), dtype=torch.float32),
    on_gpu=True,
)
