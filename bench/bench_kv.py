"""Appending keys and values to a cache, beside slice assignment in torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.ops import kv_append

from . import main
from .harness import COLD_BYTES, CPU, OURS, SMALL_COLD_BYTES, Candidate, Case, Work, relative_error, under_pytest


@dataclass(frozen=True)
class Shape:
    """k, v (batch, kv_heads, seq, head_dim) in fp32, as the model makes them; caches of max_len in bf16."""

    name: str
    batch: int
    kv_heads: int
    seq: int
    head_dim: int
    max_len: int
    cold_bytes: int = COLD_BYTES


SHAPES = (
    Shape("decode 1x3x1x64 into 1024", 1, 3, 1, 64, 1024, cold_bytes=SMALL_COLD_BYTES),  # SmolLM2 135M
    Shape("prefill 1x3x512x64 into 1024", 1, 3, 512, 64, 1024, cold_bytes=SMALL_COLD_BYTES),
    Shape("decode 8x8x1x128 into 2048", 8, 8, 1, 128, 2048),  # Llama 3 8B
    Shape("prefill 1x8x1024x128 into 4096", 1, 8, 1024, 128, 4096),
)
GPU_SHAPES = SHAPES


def case(shape: Shape, peers: Sequence[str], device: torch.device = CPU) -> Case:
    """Inputs, candidates and check for one shape."""
    torch.manual_seed(0)
    cache = [
        torch.zeros(shape.batch, shape.kv_heads, shape.max_len, shape.head_dim, dtype=torch.bfloat16) for _ in "kv"
    ]
    k, v = (torch.randn(shape.batch, shape.kv_heads, shape.seq, shape.head_dim) for _ in "kv")
    begin = (shape.max_len - shape.seq) // 2
    positions = torch.arange(begin, begin + shape.seq)

    def assigned(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        cache_k[:, :, begin : begin + shape.seq] = k
        cache_v[:, :, begin : begin + shape.seq] = v
        return cache_k, cache_v

    def error(caches: tuple[Tensor, Tensor]) -> float:
        found = torch.stack([c[:, :, begin : begin + shape.seq] for c in caches])
        result = relative_error(found, torch.stack((k, v)).bfloat16())
        for c in caches:
            c.zero_()  # so that the next candidate does not pass on this one's work
        return result

    work = Work(2 * (k.nbytes + k.nbytes // 2))
    operands = tuple(t.to(device) for t in (*cache, k, v, positions))
    candidates = [Candidate(OURS, OURS, kv_append, operands, work)]
    if "torch" in peers:
        candidates.append(Candidate("torch", "torch", assigned, operands, work))
    return Case("kv", shape.name, candidates, error, tolerance=0.0, cold_bytes=shape.cold_bytes)


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def test_kv(benchmark: Any, shape: Shape) -> None:
    under_pytest(benchmark, case(shape, ()))


if __name__ == "__main__":
    sys.exit(main(["kv", *sys.argv[1:]]))
