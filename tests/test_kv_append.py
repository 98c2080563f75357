"""kv_append: new keys and values into dense and paged caches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from buffers import assert_padding_intact, poisoned
from compare import assert_same_bits
from torch import Tensor

import tilewright
from tilewright.ops.kv_append import kv_append_reference


@dataclass(frozen=True)
class Case:
    batch: int
    kv_heads: int
    seq: int
    head_dim: int
    v_dim: int | None = None
    where: str | None = None  # None, "seq", "batch", "one", "lengths32", "lengths64"
    paged: bool = False


CASES = [
    Case(1, 3, 1, 64, where="seq"),  # decode
    Case(4, 3, 1, 64, where="lengths32"),
    Case(2, 3, 9, 64),
    Case(1, 1, 12, 128, where="one"),
    Case(3, 2, 5, 80, 33, "batch"),
    Case(2, 1, 4, 7, 16, "lengths64"),
    Case(2, 2, 3, 1, 1),
    Case(2, 3, 1, 64, where="lengths32", paged=True),
    Case(2, 2, 9, 24, 17, paged=True),
    Case(3, 2, 5, 64, where="batch", paged=True),
]
MAX_LEN, PAGE_SIZE, BLOCKS = 20, 4, 16


def tensors(case: Case, dtype: torch.dtype, cache_dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """(cache_k, cache_v, k, v) and the keywords that say where the tokens go."""
    dims = case.head_dim, case.v_dim or case.head_dim
    first, slots = (BLOCKS, PAGE_SIZE) if case.paged else (case.batch, MAX_LEN)
    caches = (torch.randn(first, case.kv_heads, slots, d).to(cache_dtype) for d in dims)
    new = (torch.randn(case.batch, case.kv_heads, case.seq, d).to(dtype) for d in dims)
    kwargs: dict[str, Tensor] = {}
    if case.where in ("seq", "one", "batch"):
        rows = case.batch if case.where == "batch" else 1
        positions = torch.stack([torch.randperm(MAX_LEN)[: case.seq] for _ in range(rows)])
        kwargs["positions"] = positions[0] if case.where == "seq" else positions
    elif case.where is not None:
        lengths = torch.randint(0, MAX_LEN - case.seq + 1, (case.batch,))
        kwargs["cache_seqlens"] = lengths.int() if case.where == "lengths32" else lengths
    if case.paged:
        blocks = MAX_LEN // PAGE_SIZE
        kwargs["block_table"] = torch.randperm(BLOCKS)[: case.batch * blocks].view(case.batch, blocks).int()
    return (*caches, *new), kwargs


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_the_reference(case: Case, cache_dtype: torch.dtype, dtype: torch.dtype, kernel_impl: str) -> None:
    args, kwargs = tensors(case, dtype, cache_dtype)
    want = kv_append_reference(*args, **kwargs)
    padded = [poisoned(t) for t in args]
    results = tilewright.kv_append(*padded, **kwargs)
    assert tilewright.last_impl("kv_append") == kernel_impl
    for result, view, expected in zip(results, padded[:2], want, strict=True):
        assert result is view
        assert_same_bits(result, expected)
        assert_padding_intact(view)


def test_every_value_converts_as_in_torch() -> None:
    """All 2^16 values of the 16-bit types; of float32 every exponent with mantissas around each rounding border."""
    bits16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    step = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]).repeat_interleave(3) << 13
    borders = torch.cat([(step + (half << shift) + d) & 0x7FFFFF
                         for shift in (11, 12, 14, 15, 16, 20) for half in (0, 1, 3) for d in (-1, 0, 1)])  # fmt: skip
    exponents = torch.arange(512).unsqueeze(1) << 23  # the sign is the topmost of these bits
    floats = (exponents + borders).flatten().to(torch.int32).view(torch.float32)
    floats = torch.cat((floats, torch.randint(-(1 << 31), 1 << 31, (50_000,)).to(torch.int32).view(torch.float32)))
    for source in (bits16.view(torch.bfloat16), bits16.view(torch.float16), floats):
        for to in (torch.float32, torch.bfloat16, torch.float16):
            for width in (len(source) // 8, 3):  # whole vectors; only tails
                x = source[: len(source) // width * width].view(1, 1, -1, width)
                cache = torch.zeros(x.shape, dtype=to)
                tilewright.kv_append(cache, cache.clone(), x, x)
                want = x.to(to)
                assert torch.equal(cache.isnan(), want.isnan())
                assert_same_bits(cache.masked_fill(want.isnan(), 0), want.masked_fill(want.isnan(), 0))
                assert torch.equal(cache.signbit(), want.signbit()) or want.isnan().any()


def test_views_are_read_and_written_in_place(dtype: torch.dtype) -> None:
    both = torch.zeros(2, 2, 3, 10, 16, dtype=dtype)  # K and V of one allocation, heads after slots
    cache_k, cache_v = both[:, 0], both[:, 1]
    fused = torch.randn(2, 4, 3 * 16 * 3).to(dtype)
    k = fused[..., 48:96].view(2, 4, 3, 16).transpose(1, 2)
    v = fused[..., 96:].view(2, 4, 3, 16).transpose(1, 2)
    want = kv_append_reference(cache_k, cache_v, k, v, torch.tensor([9, 0, 4, 5]))
    tilewright.kv_append(cache_k, cache_v, k, v, torch.arange(10)[[9, 0, 4, 5]])
    assert torch.equal(cache_k, want[0]) and torch.equal(cache_v, want[1])
    strided = torch.randn(2, 3, 16, 4).to(dtype).transpose(2, 3)  # strided head_dim: copied once in Python
    tilewright.kv_append(cache_k, cache_v, strided, strided)
    assert torch.equal(cache_k[:, :, :4], strided)


def test_the_last_of_two_tokens_with_one_slot_stays(same_bits) -> None:
    cache = torch.zeros(2, 2, 4, 64)
    k = torch.randn(2, 2, 600, 64)
    positions = torch.randint(0, 4, (600,))
    want = kv_append_reference(cache, cache, k, k, positions)
    got = same_bits(lambda: tilewright.kv_append(cache.clone(), cache.clone(), k, k, positions))
    assert_same_bits(got[0], want[0])
    table = torch.zeros(2, 150, dtype=torch.int32)  # both batch elements write the same page
    want = kv_append_reference(cache, cache, k, k, block_table=table)
    got = same_bits(lambda: tilewright.kv_append(cache.clone(), cache.clone(), k, k, block_table=table))
    assert_same_bits(got[1], want[1])


@pytest.mark.parametrize("change", [{"seq": 0}, {"batch": 0}, {"kv_heads": 0}, {"head_dim": 0}], ids=str)
def test_empty(change: dict[str, int], dtype: torch.dtype) -> None:
    args, kwargs = tensors(Case(**{"batch": 2, "kv_heads": 2, "seq": 3, "head_dim": 8, **change}), dtype, dtype)
    before = args[0].clone()
    result = tilewright.kv_append(*args, **kwargs)[0]
    assert result.shape == before.shape and torch.equal(result, before)


def base() -> dict[str, Tensor]:
    cache, x = torch.zeros(2, 3, 8, 16), torch.randn(2, 3, 4, 16)
    return {"cache_k": cache, "cache_v": cache.clone(), "k": x, "v": x.clone()}


def same_memory() -> dict[str, Tensor]:
    cache = torch.zeros(2, 3, 8, 16)
    return {"cache_k": cache, "cache_v": cache}


def moved_within() -> dict[str, Tensor]:
    cache = torch.zeros(2, 3, 8, 16)
    return {"cache_k": cache, "k": cache[:, :, 2:6]}


TABLE = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
BAD_ROWS = torch.tensor([[0], [2]], dtype=torch.int32)
REJECTED: list[tuple[str, dict[str, object]]] = [
    ("in [0, 8), the cache's max_len, got 8", {"positions": torch.tensor([0, 1, 8, 2])}),
    ("token 3 of batch element 1", {"positions": torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]])}),
    ("in [0, 8), the cache's max_len, got 8", {"cache_seqlens": torch.tensor([0, 5])}),
    ("got -2", {"cache_seqlens": torch.tensor([-2, 0])}),
    ("exclude each other, got both", {"positions": torch.arange(4), "cache_seqlens": torch.zeros(2).int()}),
    ("positions must be int64 of shape (4,) or (2, 4), got (3,) int64", {"positions": torch.arange(3)}),
    ("positions must be int64", {"positions": torch.arange(4).int()}),
    ("cache_seqlens must be int32 or int64 of shape (2,)", {"cache_seqlens": torch.zeros(3).int()}),
    ("cache_seqlens must be int32 or int64", {"cache_seqlens": torch.zeros(2)}),
    ("block_table must be int32 of shape (2, max_blocks)", {"block_table": TABLE.long()}),
    ("block_table must be int32", {"block_table": TABLE[:1]}),
    ("block_table[1, 0] must be in [0, 2), the cache's num_blocks, got 2", {"block_table": TABLE[:1] * 0 + BAD_ROWS}),
    ("got -1", {"block_table": TABLE - 1}),
    ("in [0, 16), block_table's", {"block_table": TABLE, "cache_seqlens": torch.tensor([0, 13])}),
    ("k must be (batch, kv_heads, seq, head_dim)", {"k": torch.randn(2, 3, 4, 8)}),
    ("v must be (batch, kv_heads, seq, head_dim)", {"v": torch.randn(2, 2, 4, 16)}),
    ("k must be (batch", {"k": torch.randn(1, 3, 4, 16)}),
    ("may differ in head_dim only", {"v": torch.randn(2, 3, 3, 16)}),
    ("may differ in head_dim only", {"cache_v": torch.zeros(2, 3, 9, 16)}),
    ("k must be float32, bfloat16 or float16, got int64", {"k": torch.ones(2, 3, 4, 16).long()}),
    ("cache_v must be float32", {"cache_v": torch.zeros(2, 3, 8, 16).char()}),
    ("cache_k must be contiguous in its last dimension", {"cache_k": torch.zeros(2, 3, 16, 8).transpose(2, 3)}),
    ("all tensors must be on one device", {"v": torch.empty(2, 3, 4, 16, device="meta")}),
    ("caches must not share memory", same_memory()),
    ("caches must not share memory", {"cache_k": torch.zeros(1, 3, 8, 16).expand(2, 3, 8, 16)}),
    ("k and v must not share memory with the caches", moved_within()),
]  # fmt: skip


@pytest.mark.parametrize("message,changed", REJECTED, ids=[m for m, _ in REJECTED])
def test_rejected_before_anything_is_written(message: str, changed: dict[str, object]) -> None:
    kwargs = {**base(), **changed}
    before = kwargs["cache_k"].clone(), kwargs["cache_v"].clone()
    with pytest.raises(ValueError) as error:
        tilewright.kv_append(**kwargs)
    assert "kv_append: " in str(error.value) and message in str(error.value)
    assert torch.equal(kwargs["cache_k"], before[0]) and torch.equal(kwargs["cache_v"], before[1])


def test_autograd() -> None:
    with pytest.raises(ValueError, match="has no gradient"):
        tilewright.kv_append(**{**base(), "v": torch.randn(2, 3, 4, 16, requires_grad=True)})
    with torch.no_grad():
        tilewright.kv_append(**{**base(), "v": torch.randn(2, 3, 4, 16, requires_grad=True)})
    kwargs = base()
    loss = (kwargs["cache_k"] * torch.randn(16, requires_grad=True)).sum()
    tilewright.kv_append(**kwargs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        tilewright.kv_append(**base())


def test_float64_runs_the_reference() -> None:
    kwargs = {name: t.double() for name, t in base().items()}
    want = kv_append_reference(**kwargs)
    assert torch.equal(tilewright.kv_append(**kwargs)[1], want[1])
    assert tilewright.last_impl("kv_append") == "reference"


def test_registration() -> None:
    args = tuple(base().values())
    torch.library.opcheck(torch.ops.tilewright.kv_append, (*args, torch.tensor([3, 1, 0, 7]), None, None, "auto"))
    torch.library.opcheck(
        torch.ops.tilewright.kv_append, (*args, None, TABLE, torch.tensor([3, 1]), "auto"), test_utils="test_schema"
    )


def test_compiles_whole() -> None:
    def f(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        keys, values = tilewright.kv_append(cache_k, cache_v, k * 2, v, positions)
        return keys.sum() + values.sum() + cache_k.sum()

    positions = torch.tensor([3, 1, 0, 7])
    eager, compiled = tuple(base().values()), tuple(base().values())
    compiled = (*compiled[:2], *eager[2:])
    want = f(*eager, positions)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*compiled, positions), want)
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])
