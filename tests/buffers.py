"""Tensors laid out so that reading or writing outside of them shows."""

from __future__ import annotations

import torch
from torch import Tensor

PAD = 5  # odd: rows begin misaligned for every vector width


def poisoned(t: Tensor, value: float = float("nan")) -> Tensor:
    """A view with t's values inside a larger buffer of ``value``: padding before, after and between rows."""
    rows = t.reshape(-1, t.shape[-1]) if t.dim() else t.reshape(1, 1)
    n, width = rows.shape
    buffer = torch.full((PAD + n * (width + PAD) + PAD,), value, dtype=t.dtype)
    inside = buffer[PAD : PAD + n * (width + PAD)].view(n, width + PAD)[:, :width]
    inside.copy_(rows)
    strides = torch.empty(t.shape[:-1]).stride()
    return buffer.as_strided(t.shape, (*(s * (width + PAD) for s in strides), 1), PAD)


def assert_padding_intact(view: Tensor) -> None:
    """No element of a `poisoned` view's buffer outside of the view has changed from NaN."""
    buffer = torch.tensor([], dtype=view.dtype).set_(view.untyped_storage())
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert buffer[outside].isnan().all(), "an element outside of the tensor was written"
