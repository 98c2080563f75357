"""The CUDA kernel of rope and of appending to caches, executed through its PTX: the CPU kernels' bits."""

from __future__ import annotations

from itertools import product

import cuda_device
import pytest
import torch
from cases import seeded
from compare import assert_same_bits
from ptx.compilers import needs_nvcc
from torch import Tensor

import tilewright

pytestmark = needs_nvcc
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def numbers(name: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=seeded(name)).to(dtype)


def tables(dim: int, positions: int) -> tuple[Tensor, Tensor]:
    return tilewright.rope_tables(10000.0, dim, positions)


def run_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    out_q, out_k = (torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in (q, k))
    cuda_device.module().rope(q, k, cos, sin, positions, out_q, out_k, interleaved, None)
    return out_q, out_k


def check_rope(q: Tensor, k: Tensor, rotary: int, positions: Tensor | None, interleaved: bool) -> None:
    cos, sin = tables(rotary, 100)
    expected = tilewright.rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    for found, wanted in zip(run_rope(q, k, cos, sin, positions, interleaved), expected, strict=True):
        assert_same_bits(found, wanted.contiguous())
    q, k = q.clone(), k.clone()
    cuda_device.module().rope(q, k, cos, sin, positions, q, k, interleaved, rotary)
    for found, wanted in zip((q, k), expected, strict=True):
        assert_same_bits(found.contiguous(), wanted.contiguous())


# head_dim and rotary_dim: whole vectors, odd, a rest that is copied.
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (128, 32), (6, 6), (17, 10), (256, 256), (72, 48)])
def test_rope_has_the_bits_of_the_cpu(dim: int, rotary: int, interleaved: bool) -> None:
    for dtype in (BF16, FP16, FP32) if dim < 128 else (BF16,):
        q, k = numbers("q", 2, 5, 3, dim, dtype=dtype), numbers("k", 2, 1, 3, dim, dtype=dtype)
        check_rope(q, k, rotary, None, interleaved)
        check_rope(q, k, rotary, torch.tensor([[5, 99, 0], [7, 7, 8]]), interleaved)


def test_rope_of_strided_heads() -> None:
    fused = numbers("fused", 2, 7, (6 + 2 + 2) * 64).view(2, 7, 10, 64).transpose(1, 2)
    check_rope(fused[:, :6], fused[:, 6:8], 64, torch.arange(93, 100), False)
    check_rope(fused[:, :6, ::2, :40], fused[:, 6:8, ::2, 3:43], 40, None, True)


def test_rope_outside_the_tables_is_nan() -> None:
    q = numbers("q", 1, 2, 4, 16)
    cos, sin = tables(8, 10)
    found, _ = run_rope(q, q, cos, sin, torch.tensor([3, 10, -1, 1 << 40]), False)
    assert found[:, :, 0].isfinite().all() and found[:, :, 1:, :8].isnan().all()
    assert torch.equal(found[..., 8:], q[..., 8:])


# How tokens find their slots, and of which dtypes k and the caches are.
PLACES = ("plain", "positions", "seqlens", "paged", "paged positions", "paged seqlens")
DTYPES = ((BF16, BF16), (FP32, BF16), (FP16, FP32), (BF16, FP16), (FP32, FP32))


def place(kind: str, batch: int, seq: int) -> dict[str, Tensor]:
    found = {}
    if "paged" in kind:
        pages = torch.randperm(batch * 5, generator=seeded(kind)).view(batch, 5)
        found["block_table"] = pages.to(torch.int32)
    if "positions" in kind:
        found["positions"] = torch.arange(seq).flip(0) * 2 + torch.arange(batch)[:, None]
    if "seqlens" in kind:
        found["cache_seqlens"] = torch.arange(batch, dtype=torch.int32 if "paged" in kind else torch.int64) * 3
    return found


def append(caches: tuple[Tensor, Tensor], k: Tensor, v: Tensor, **where: Tensor) -> None:
    names = ("positions", "block_table", "cache_seqlens")
    cuda_device.module().kv_append(*caches, k, v, *(where.get(name) for name in names))


