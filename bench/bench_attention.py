"""Attention beside torch's scaled_dot_product_attention, in both of its spellings for grouped queries."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewright
from tilewright import QuantizedKV
from tilewright.ops.attention import attention_reference

from . import main
from .harness import COLD_BYTES, CPU, OURS, SMALL_COLD_BYTES, Candidate, Case, Work, relative_error, under_pytest

BF16, F32 = torch.bfloat16, torch.float32
_CHECKED_ROWS = 32  # queries at either end, of the first and the last head, that are compared with the reference
_LARGEST_TORCH_MASK = 1 << 25  # elements; torch has windows only as masks


@dataclass(frozen=True)
class Shape:
    """q (batch, heads, seq_q, head_dim), k and v (batch, kv_heads, seq_k, head_dim)."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    dtype: torch.dtype = BF16
    causal: bool = False
    window: int = -1  # keys to the left of the diagonal
    mask: bool = False  # additive, of the full shape
    backward: bool = False
    bits: int | None = None  # of a QuantizedKV that ours reads; torch gets what it stands for in dtype
    cold_bytes: int = COLD_BYTES


SHAPES = (
    # Llama 3 8B, Mistral 7B
    Shape("prefill 1x32(8)x1024x128 bf16", 1, 32, 8, 1024, 1024, 128, causal=True),
    Shape("prefill 1x32(8)x4096x128 bf16", 1, 32, 8, 4096, 4096, 128, causal=True),
    Shape("prefill 1x32(8)x1024x128 fp32", 1, 32, 8, 1024, 1024, 128, F32, causal=True),
    Shape("decode 1x32(8) 16384 keys bf16", 1, 32, 8, 1, 16384, 128),
    Shape("decode 1x32(8) 16384 keys int8", 1, 32, 8, 1, 16384, 128, bits=8),
    Shape("decode 8x32(8) 2048 keys bf16", 8, 32, 8, 1, 2048, 128),
    Shape("masked 1x32(8)x1024x128 bf16", 1, 32, 8, 1024, 1024, 128, mask=True),
    Shape("unmasked 1x32(8)x1024x128 bf16", 1, 32, 8, 1024, 1024, 128),
    Shape("backward 1x32(8)x1024x128 bf16", 1, 32, 8, 1024, 1024, 128, causal=True, backward=True, cold_bytes=0),
    # BERT base
    Shape("encoder 8x12x512x64 bf16", 8, 12, 12, 512, 512, 64),
    # SmolLM2 135M
    Shape("prefill 1x9(3)x512x64 bf16", 1, 9, 3, 512, 512, 64, causal=True, cold_bytes=SMALL_COLD_BYTES),
    Shape("decode 1x9(3) 1024 keys bf16", 1, 9, 3, 1, 1024, 64, cold_bytes=SMALL_COLD_BYTES),
    # head_dim 64 with a sliding window: time should grow with the length, not with its square
    Shape("window 512 1x16(4)x4096x64 bf16", 1, 16, 4, 4096, 4096, 64, causal=True, window=512),
    Shape("window 512 1x16(4)x16384x64 bf16", 1, 16, 4, 16384, 16384, 64, causal=True, window=512),
)
GPU_SHAPES = tuple(shape for shape in SHAPES if shape.dtype != F32)


def case(shape: Shape, peers: Sequence[str], device: torch.device = CPU) -> Case:
    """Inputs, candidates and check for one shape."""
    torch.manual_seed(0)

    def tensor(heads: int, seq: int) -> Tensor:
        return torch.randn(shape.batch, heads, seq, shape.head_dim, dtype=shape.dtype)

    q, k, v = tensor(shape.heads, shape.seq_q), *(tensor(shape.kv_heads, shape.seq_k) for _ in "kv")
    mask = None
    if shape.mask:
        mask = torch.randn(shape.batch, shape.heads, shape.seq_q, shape.seq_k, dtype=shape.dtype)
    options: dict[str, Any] = {"causal": "bottom_right" if shape.causal else None}
    if shape.window >= 0:
        options["window"] = (shape.window, -1)

    def ours(q: Tensor, k: Tensor | QuantizedKV, v: Tensor | None, mask: Tensor | None) -> Tensor:
        return tilewright.attention(q, k, v, mask=mask, **options)

    cache = None
    if shape.bits is not None:
        cache = QuantizedKV.empty(shape.batch, shape.kv_heads, shape.seq_k, shape.head_dim, shape.bits)
        tilewright.kv_append(cache, k, v)
        k, v = (x.to(shape.dtype) for x in cache.dequantize())
    check = _Check(shape, q, k, v, mask, options)  # on the CPU
    q, k, v, mask = (x if x is None else x.to(device) for x in (q, k, v, mask))
    operands: tuple[Any, ...] = (q, k, v, mask) if cache is None else (q, cache.to(device), None, mask)
    candidates = [(OURS, OURS, ours, operands)]
    if "torch" in peers:
        candidates += _torch(shape, q, k, v, mask)
    work = _work(shape, None if cache is None else cache.nbytes)
    if shape.backward:
        grad = torch.randn_like(q)
        made = [Candidate(n, lib, *_backward(run, operands, grad), work) for n, lib, run, operands in candidates]
        return Case("attention", shape.name, made, cold_bytes=0)
    made = [Candidate(name, library, run, operands, work) for name, library, run, operands in candidates]
    tolerance = 1e-4 if shape.dtype == F32 else 0.02
    return Case("attention", shape.name, made, check, tolerance, shape.cold_bytes)


