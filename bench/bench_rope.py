"""Rotary embedding of queries and keys, beside transformers' formula in torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.ops import rope, rope_tables
from tilewright.ops.rope import rope_reference

from . import main
from .harness import COLD_BYTES, CPU, OURS, SMALL_COLD_BYTES, Candidate, Case, Work, relative_error, under_pytest

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Shape:
    """q (1, heads, seq, head_dim), k (1, kv_heads, seq, head_dim)."""

    name: str
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    dtype: torch.dtype = F32
    cold_bytes: int = COLD_BYTES


SHAPES = (
    Shape("1x9(3)x1x64 fp32", 9, 3, 1, 64, cold_bytes=SMALL_COLD_BYTES),  # SmolLM2 135M
    Shape("1x9(3)x512x64 fp32", 9, 3, 512, 64, cold_bytes=SMALL_COLD_BYTES),
    Shape("1x32(8)x1x128 fp32", 32, 8, 1, 128, cold_bytes=SMALL_COLD_BYTES),  # Llama 3 8B
    Shape("1x32(8)x1024x128 fp32", 32, 8, 1024, 128),
    Shape("1x32(8)x1024x128 bf16", 32, 8, 1024, 128, BF16),
)
GPU_SHAPES = SHAPES


def case(shape: Shape, peers: Sequence[str], device: torch.device = CPU) -> Case:
    """Inputs, candidates and check for one shape."""
    torch.manual_seed(0)
    q = torch.randn(1, shape.heads, shape.seq, shape.head_dim).to(shape.dtype)
    k = torch.randn(1, shape.kv_heads, shape.seq, shape.head_dim).to(shape.dtype)
    cos, sin = rope_tables(10000.0, shape.head_dim, shape.seq)
    work = Work(2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes, 3 * (q.numel() + k.numel()), "fp32")
    operands = tuple(t.to(device) for t in (q, k, cos, sin))
    candidates = [Candidate(OURS, OURS, rope, operands, work)]
    if "torch" in peers:
        wide = [torch.cat((table, table), -1).to(shape.dtype) for table in operands[2:]]
        candidates.append(Candidate("torch", "torch", _torch_rope, (*operands[:2], *wide), work))
    expected, _ = rope_reference(q, k, cos, sin)
    return Case(
        "rope",
        shape.name,
        candidates,
        lambda out: relative_error(out[0], expected),
        tolerance=1e-5 if shape.dtype == F32 else 0.02,
        cold_bytes=shape.cold_bytes,
    )


def _torch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return rotated(q), rotated(k)


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def test_rope(benchmark: Any, shape: Shape) -> None:
    under_pytest(benchmark, case(shape, ()))


if __name__ == "__main__":
    sys.exit(main(["rope", *sys.argv[1:]]))