@pytest.mark.parametrize(("kind", "dtypes"), list(zip(PLACES, (*DTYPES, DTYPES[0]), strict=True)), ids=str)
def test_append_has_the_bits_of_the_cpu(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    batch, seq = 3, 6
    for dim, v_dim in ((64, 64), (40, 24), (7, 5)):
        k, v = numbers("k", batch, 2, seq, dim, dtype=dtypes[0]), numbers("v", batch, 2, seq, v_dim, dtype=dtypes[0])
        outer, slots = (batch * 5, 4) if "paged" in kind else (batch, 16)
        caches = tuple(numbers("c", outer, 2, slots, d, dtype=dtypes[1]) for d in (dim, v_dim))
        where, expected = place(kind, batch, seq), tuple(c.clone() for c in caches)
        tilewright.kv_append(*expected, k, v, where.pop("positions", None), **where)
        append(caches, k, v, **place(kind, batch, seq))
        for found, wanted in zip(caches, expected, strict=True):
            assert_same_bits(found, wanted)


def test_append_of_tokens_with_one_slot_and_of_tokens_without() -> None:
    """The later one stays; what has no slot or page is not written. Blocks run in every order."""
    k = numbers("k", 2, 1, 5, 8)
    for seed in range(3):
        with cuda_device.module().watched(seed=seed, resident=3 if seed else 1):
            cache = torch.zeros(2, 1, 4, 8, dtype=BF16)
            positions = torch.tensor([[1, 1, 3, 4, -1], [2, 1 << 35, 0, 2, 2]])
            append((cache, cache.clone()), k, k, positions=positions)
            expected = torch.zeros_like(cache)
            expected[0, 0, 1], expected[0, 0, 3] = k[0, 0, 1], k[0, 0, 2]
            expected[1, 0, 2], expected[1, 0, 0] = k[1, 0, 4], k[1, 0, 2]
            assert torch.equal(cache, expected)
            # Both sequences share page 1; page 9 does not exist.
            pages, table = torch.zeros(3, 1, 2, 8, dtype=BF16), torch.tensor([[1, 2, 9], [0, 1, -1]], dtype=torch.int32)
            append((pages, pages.clone()), k, k, block_table=table)
            assert torch.equal(pages[1, 0], k[1, 0, 2:4]) and torch.equal(pages[0, 0], k[1, 0, :2])
            assert torch.equal(pages[2, 0], k[0, 0, 2:4])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", PLACES)
def test_rope_append(kind: str, interleaved: bool) -> None:
    batch, seq, dim = 2, 4, 64
    q, k, v = (numbers(n, batch, h, seq, dim) for n, h in (("q", 6), ("k", 2), ("v", 2)))
    cos, sin = tables(48, 64)
    outer, slots = (batch * 5, 4) if "paged" in kind else (batch, 16)
    caches = tuple(numbers(n, outer, 2, slots, dim) for n in "cd")
    expected, where = tuple(c.clone() for c in caches), place(kind, batch, seq)
    positions = where.get("positions")
    if positions is None:
        positions = torch.arange(seq) + where.get("cache_seqlens", torch.zeros(batch))[:, None].long()
    q_expected, k_rotated = tilewright.rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    append(expected, k_rotated, v, **where)
    slot = tuple(where.get(name) for name in ("positions", "block_table", "cache_seqlens"))
    cuda_device.module().rope_append(q, k, v, cos, sin, *caches, *slot, interleaved, None, q)
    assert_same_bits(q, q_expected)
    for found, wanted in zip(caches, expected, strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_k": torch.zeros(2, 3, 8, 16)}, "must be .batch, kv_heads"),
        ({"v": torch.zeros(2, 2, 3, 16, dtype=torch.float64)}, "float32, bfloat16"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions must be int64"),
        ({"block_table": torch.zeros(2, 2)}, "block_table must be int32"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, "cache_seqlens must be"),
        ({"cache_k": torch.zeros(2, 2, 1, 16).expand(2, 2, 8, 16)}, "must not share memory"),
    ],
)
def test_append_refuses(change: dict, message: str) -> None:
    arguments = {name: torch.zeros(2, 2, 8 if "cache" in name else 3, 16) for name in ("cache_k", "cache_v", "k", "v")}
    arguments |= dict.fromkeys(("positions", "block_table", "cache_seqlens")) | change
    with pytest.raises(ValueError, match=message):
        cuda_device.module().kv_append(*arguments.values())


def test_every_barrier_is_needed() -> None:
    assert cuda_device.surviving_mutants(test_append_of_tokens_with_one_slot_and_of_tokens_without) == {}


def test_runs_everywhere() -> None:
    with cuda_device.module().watched() as launches:
        for dtype, other in product((BF16, FP16, FP32), (BF16, FP16, FP32)):
            for dim in (32, 33):
                q, cache = numbers("q", 2, 2, 3, dim, dtype=dtype), torch.zeros(10, 2, 4, dim, dtype=other)
                for interleaved, where in product((False, True), (place("paged", 2, 3), {}, place("positions", 2, 3))):
                    slot = tuple(where.get(name) for name in ("positions", "block_table", "cache_seqlens"))
                    arguments = (*tables(16, 20), cache if "block_table" in where else cache[:2], cache.clone(), *slot)
                    arguments = (*arguments[:3], arguments[2].clone(), *slot)
                    cuda_device.module().rope_append(q, q, q, *arguments, interleaved, None, q.clone())
                for kind, integers in product(("seqlens", "paged seqlens"), (torch.int32, torch.int64)):
                    pages, where = cache if "paged" in kind else cache[:2], place(kind, 2, 3)
                    where["cache_seqlens"] = where["cache_seqlens"].to(integers)
                    append((pages.clone(), pages.clone()), q, q, **where)
    left = cuda_device.unexecuted(launches, "rope")
    assert left == [], "\n".join(left)