def _torch(shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[tuple[Any, ...]]:
    causal = shape.causal
    if shape.window >= 0:
        if shape.seq_q * shape.seq_k > _LARGEST_TORCH_MASK:
            return []
        distance = (torch.arange(shape.seq_q).view(-1, 1) - torch.arange(shape.seq_k)).to(q.device)
        mask, causal = (distance >= 0) & (distance <= shape.window), False
    group = shape.heads // shape.kv_heads

    def spelled(enable_gqa: bool) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=enable_gqa)

        return run

    if group == 1:
        return [("torch sdpa", "torch", spelled(False), (q, k, v, mask))]
    repeated = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    return [
        ("torch enable_gqa", "torch", spelled(True), (q, k, v, mask)),
        ("torch K, V repeated", "torch", spelled(False), (q, *repeated, mask)),
    ]


def _backward(run: Any, operands: tuple[Any, ...], grad: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The backward pass alone: the forward one happens here, once."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in operands]
    inputs = [t for t in leaves if isinstance(t, Tensor)]
    with torch.enable_grad():
        out = run(*leaves)

    def backward(out: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return backward, (out, inputs, grad)


def _work(shape: Shape, cache_bytes: int | None) -> Work:
    """Two products of head_dim for each pair of a query and a key that it attends to; backward makes five. Keys and
    values are `cache_bytes` where they are quantised."""
    first = shape.seq_k - shape.seq_q  # of the diagonal
    pairs = 0
    for query in range(shape.seq_q):
        last = min(shape.seq_k, first + query + 1) if shape.causal else shape.seq_k
        pairs += last - (max(0, first + query - shape.window) if shape.window >= 0 else 0)
    products = 5 if shape.backward else 2
    operations = products * 2 * shape.head_dim * pairs * shape.batch * shape.heads
    rows = 2 * shape.heads * shape.seq_q + 2 * shape.kv_heads * shape.seq_k
    if shape.backward:
        rows *= 2
    elements = shape.batch * rows * shape.head_dim
    if shape.mask:
        elements += shape.batch * shape.heads * shape.seq_q * shape.seq_k
    nbytes = elements * shape.dtype.itemsize
    if cache_bytes is not None:
        nbytes += cache_bytes - 2 * shape.batch * shape.kv_heads * shape.seq_k * shape.head_dim * shape.dtype.itemsize
    return Work(nbytes, operations, "bf16" if shape.dtype == BF16 else "fp32")


@dataclass(frozen=True)
class _Check:
    """The largest relative error over the rows that are compared."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    def __call__(self, out: Tensor) -> float:
        shape, group, worst = self.shape, self.shape.heads // self.shape.kv_heads, 0.0
        n = min(_CHECKED_ROWS, shape.seq_q)
        for head in {0, shape.heads - 1}:
            kv = slice(head // group, head // group + 1)
            for start in {0, shape.seq_q - n}:
                rows = slice(start, start + n)
                # Bottom-right: these queries are the last of a sequence that ends with them.
                end = start + n + shape.seq_k - shape.seq_q if shape.causal else shape.seq_k
                mask = None if self.mask is None else self.mask[:, head : head + 1, rows, :end]
                q, k, v = self.q[:, head : head + 1, rows], self.k[:, kv, :end], self.v[:, kv, :end]
                expected, _ = attention_reference(q, k, v, mask=mask, **self.options)
                error = relative_error(out[:, head : head + 1, rows], expected)
                worst = math.nan if math.isnan(error) else max(worst, error)
        return worst


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def test_attention(benchmark: Any, shape: Shape) -> None:
    under_pytest(benchmark, case(shape, ()))


if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]]))
