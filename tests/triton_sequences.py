"""Operands of packed and paged attention that several test files share."""

from __future__ import annotations

import torch
from cases import seeded
from torch import Tensor

from tilewright.ops.attention_reference import Operands


def rand(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(name)).to(dtype)


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def packed(dtype: torch.dtype, group: int = 3) -> Operands:
    """Five sequences, one without queries, one without keys, one with more queries than keys, and rows of none."""
    return Operands(
        rand("q", 1, 2 * group, 130, 40, dtype=dtype), rand("k", 1, 2, 200, 40, dtype=dtype),
        rand("v", 1, 2, 200, 24, dtype=dtype), q_start=whole(0, 1, 40, 40, 60), q_end=whole(1, 40, 40, 60, 125),
        k_start=whole(0, 30, 60, 100, 100), k_end=whole(30, 60, 100, 100, 198),
    )  # fmt: skip


def paged(dtype: torch.dtype, seq_q: int, page_size: int) -> Operands:
    table = torch.randint(0, 70, (3, -(-700 // page_size)), generator=seeded("table"), dtype=torch.int32)
    table[1, 1:] = 1 << 30  # beyond the sequence anything may stand there
    return Operands(
        rand("q", 3, 6, seq_q, 64, dtype=dtype), rand("k", 70, 2, page_size, 64, dtype=dtype),
        rand("v", 70, 2, page_size, 64, dtype=dtype), k_start=whole(2, 0, 17), k_end=whole(300, 1, 690),
        block_table=table,
    )  # fmt: skip
