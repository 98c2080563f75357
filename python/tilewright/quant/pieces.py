"""What every converter does with a checkpoint's arrays: check them, fit their groups, pack them piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from tilewright.quant.weight import QuantizedWeight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
# Rows are converted in pieces of about this many elements: what lies between the file and the packed form stays
# in the cache, and small beside the weight.
_PIECE = 1 << 18
_BLOCK_ROWS = 32  # of the packed form, the unit in which pieces can be put one below the other


def expect(op: str, name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> Tensor:
    """The tensor, detached, if it has one of the dtypes and the shape (None: any size), lies in the CPU's memory,
    and holds no NaN or infinity where it is one of `FLOATS`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape ({sizes}), got {tuple(tensor.shape)}")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense CPU tensor, got {tensor.layout} on {tensor.device}")
    if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
        raise ValueError(f"{op}: {name} contains NaN or infinity")
    return tensor.detach()


def fit_groups(op: str, group: int, k: int, *per_group: Tensor | None) -> tuple[int, list[Tensor | None]]:
    """The packed form's group size for groups of ``group`` columns, and the (N, groups) tensors that belong to it.

    One group a row is -1. A multiple of 16 that the packed form lacks becomes 16, each value repeated.
    Raises NotImplementedError for other sizes.
    """
    if group >= k:
        return -1, list(per_group)
    if group == 16 or group % 32 == 0:
        return group, list(per_group)
    if group % 16:
        raise NotImplementedError(
            f"{op}: groups of {group} columns of {k} are not supported; supported: multiples of 16, and a whole row"
        )
    groups = -(-k // 16)
    return 16, [None if t is None else t.repeat_interleave(group // 16, 1)[:, :groups] for t in per_group]


def flat_groups(op: str, block: int, n: int, k: int, *per_block: Tensor) -> tuple[int, list[Tensor]]:
    """`fit_groups` for a weight (n, k) flattened row by row and cut into blocks of ``block`` elements, the last of
    which may be short; per_block: one value a block each, (blocks,). Where blocks cross rows, the groups are their
    largest common divisor with the row."""
    divisor = gcd(min(block, n * k), k)
    if divisor == block:
        return fit_groups(op, block, k, *(t.view(n, k // block) for t in per_block))
    starts = torch.arange(0, n * k, divisor).div_(block, rounding_mode="floor").view(n, k // divisor)
    return fit_groups(op, divisor, k, *(t[starts] for t in per_block))


def sort_groups(op: str, name: str, g_idx: Tensor, groups: int) -> tuple[int, Tensor | None]:
    """Act-order: the group size of ``g_idx`` (K,), the group of each column, and the order of columns that makes
    groups consecutive (a stable sort; None if they are already). Raises ValueError for indices outside of
    [0, groups) and for groups of different sizes (the last may be short)."""
    if not g_idx.numel():
        return 1, None
    low, high = (int(value) for value in g_idx.aminmax())
    if low < 0 or high >= groups:
        raise ValueError(f"{op}: {name} must be in [0, {groups}), the groups that scales has, got {low} to {high}")
    counts = g_idx.bincount(minlength=groups).tolist()
    if any(count != counts[0] for count in counts[:-1]) or not 0 < counts[-1] <= counts[0]:
        raise ValueError(f"{op}: {name} must give every group the same number of columns, got {_brief(counts)}")
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return counts[0], None
    return counts[0], g_idx.argsort(stable=True)


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


def in_pieces(
    shape: tuple[int, int], make: Callable[[slice], QuantizedWeight], elements: int = _PIECE
) -> QuantizedWeight:
    """A weight of this shape from ``make(rows)``, which packs a slice of its rows."""
    n, k = shape
    step = max(elements // max(k, 1) // _BLOCK_ROWS, 1) * _BLOCK_ROWS
    if n <= step:
        return make(slice(0, n))
    first = make(slice(0, step))
    packed = first.packed.new_empty(-(-n // _BLOCK_ROWS), first.packed.shape[1])
    packed[: first.packed.shape[0]] = first.packed
    for start in range(step, n, step):
        piece = make(slice(start, min(start + step, n)))
        if piece.spec()[1:] != first.spec()[1:]:
            # Pieces may differ in how they store scales; then all rows have to be seen at once.
            return make(slice(0, n))
        done = start // _BLOCK_ROWS
        packed[done : done + piece.packed.shape[0]] = piece.packed
    return replace(first, packed=packed, shape=(n, k))
