"""Attention and its gradients on random shapes, layouts and options, dense, padded, indexed, paged and packed.

The bound is elementwise, not the rule of compare.py: that rule compares the largest of two sets of rounding errors,
which for the handful of numbers that a random shape may have is a draw between two random numbers. Here each result
is a sum of terms, and its error at most EPS times the sum of the terms' sizes: `sizes` writes these sums out. Random
data that is spread widely (q is scaled by up to 3) makes single keys heavy, so that a dropped one exceeds it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from cases import INF, NAN, assert_ran_natively
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright import attention
from tilewright.ops.attention import attention_packed
from tilewright.ops.attention_reference import (
    CAUSAL,
    Operands,
    Options,
    _gathered,
    _sequence,
    dropout_keep,
    probabilities,
    reference,
    scores,
)

# As many examples as TILEWRIGHT_FUZZ says, new ones each time; without it the same ones every time.
EXAMPLES = os.environ.get("TILEWRIGHT_FUZZ")
FUZZ = settings(
    max_examples=int(EXAMPLES or 2000),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
# float32 sums, exponentials of scores up to 100; bfloat16 rounds q k^T's weights, their gradients and the results
# (2^-9 each), float16 the results alone (2^-12 each).
EPS = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
KINDS = ("dense", "padded", "indexed", "paged", "packed", "packed_keys", "packed_paged")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


@dataclass(frozen=True)
class Example:
    seed: int
    kind: str
    q_dtype: torch.dtype
    dtype: torch.dtype  # of k and v
    batch: int
    kv_heads: int
    group: int
    seq_q: int  # the most queries and keys of a sequence
    seq_k: int
    head_dim: int
    v_dim: int
    page_size: int
    causal: int
    window: tuple[int, int]
    softcap: float
    scale: float
    dropout_p: float
    mask: str
    bias: str
    bias_dtype: torch.dtype
    alibi: str
    sinks: bool
    layouts: tuple[str, str, str]
    poison: float
    spread: float


def size(*borders: int, most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 6), st.sampled_from(borders), st.integers(0, most))


PATTERNS = ("bhqk", "b1qk", "1hqk", "11qk", "b11k", "bhq1", "1h11", "hqk", "qk", "k", "1", "1111")
LAYOUTS = ("contiguous", "bshd", "offset", "strided", "strided_last", "same_rows", "same_heads", "same_batch")


@st.composite
def examples(draw: st.DrawFn) -> Example:
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from((*DTYPES, *DTYPES, torch.float64)))
    mixed = dtype in (torch.bfloat16, torch.float16) and draw(st.integers(0, 4)) == 0
    ragged = kind in ("paged", "packed", "packed_keys", "packed_paged")
    extras = st.just("") if ragged else st.sampled_from(("", "", *PATTERNS))
    reach = st.sampled_from((-1, -1, 0, 1, 5, 31, 64, 130))
    dims = size(8, 16, 17, 31, 32, 33, 48, 64, most=70)
    return Example(
        seed=draw(st.integers(0, 2**31)),
        kind=kind,
        q_dtype=torch.float32 if mixed else dtype,
        dtype=dtype,
        batch=draw(st.sampled_from((0, 1, 1, 2, 2, 3, 4))),
        kv_heads=draw(st.sampled_from((1, 1, 2, 3))),
        group=draw(st.sampled_from((1, 1, 2, 3, 5, 8))),
        seq_q=draw(size(16, 17, 22, 33, 48, 49, 66, 67, most=100)),
        seq_k=draw(size(16, 63, 64, 65, 127, 128, 129, 256, 257, most=300)),
        head_dim=draw(dims),
        v_dim=draw(dims),
        page_size=draw(st.sampled_from((1, 3, 16, 64, 100))),
        causal=draw(st.integers(0, 2)),
        window=(draw(reach), draw(reach)),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0, 30.0))),
        scale=draw(st.sampled_from((1.0, 1.0, 1.0, 2.0, -1.0, 0.0))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.0, 0.1, 0.7, 1.0))),
        mask=draw(extras),
        bias=draw(extras),
        bias_dtype=draw(st.sampled_from((*DTYPES, torch.float64))),
        alibi=draw(st.sampled_from(("", "", "h", "bh"))),
        sinks=draw(st.booleans()),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        poison=draw(st.sampled_from((NAN, INF, -INF, 1e4))),
        spread=draw(st.sampled_from((1.0, 3.0))),
    )


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t in that layout; the "same" ones repeat t's first and have stride 0."""
    if layout.startswith("same") and t.numel():
        dim = {"same_batch": 0, "same_heads": 1, "same_rows": 2}[layout]
        return t.narrow(dim, 0, 1).contiguous().expand(t.shape)
    if layout == "bshd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided_last":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":  # every other row of a wider buffer whose rest is NaN
        wide = t.new_full((t.shape[0], t.shape[1] + 1, 2 * t.shape[2] + 1, t.shape[3] + 3), NAN)
        return wide[:, 1:, 1::2, 2 : 2 + t.shape[3]].copy_(t)
    if layout == "offset":
        return t.new_full((t.numel() + 1,), NAN)[1:].view(t.shape).copy_(t)
    return t


