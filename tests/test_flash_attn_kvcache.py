"""flash_attn_with_kvcache: what it writes and what it returns, against loops in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import INF, NAN, seeded
from compare import assert_close, assert_same_bits
from flash_loop import assert_like_loop
from torch import Tensor

from tilewright.flash_attn import flash_attn_with_kvcache

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


@dataclass(frozen=True)
class Case:
    name: str
    seqlen_q: int = 1
    new: int | None = 1  # None: no k and v
    seqlens: tuple[int, ...] | int | None = (5, 0, 17)
    leftpad: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None  # cache_batch_idx
    page_size: int | None = None
    rotary_dim: int = 0
    interleaved: bool = True
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    slopes: str | None = None
    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    d_v: int = 16

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("no_new", new=None),
    Case("whole_cache", new=None, seqlens=None, seqlen_q=3, causal=True),
    Case("int", seqlens=6, seqlen_q=2, new=2, causal=True),
    Case("nothing_in_cache", new=None, seqlens=(0, 3, 0), seqlen_q=2),
    Case("more_new_than_queries", seqlen_q=2, new=7, causal=True),
    Case("more_queries_than_new", seqlen_q=9, new=2, causal=True),
    Case("no_new_tokens", seqlen_q=2, new=0),
    Case("window", seqlen_q=4, new=4, causal=True, window_size=(6, 0)),
    Case("softcap_alibi", seqlen_q=4, new=4, causal=True, softcap=3.0, slopes="bh"),
    Case("mqa", heads=7, kv_heads=1, slopes="h"),
    Case("v_dim", d=24, d_v=40, heads=3, kv_heads=3),
    Case("d_1_and_512", d=1, d_v=512),
    Case("leftpad", leftpad=(2, 0, 17)),
    Case("leftpad_prefill", seqlen_q=20, new=20, leftpad=(2, 0, 9), causal=True, window_size=(11, 0)),
    Case("rows", rows=(3, 0, 4)),
    Case("rows_without_new", rows=(2, 2, 2), new=None, seqlen_q=3),
    Case("rotary", rotary_dim=16),
    Case("rotary_halves", rotary_dim=16, interleaved=False, seqlen_q=3, new=3, causal=True),
    Case("rotary_partial", rotary_dim=6, seqlen_q=3, new=5, causal=True),
    Case("rotary_not_causal", rotary_dim=16, seqlen_q=4, new=2),
    Case("rotary_local", rotary_dim=16, seqlen_q=4, new=2, window_size=(5, -1)),
    Case("rotary_leftpad", rotary_dim=16, seqlen_q=4, new=4, leftpad=(3, 0, 1), causal=True),
    *(Case(f"pages_{n}", seqlen_q=3, new=3, page_size=n, causal=True, rotary_dim=8) for n in (1, 4, 7, 256)),
    Case("pages_without_new", new=None, page_size=5),
    Case("pages_leftpad", page_size=3, leftpad=(1, 0, 12), rotary_dim=16),
    Case("rows_rotary_leftpad", 5, 5, (9, 1, 20), (4, 1, 0), (4, 1, 2), rotary_dim=12, causal=True, slopes="h"),
    Case("decode_chunks", seqlens=(600, 300, 3), heads=8),
]


def rotate(x: Tensor, first: int, tables: tuple[Tensor, Tensor], interleaved: bool, step: int = 1) -> Tensor:
    """x (seqlen, heads, d), in its dtype, token t by the angles of position first + t * step."""
    cos, sin = (t.to(x.dtype) for t in tables)
    out, half = x.clone(), cos.shape[1]
    for t in range(len(x)):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[first + t * step, i], sin[first + t * step, i]
            out[t, :, a], out[t, :, b] = x[t, :, a] * c - x[t, :, b] * s, x[t, :, b] * c + x[t, :, a] * s
    return out


def paged(cache: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """A cache's rows as shuffled pages, and the block table."""
    batch, seqlen, *rest = cache.shape
    most = -(-seqlen // page_size)
    table = torch.randperm(batch * most + 2, generator=seeded("pages"))[: batch * most].view(batch, most)
    pages = torch.full((batch * most + 2, page_size, *rest), NAN, dtype=cache.dtype)
    for b in range(batch):
        for j in range(seqlen):
            pages[table[b, j // page_size], j % page_size] = cache[b, j]
    return pages, table.int()


def unpaged(pages: Tensor, table: Tensor, seqlen: int) -> Tensor:
    return pages[table.long()].flatten(1, 2)[:, :seqlen]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_loop(case: Case, dtype: torch.dtype) -> None:
    c, g, batch, rows_of_cache = case, seeded(case.name), 3, 5
    seqlen = 620 if c.name == "decode_chunks" else 40

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    q = random(batch, c.seqlen_q, c.heads, c.d)
    lengths = c.seqlens if isinstance(c.seqlens, tuple) else (seqlen if c.seqlens is None else c.seqlens,) * batch
    new, pads, rows = c.new or 0, c.leftpad or (0,) * batch, c.rows or range(batch)
    k, v = random(batch, new, c.kv_heads, c.d), random(batch, new, c.kv_heads, c.d_v)
    caches = [random(batch if c.page_size else rows_of_cache, seqlen, c.kv_heads, d) for d in (c.d, c.d_v)]
    if c.rows is None:  # what lies outside of a sequence's keys may be anything
        for b in range(batch):
            for cache in caches:
                cache[b, : pads[b]], cache[b, lengths[b] + new :] = NAN, NAN
    angles = torch.rand(seqlen + 20, c.rotary_dim // 2, generator=g) * 6
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if c.rotary_dim else None

    # What must come out: sequences in float64, and in the dtype for the size of the error that is allowed.
    options = {"causal": c.causal, "window_size": c.window_size, "softcap": c.softcap}
    expected = [cache.clone() for cache in caches]
    wide, narrow = [], []
    for b in range(batch):
        end = lengths[b] + new
        for into, exact in ((wide, True), (narrow, False)):
            one_q, one_k, one_v = (t[b].double() if exact else t[b] for t in (q, k, v))
            if tables:
                moving = c.causal or c.window_size != (-1, -1)
                one_q = rotate(one_q, lengths[b], tables, c.interleaved, int(moving))
                one_k = rotate(one_k, lengths[b], tables, c.interleaved)
            old_k, old_v = (cache[rows[b], pads[b] : lengths[b]].to(one_q.dtype) for cache in caches)
            into.append((one_q, torch.cat([old_k, one_k]), torch.cat([old_v, one_v])))
        if new:
            expected[0][rows[b], lengths[b] : end] = wide[-1][1][-new:].to(dtype)
            expected[1][rows[b], lengths[b] : end] = v[b]

    arguments = {**options, "rotary_interleaved": c.interleaved, "return_softmax_lse": True, "num_splits": 3}
    arguments |= {"rotary_cos": tables[0], "rotary_sin": tables[1]} if tables else {}
    arguments |= {"k": k, "v": v} if c.new is not None else {}
    slopes = None if c.slopes is None else torch.rand((c.heads,) if c.slopes == "h" else (batch, c.heads), generator=g)
    arguments["alibi_slopes"] = slopes
    arguments["cache_seqlens"] = torch.tensor(lengths).int() if isinstance(c.seqlens, tuple) else c.seqlens
    arguments["cache_leftpad"] = None if c.leftpad is None else torch.tensor(c.leftpad).int()
    arguments["cache_batch_idx"] = None if c.rows is None else torch.tensor(c.rows).int()
    given = caches
    if c.page_size:
        (k_pages, arguments["block_table"]), (v_pages, _) = (paged(cache, c.page_size) for cache in caches)
        given = [k_pages, v_pages]
    out, lse = flash_attn_with_kvcache(q, *given, **arguments)

    assert out.shape == (batch, c.seqlen_q, c.heads, c.d_v) and out.is_contiguous()
    assert lse.shape == (batch, c.heads, c.seqlen_q)
    assert_like_loop(list(out), list(lse), wide, slopes, naive=narrow, **options)
    if c.page_size:
        caches = [unpaged(pages, arguments["block_table"], seqlen) for pages in given]
    for found, wanted in zip(caches, expected, strict=True):
        if tables and found is caches[0]:
            torch.testing.assert_close(found, wanted, equal_nan=True)  # a rounding of the rotation may differ
        else:
            assert_same_bits(found, wanted)
    if c.name == "nothing_in_cache":
        assert (out[[0, 2]] == 0).all() and (lse[[0, 2]] == -INF).all()


def test_rotated_keys_keep_the_error_rule(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 9, 2, 16).to(dtype), torch.randn(1, 9, 1, 16).to(dtype)
    cache = torch.zeros(1, 20, 1, 16, dtype=dtype)
    angles = torch.rand(30, 8) * 6
    tables = (angles.cos(), angles.sin())
    flash_attn_with_kvcache(q, cache, cache.clone(), k, k, *tables, cache_seqlens=4, causal=True)
    ref = rotate(k[0].double(), 4, tables, True)
    assert_close(cache[0, 4:13], ref, rotate(k[0], 4, tables, True), dtype)


def test_float64_and_wider_queries() -> None:
    q, k = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 2, 8, dtype=torch.float64)
    cache = torch.randn(2, 12, 2, 8, dtype=torch.float64)
    angles = torch.rand(20, 4, dtype=torch.float64)
    options = {"cache_seqlens": 5, "causal": True}
    wide_cache, narrow_cache = cache.clone(), cache.float()
    wide = flash_attn_with_kvcache(q, wide_cache, cache.clone(), k, k, angles.cos(), angles.sin(), **options)
    assert wide.dtype == torch.float64
    narrow = flash_attn_with_kvcache(
        q.float(), narrow_cache, cache.float(), k.float(), k.float(), angles.cos(), angles.sin(), **options
    )
    torch.testing.assert_close(narrow, wide.float())
    torch.testing.assert_close(narrow_cache, wide_cache.float())
    half = cache.bfloat16()
    mixed = flash_attn_with_kvcache(q.float(), half, half.clone(), k.float(), k.float(), **options)
    whole = flash_attn_with_kvcache(q.float(), half.float(), half.float(), **options | {"cache_seqlens": 8})
    assert_same_bits(half[:, 5:8], k.bfloat16())
    torch.testing.assert_close(mixed[:, :, :2], whole[:, :, :2], rtol=1e-2, atol=1e-2)


def test_bits_do_not_depend_on_threads(dtype: torch.dtype, same_bits: Callable) -> None:
    q, k = torch.randn(3, 2, 6, 40).to(dtype), torch.randn(3, 2, 2, 40).to(dtype)
    cache = torch.randn(4, 900, 2, 40).to(dtype)
    index, lengths = torch.tensor([3, 0, 1]).int(), torch.tensor([800, 3, 256]).int()
    angles = torch.rand(1000, 20)

    def make() -> tuple[Tensor, ...]:
        caches = [cache.clone(), cache.flip(1)]
        options = {"cache_seqlens": lengths, "cache_batch_idx": index, "causal": True, "return_softmax_lse": True}
        return (*flash_attn_with_kvcache(q, *caches, k, k, angles.cos(), angles.sin(), **options), *caches)

    same_bits(make)


@pytest.mark.parametrize("pages", [False, True])
def test_compiles_as_one_graph(pages: bool) -> None:
    q, k, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 16, 2, 8)
    table = torch.tensor([[1], [0]]).int() if pages else None
    angles = torch.rand(20, 4)

    def step(function: Callable) -> tuple[Tensor, ...]:
        caches = [cache.clone(), cache.clone()]
        lengths = torch.tensor([3, 9]).int()
        tables = (angles.cos(), angles.sin())
        out = function(q, *caches, k, k, *tables, cache_seqlens=lengths, block_table=table, causal=True)
        return out, *caches

    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled), step(flash_attn_with_kvcache), strict=True):
        torch.testing.assert_close(a, b)


# Rejected, before anything is written.


def ints(*values: int) -> Tensor:
    return torch.tensor(values).int()


NEW, ANGLES = {"k": torch.ones(2, 3, 2, 8), "v": torch.ones(2, 3, 2, 8)}, torch.zeros(12, 4)
REJECTED = {
    "cache_3d": ({"k_cache": torch.zeros(12, 2, 8)}, r"k and v \(batch_size, seqlen"),
    "heads": ({"q": torch.zeros(2, 3, 3, 8)}, "multiple of k's"),
    "few_rows": ({"q": torch.zeros(3, 3, 4, 8)}, "a row for each of 3 sequences, got 2"),
    "k_alone": ({"k": NEW["k"], "cache_seqlens": 1}, "k and v must come together, got k alone"),
    "k_shape": (NEW | {"k": torch.ones(2, 3, 1, 8), "cache_seqlens": 1}, r"shape \(2, 3, 2, 8\) and"),
    "v_shape": (NEW | {"v": torch.ones(2, 2, 2, 8), "cache_seqlens": 1}, r"and torch.float32 \(2, 2, 2, 8\)"),
    "k_int": (NEW | {"k": torch.ones(2, 3, 2, 8).int(), "cache_seqlens": 1}, "got torch.int32"),
    "no_seqlens": (NEW, "need cache_seqlens"),
    "seqlens_long": ({"cache_seqlens": torch.tensor([1, 2])}, r"cache_seqlens must be int32 of shape \(2,\), got .*64"),
    "seqlens_shape": ({"cache_seqlens": ints(1, 2, 3)}, "cache_seqlens must be int32"),
    "seqlens_large": ({"cache_seqlens": ints(1, 13)}, "cache_seqlens <= 12.*got 0 and 13 for sequence 1"),
    "seqlens_negative": ({"cache_seqlens": -1}, "got 0 and -1"),
    "no_room": (NEW | {"cache_seqlens": 10}, "cache_seqlens <= 9, the cache's 12 keys less 3 new ones"),
    "leftpad_large": ({"cache_seqlens": 3, "cache_leftpad": ints(4, 0)}, "got 4 and 3 for sequence 0"),
    "leftpad_negative": ({"cache_leftpad": ints(0, -1)}, "got -1 and 12 for sequence 1"),
    "leftpad_dtype": ({"cache_leftpad": torch.tensor([0, 1])}, "cache_leftpad must be int32"),
    "index_large": ({"cache_batch_idx": ints(0, 2)}, r"cache_batch_idx\[1, 0\] must be in \[0, 2\), got 2"),
    "index_shape": ({"cache_batch_idx": ints(0, 1, 1)}, "cache_batch_idx must be int32"),
    "index_and_pages": ({"cache_batch_idx": ints(0, 1), "block_table": ints(0, 1).view(2, 1)}, "index block_table"),
    "table_shape": ({"block_table": ints(0, 1)}, r"block_table must be int32 of shape \(2, max_blocks\)"),
    "table_value": (NEW | {"block_table": ints(0, 5).view(2, 1), "cache_seqlens": 0}, r"\[1, 0\] must be in \[0, 2\)"),
    "rotary_without_k": ({"rotary_cos": ANGLES, "rotary_sin": ANGLES}, "need k and v"),
    "no_sin": (NEW | {"rotary_cos": ANGLES, "cache_seqlens": 1}, r"must both be .* got \(12, 4\) and None"),
    "rotary_dim": (NEW | {"rotary_cos": torch.zeros(12, 5), "rotary_sin": torch.zeros(12, 5), "cache_seqlens": 1},
                   r"at most headdim \(8\)"),
    "rotary_short": (NEW | {"rotary_cos": ANGLES[:5], "rotary_sin": ANGLES[:5], "cache_seqlens": 3},
                     "reach 6 positions, got 5"),
    "gradient": ({"q": torch.zeros(2, 3, 4, 8).requires_grad_()}, "has no gradient; detach"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    changes, message = REJECTED[name]
    arguments = {"q": torch.zeros(2, 3, 4, 8), "k_cache": torch.zeros(2, 12, 2, 8), "v_cache": torch.zeros(2, 12, 2, 8)}
    arguments |= changes
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: .*{message}"):
        flash_attn_with_kvcache(**arguments)
    assert (arguments["k_cache"] == 0).all() and (arguments["v_cache"] == 0).all()