def operands(e: Example) -> Operands:
    """The tensors of an example, all finite."""
    g = torch.Generator().manual_seed(e.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g)

    heads, fields, rows = e.kv_heads * e.group, {}, e.batch
    keys, seq_q, batch = e.seq_k, e.seq_q, e.batch
    if e.kind.startswith("packed"):
        counts, gaps = integers(0, e.seq_q, e.batch), integers(0, 2, e.batch)
        fields["q_start"] = torch.cumsum(counts + gaps, 0) - counts
        fields["q_end"] = fields["q_start"] + counts
        batch, seq_q = 1, int((counts + gaps).sum()) + 1
    if e.kind == "packed_keys":
        counts, gaps = integers(0, e.seq_k, e.batch), integers(0, 2, e.batch)
        fields["k_start"] = torch.cumsum(counts + gaps, 0) - counts
        fields["k_end"] = fields["k_start"] + counts
        keys, rows = int((counts + gaps).sum()) + 1, 1
    elif e.kind != "dense":
        ends = integers(0, e.seq_k, 2, e.batch).sort(0).values
        fields["k_start"], fields["k_end"] = ends.unbind(0)
    if e.kind == "indexed":
        rows = e.batch + 1
        fields["k_batch"] = integers(0, e.batch, e.batch)
    if "paged" in e.kind:
        blocks = -(-e.seq_k // e.page_size)
        rows, keys = blocks * e.batch + 1, e.page_size
        fields["block_table"] = torch.randperm(rows, generator=g)[: blocks * e.batch].view(e.batch, blocks).int()
    sizes = {"b": batch, "h": heads, "q": seq_q, "k": keys, "1": 1}
    shapes = (batch, heads, seq_q, e.head_dim), (rows, e.kv_heads, keys, e.head_dim), (rows, e.kv_heads, keys, e.v_dim)
    dtypes = (e.q_dtype, e.dtype, e.dtype)
    q, k, v = (normal(*shape).to(d) for shape, d in zip(shapes, dtypes, strict=True))
    q = q * e.spread
    if "paged" not in e.kind:
        q, k, v = (laid_out(t, layout) for t, layout in zip((q, k, v), e.layouts, strict=True))
    if e.mask:
        density = (0.05, 0.5, 0.9)[e.seed % 3]
        fields["mask"] = torch.rand([sizes[x] for x in e.mask], generator=g) < density
    if e.bias:
        bias = normal(*(sizes[x] for x in e.bias))
        hidden = torch.rand(bias.shape, generator=g) < (0.0, 0.3)[e.seed % 2]
        fields["bias"] = bias.masked_fill(hidden, -INF).to(e.bias_dtype)
    if e.alibi:
        fields["alibi"] = torch.rand((heads,) if e.alibi == "h" else (e.batch, heads), generator=g) * 0.2
    if e.sinks:
        fields["sinks"] = normal(heads)
    if e.dropout_p:
        fields["seed"] = integers(0, 2**31, 1)
    return Operands(q, k, v, **fields)


def sequences(t: Operands) -> list[tuple[int, slice, Operands]]:
    """(its number, its rows of q, its operands with a row of keys each) of all packed sequences, or of all at once."""
    if t.q_start is None:
        return [(0, slice(None), _gathered(t))]
    bounds = enumerate(zip(t.q_start.tolist(), t.q_end.tolist(), strict=True))
    return [(b, slice(first, last), _gathered(_sequence(t, b, first, last))) for b, (first, last) in bounds]


def attended(t: Operands, options: Options) -> Tensor:
    """Which keys some query attends, boolean (k's batch or pages, kv_heads, rows, 1)."""
    shape = (*t.k.shape[:3], 1)
    slots = torch.arange(math.prod(shape)).view(shape)
    alive = torch.zeros(slots.numel(), dtype=torch.bool)
    for (_, _, one), (_, _, numbered) in zip(sequences(t), sequences(t._replace(k=slots, v=slots)), strict=True):
        one = one._replace(q=one.q.double(), k=one.k.double())
        _, s, allowed, _ = scores(one, options)
        seen = allowed.expand(s.shape).unflatten(1, (t.k.shape[1], -1)).any(2).any(2)
        alive[numbered.k[..., 0][seen]] = True
    return alive.view(shape)


def sizes(t: Operands, options: Options, grad_out: Tensor, grad_lse: Tensor) -> dict[str, Tensor]:
    """For out, lse and each gradient the sum of the sizes of the terms that it is a sum of."""
    found = {"out": t.q.new_zeros(grad_out.shape), "lse": t.q.new_zeros(grad_lse.shape)}
    found |= {n: x.double().new_zeros(x.shape) for n, x in t._asdict().items() if x is not None and n in LEAVES}
    numbered = t._replace(k=torch.arange(math.prod(t.k.shape[:3])).view(*t.k.shape[:3], 1))
    numbered = numbered._replace(v=numbered.k)
    for (b, rows, one), (_, _, places) in zip(sequences(t), sequences(numbered), strict=True):
        group = t.q.shape[1] // t.k.shape[1]
        _, s, _, distance = scores(one, options)
        p, lse = probabilities(s, one.sinks)
        kept = torch.ones_like(p)
        if options.dropout_p:
            kept = dropout_keep(one, options.dropout_p, b) / ((1 - options.dropout_p) or 1.0)
        k, v = (x.abs().repeat_interleave(group, 1) for x in (one.k, one.v))
        g, g_lse = grad_out[:, :, rows].abs(), grad_lse[:, :, rows].abs().unsqueeze(-1)
        grad_p = (g @ v.transpose(-1, -2)) * kept
        delta = (g * ((p * kept) @ v)).sum(-1, keepdim=True) + g_lse
        ds = p * (grad_p + delta)
        found["out"][:, :, rows] += (p * kept) @ v
        found["lse"][:, :, rows] += (1 + lse.masked_fill(lse == -INF, 0.0).abs()).squeeze(-1)
        if "bias" in found:
            found["bias"] += ds.sum_to_size(found["bias"].shape)
        if "alibi" in found:
            slopes = found["alibi"][b : b + 1] if one.alibi.dim() == 2 and t.q_start is not None else found["alibi"]
            slopes += (ds * distance).sum((2, 3)).sum_to_size(slopes.shape)
        if "sinks" in found:
            weight = torch.exp(t.sinks.view(1, -1, 1, 1) - lse.masked_fill(lse == -INF, INF))
            found["sinks"] += (weight * delta).sum((0, 2, 3))
        ds = ds * abs(options.scale)
        found["q"][:, :, rows] += ds @ k
        where = places.k.flatten()
        for name, terms in (("k", ds.transpose(-1, -2) @ one.q.abs()), ("v", (p * kept).transpose(-1, -2) @ g)):
            terms = terms.unflatten(1, (-1, group)).sum(2)
            found[name].flatten(0, 2).index_add_(0, where, terms.flatten(0, 2))
    return found


LEAVES = ("q", "k", "v", "bias", "alibi", "sinks")


def gradients(t: Operands, options: Options, grad_out: Tensor, grad_lse: Tensor, ours: bool) -> dict[str, Tensor]:
    """out, lse and, unless the keys are paged or indexed, the gradients."""
    wanted = t.block_table is None and t.k_batch is None
    leaves = {name: x.detach().requires_grad_(wanted) for name in LEAVES if (x := getattr(t, name)) is not None}
    t = t._replace(**leaves)
    if ours:
        scale, softcap, causal, left, right, dropout_p = options
        out, lse = attention_packed(
            t, scale=scale, softcap=softcap, causal=CAUSAL[causal], window=(left, right), dropout_p=dropout_p
        )
    else:
        out, lse = reference(t, options)
    results = {"out": out.detach(), "lse": lse.detach()}
    if wanted and out.requires_grad:
        loss = (out * grad_out.to(out.dtype)).sum()
        loss = loss + (lse.masked_fill(lse == -INF, 0.0) * grad_lse.to(lse.dtype)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results |= {n: torch.zeros_like(x) if g is None else g for g, (n, x) in zip(grads, leaves.items(), strict=True)}
    return results


@FUZZ
@given(examples())
def test_random_calls(e: Example) -> None:
    t = operands(e)
    options = Options(e.scale * max(e.head_dim, 1) ** -0.5, e.softcap, e.causal, *e.window, e.dropout_p)
    wide = t._replace(**{n: x.double() for n in LEAVES if (x := getattr(t, n)) is not None})
    g = torch.Generator().manual_seed(e.seed + 1)
    grad_out = torch.randn(*t.q.shape[:3], e.v_dim, generator=g).to(e.q_dtype)
    grad_lse = torch.randn(t.q.shape[:3], generator=g)
    expected = gradients(wide, options, grad_out.double(), grad_lse.double(), ours=False)
    bound = sizes(wide, options, grad_out.double(), grad_lse.double())
    # Keys that no query attends hold anything, and get no gradient.
    dead = ~attended(t, options)
    poisoned = t._replace(k=t.k.masked_fill(dead, e.poison), v=t.v.masked_fill(dead, e.poison))
    for name, x in (("k", t.k), ("v", t.v)):
        if not dead.any():  # in their own layout, of which masked_fill makes a copy
            poisoned = poisoned._replace(**{name: x})
    found = gradients(poisoned, options, grad_out, grad_lse, ours=True)
    if e.dtype != torch.float64:
        assert_ran_natively("attention")
    eps = EPS[e.dtype]
    if e.q_dtype != e.dtype and e.dtype == torch.bfloat16:
        # q is rounded to bfloat16 too: weights change by the error of the scores.
        eps *= 1 + float((wide.q.abs().sum(-1).max() * 5 * abs(options.scale)) if t.q.numel() else 0)
    event(e.kind)
    for name, ref in expected.items():
        x = found[name]
        assert x.shape == ref.shape, name
        assert x.dtype == (torch.float32 if name == "lse" else t.q.dtype if name == "out" else getattr(t, name).dtype)
        inf = ref.isinf()
        assert torch.equal(x.double()[inf], ref[inf]), f"{name}: infinities"
        error, limit = (x.double() - ref)[~inf].abs(), (eps * bound[name] + EPS[x.dtype] * ref.abs() + 1e-6)[~inf]
        wrong = ~(error <= limit)  # NaN is wrong
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, the first is {float(error[wrong][0]):.3e} off, "
            f"allowed {float(limit[wrong][0]):.3e}"
        )
    for name in {"k", "v"} & found.keys():
        assert (found[name].masked_select(dead) == 0).all(), f"{name} that nobody attends has a gradient"


# What it found.


def test_gradients_without_queries(dtype: torch.dtype) -> None:
    """Zeros, not what memory held; an empty batch has gradients too."""
    for batch, heads, seq_q in ((2, 4, 0), (0, 4, 3), (2, 0, 3)):
        q = torch.randn(batch, heads, seq_q, 8).to(dtype).requires_grad_()
        k, v = (torch.randn(batch, heads // 2, 5, 8).to(dtype).requires_grad_() for _ in range(2))
        torch.empty(2, 2, 5, 8, dtype=dtype).fill_(NAN)  # memory to reuse
        for t, grad in zip((q, k, v), torch.autograd.grad(attention(q, k, v).sum(), (q, k, v)), strict=True):
            assert torch.equal(grad, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_masked_nan_keys_under_softcap(dtype: torch.dtype) -> None:
    """tanh(NaN) must not reach the gradients."""
    q, k, v = (torch.randn(1, 2, n, 8).to(dtype) for n in (20, 150, 150))
    mask = torch.ones(150, dtype=torch.bool)
    mask[[3, 149]] = False

    def run(k: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(attention(*leaves, mask=mask, softcap=2.0).sum(), leaves)

    for clean, found in zip(run(k), run(k.masked_fill(~mask.view(-1, 1), NAN)), strict=True):
        assert torch.equal(clean, found)


def test_float64_pages() -> None:
    q, pages = torch.randn(2, 2, 3, 8).double(), torch.randn(5, 2, 4, 8).double()
    table = torch.tensor([[4, 0], [1, 3]])
    out, _ = attention_packed(Operands(q, pages, pages, block_table=table.int()))
    k = pages[table].transpose(1, 2).flatten(2, 3)
    assert torch.equal(out, attention(q, k, k))


def test_dropout_in_float64() -> None:
    """The factor 1 / (1 - p) has float64's accuracy in the gradient too."""
    q, k, v = (torch.randn(1, 1, n, 4).double() for n in (48, 1, 1))
    v.requires_grad_()
    out, _ = attention_packed(Operands(q, k, v, seed=torch.tensor([3])), dropout_p=0.1)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum(), rtol=1e-13, atol=0)
