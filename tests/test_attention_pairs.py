"""Attention and its gradients where features meet: every pair of levels of the table below occurs in some case."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from cases import INF, assert_ran_natively, lay_out, naive_attention, seeded
from compare import assert_close
from torch import Tensor

from tilewright import attention
from tilewright.ops.attention import attention_packed, dropout_seed
from tilewright.ops.attention_reference import Operands, attention_reference

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


# Patterns of masks and biases as in cases.py; a bias or float mask says its dtype too, "own" is that of q.
FACTORS: dict[str, tuple] = {
    "causal": (None, "top_left", "bottom_right"),
    "window": (None, (0, 0), (5, -1), (64, 3), (-1, 20), (100, 100)),
    "mask": (None, "bhqk", "b1qk", "1hqk", "11qk", "b11k", "bhq1", "qk", "k", "float bhqk", "float 11qk", "float b11k"),
    "bias": (None, "own bhqk", "own 1hqk", "float32 b1qk", "float64 1h1k", "own bhq1", "float32 qk", "float16 1hq1"),
    "alibi": (None, "h", "bh"),
    "softcap": (None, 2.0, 30.0),
    "sinks": (False, True),
    "scale": (None, 1.7, -1.1),  # times the default
    "dropout_p": (0.0, 0.25),
    "grad_lse": (False, True),
    "group": (1, 2, 3, 5, 8),
    "head_dim": (1, 7, 16, 40, 64, 80, 128, 200, 256, 512),
    "other_v_dim": (False, True),
    "seq_q": (1, 5, 17, 66, 130, 200),
    "seq_k": (0, 1, 63, 64, 128, 129, 260, 300),
    "batch": (1, 2, 3),
    "layout": ("contiguous", "bshd", "same_heads", "strided_last", "offset"),
}
OTHER_V_DIM = {1: 3, 7: 16, 16: 7, 40: 24, 64: 128, 80: 33, 128: 64, 200: 1, 256: 200, 512: 40}
FEW = 8


def covering(factors: dict[str, tuple]) -> list[dict]:
    """Rows that hold every pair of levels of two factors: each row begins with a pair that is still missing, then
    the other factors, in random order, take the level that adds most pairs to those already chosen, of equals the
    first: small ones."""
    names, rng = list(factors), random.Random(17)  # of 40 seeds the one with least work in its shapes
    missing = {
        (a, i, b, j): None  # a dict keeps its order, a set would not
        for a, b in combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }
    rows = []
    while missing:
        a, i, b, j = next(iter(missing))
        chosen = {a: i, b: j}
        rest = [f for f in range(len(names)) if f not in chosen]
        rng.shuffle(rest)
        for f in rest:
            gains = [
                sum(((f, x, g, y) if f < g else (g, y, f, x)) in missing for g, y in chosen.items())
                for x in range(len(factors[names[f]]))
            ]
            chosen[f] = gains.index(max(gains))
        for pair in combinations(sorted(chosen.items()), 2):
            missing.pop((*pair[0], *pair[1]), None)
        rows.append({name: factors[name][chosen[f]] for f, name in enumerate(names)})
    return rows


ROWS = covering(FACTORS)


def test_every_pair_is_in_the_table() -> None:
    for a, b in combinations(FACTORS, 2):
        assert {(row[a], row[b]) for row in ROWS} == {(x, y) for x in FACTORS[a] for y in FACTORS[b]}
    assert len(ROWS) < 200


class Call:
    """A row of the table, its tensors in one dtype. What takes a gradient has FEW elements or more (a broadcast bias
    below twice that becomes a full one): of fewer, the errors' maxima are random numbers, and the rule compares
    nothing."""

    def __init__(self, name: str, dtype: torch.dtype, row: dict) -> None:
        g, self.dtype, self.with_lse = seeded(name), dtype, row["grad_lse"]
        group, batch, seq_q, seq_k, dim = (row[x] for x in ("group", "batch", "seq_q", "seq_k", "head_dim"))
        summed = row["sinks"] or row["alibi"] or row["bias"] or row["mask"]
        kv_heads = -(-FEW // group) if summed else max(1, 3 - group // 2)
        heads, v_dim = kv_heads * group, OTHER_V_DIM[dim] if row["other_v_dim"] else dim
        sizes = {"b": batch, "h": heads, "q": seq_q, "k": seq_k, "1": 1}

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        def pattern(letters: str) -> list[int]:
            shape = [sizes[x] for x in letters]
            return shape if torch.Size(shape).numel() >= 2 * FEW else [batch, heads, seq_q, seq_k]

        shapes = (heads, seq_q, dim), (kv_heads, seq_k, dim), (kv_heads, seq_k, v_dim)
        self.leaves = {
            letter: lay_out(normal(batch, *shape).to(dtype), row["layout"])
            for letter, shape in zip("qkv", shapes, strict=True)
        }
        self.options = {name: row[name] for name in ("causal", "window", "softcap", "dropout_p")}
        self.options["scale"] = row["scale"] and row["scale"] * dim**-0.5
        kind, _, letters = (row["mask"] or "").rpartition(" ")
        if kind:
            shape = pattern(letters)
            mask, hidden = normal(*shape), torch.rand(shape, generator=g) < 0.2
            self.leaves["mask"] = mask.masked_fill_(hidden, -INF).to(dtype)
        elif letters:
            self.options["mask"] = torch.rand([sizes[x] for x in letters], generator=g) < 0.7
        if row["bias"]:
            kind, letters = row["bias"].split()
            self.leaves["bias"] = normal(*pattern(letters)).to(dtype if kind == "own" else getattr(torch, kind))
        if row["alibi"]:
            slopes = torch.rand([sizes[x] for x in row["alibi"]], generator=g)
            self.leaves["alibi_slopes"] = slopes * 0.2
        if row["sinks"]:
            self.leaves["sinks"] = normal(heads)
        self.grad_out = normal(batch, heads, seq_q, v_dim).to(dtype)
        self.grad_lse = normal(batch, heads, seq_q)

    def run(self, function: Callable, wide: torch.dtype | None = None, **more: object) -> tuple[Tensor, ...]:
        """out, lse and the gradients of all leaves, which become ``wide`` first."""
        leaves = {
            name: t.detach().to(wide if wide in (torch.float64, None) or t.dtype == self.dtype else t.dtype)
            for name, t in self.leaves.items()
        }
        for t in leaves.values():
            t.requires_grad_()
        out, lse = function(**leaves, **self.options, **more)
        loss = (out * self.grad_out.to(out.dtype)).sum()
        if self.with_lse:
            loss = loss + (lse.masked_fill(lse == -INF, 0.0) * self.grad_lse.to(lse.dtype)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return out, lse, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True))

    def check(self) -> None:
        """out, lse and all gradients keep the error rule."""
        torch.manual_seed(5)
        seed = dropout_seed(self.options["dropout_p"])
        ref = self.run(attention_reference, torch.float64, seed=seed)
        naive = self.run(naive_attention, self.dtype, seed=seed)
        torch.manual_seed(5)
        ours = self.run(attention, self.dtype, return_lse=True)
        assert_ran_natively("attention")
        for name, a, r, n in zip(("out", "lse", *self.leaves), ours, ref, naive, strict=True):
            expected = torch.float32 if name == "lse" else self.leaves.get(name, ours[0]).dtype
            assert a.dtype == expected, name
            dtype = self.dtype if name == "lse" else expected  # lse is float32, but the scores' rounding is the dtype's
            try:
                assert_close(a.to(dtype), r, n.to(dtype), dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def label(row: dict) -> str:
    shape = "b{batch}_g{group}_q{seq_q}_k{seq_k}_d{head_dim}_{layout}".format(**row)
    return f"{ROWS.index(row)}_{shape}"


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_pairs(row: dict, dtype: torch.dtype) -> None:
    Call(label(row), dtype, row).check()


# Needles: a key that is dropped or counted twice hardly shows in random data.


@pytest.mark.parametrize("causal", [None, "bottom_right"])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 300), (20, 129), (70, 300), (140, 257)])
def test_gradients_of_a_dominant_key(seq_q: int, seq_k: int, causal: str | None, dtype: torch.dtype) -> None:
    """A batch element for each place of a key that holds about half of every row's weight: what is lost of it is as
    large as the largest gradients."""
    places = sorted({p for p in (0, 63, 64, 65, 127, 128, 129, 255, 256, seq_k - seq_q, seq_k - 1) if p < seq_k})
    batch, group, dim = len(places), 3, 16
    q, k, v = torch.randn(batch, group, seq_q, dim), *(torch.randn(2, batch, 1, seq_k, dim))
    q[..., 0] = 4
    k *= 0.05
    for b, place in enumerate(places):
        k[b, 0, place, 0] += 1.35
    tensors = [t.to(dtype) for t in (q, k, v)]
    grad_out, grad_lse = torch.randn(q.shape).to(dtype), torch.randn(q.shape[:3])

    def run(function: Callable, wide: torch.dtype, **more: object) -> tuple[Tensor, ...]:
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        out, lse = function(*leaves, causal=causal, scale=1.0, **more)
        lse = lse.masked_fill(lse == -INF, 0.0)
        loss = (out * grad_out.to(out.dtype)).sum() + (lse * grad_lse.to(lse.dtype)).sum()
        return out, *torch.autograd.grad(loss, leaves)

    ref, naive = run(attention_reference, torch.float64), run(naive_attention, dtype)
    ours = run(attention, dtype, return_lse=True)
    for name, *three in zip(("out", "q", "k", "v"), ours, ref, naive, strict=True):
        try:
            assert_close(*three, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name} of keys {places}: {error}") from None


@pytest.mark.parametrize("seq_q", [1, 20, 140])
def test_each_key_gets_its_gradient(seq_q: int, dtype: torch.dtype) -> None:
    """A key that holds all of the weight gets exactly the sum of the output's gradients, the others nothing."""
    seq_k = 300
    places = (0, 15, 16, 63, 64, 127, 128, 129, 255, 256, seq_k - 1)
    q, v = torch.ones(len(places), 1, seq_q, 8, dtype=dtype), torch.randn(len(places), 1, seq_k, 8).to(dtype)
    k = torch.zeros(len(places), 1, seq_k, 8, dtype=dtype)
    for b, place in enumerate(places):
        k[b, 0, place] = 100
    grad_out = torch.randint(-1, 2, q.shape).to(dtype)  # sums up to 140: exact in bf16
    v.requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v, scale=1.0), v, grad_out)  # an exact lse
    expected = torch.zeros_like(v)
    for b, place in enumerate(places):
        expected[b, 0, place] = grad_out[b, 0].sum(0)
    assert torch.equal(grad, expected)


# Packed sequences.

PACKED = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "window": {"causal": "bottom_right", "window": (70, -1)},
    "features": {"causal": "top_left", "softcap": 5.0, "sinks": True, "alibi": "bh", "scale": 0.3},
    "dropout": {"dropout_p": 0.2, "alibi": "h"},
}
LENGTHS = ((1, 300), (66, 128), (0, 17), (130, 129), (5, 0), (67, 67), (20, 3))  # of the queries and of the keys


@pytest.mark.parametrize("shared", [True, False], ids=["packed_keys", "padded_keys"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_gradients(name: str, shared: bool, dtype: torch.dtype) -> None:
    """Sequences in the rows of one q, their keys in the rows of one k or in a row each: what each gives alone."""
    heads, kv_heads, dim, v_dim, gap, count = 10, 2, 40, 24, 3, len(LENGTHS)
    most = max(n for _, n in LENGTHS)
    options = {"window": (-1, -1), "dropout_p": 0.0, "causal": None, "softcap": 0.0, "scale": 0.2} | PACKED[name]
    kind, has_sinks = options.pop("alibi", None), options.pop("sinks", False)
    starts = {"q": [], "k": []}
    ends = {"q": 0, "k": 0}
    for lengths in LENGTHS:
        for letter, length in zip("qk", lengths, strict=True):
            starts[letter].append(ends[letter])
            ends[letter] += length + gap
    q = torch.randn(1, heads, ends["q"], dim).to(dtype)
    keys = (1, kv_heads, ends["k"]) if shared else (count, kv_heads, most)
    k, v = torch.randn(*keys, dim).to(dtype), torch.randn(*keys, v_dim).to(dtype)
    leaves = {"q": q, "k": k, "v": v}
    if kind:
        leaves["alibi"] = torch.rand((heads,) if kind == "h" else (count, heads)) * 0.2
    if has_sinks:
        leaves["sinks"] = torch.randn(heads)
    q_start, k_start = torch.tensor(starts["q"]), torch.tensor(starts["k"] if shared else [0] * count)
    lengths = torch.tensor(LENGTHS)
    seed = dropout_seed(0.5)
    bounds = {
        "q_start": q_start,
        "q_end": q_start + lengths[:, 0],
        "k_start": k_start,
        "k_end": k_start + lengths[:, 1],
    }
    grad_out, grad_lse = torch.randn(1, heads, ends["q"], v_dim).to(dtype), torch.randn(1, heads, ends["q"])

    def ours(alibi: Tensor | None = None, sinks: Tensor | None = None, **qkv: Tensor) -> tuple[Tensor, Tensor]:
        return attention_packed(Operands(**qkv, alibi=alibi, sinks=sinks, **bounds, seed=seed), **options)

    def loop(function: Callable) -> Callable:
        """Each sequence alone; of a batch element dropout's choice depends on its number, so it goes with zeros
        before it."""

        def run(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None = None, sinks: Tensor | None = None):
            outs, lses, done = [], [], 0
            for b, ((n, m), q_first, k_first) in enumerate(zip(LENGTHS, starts["q"], k_start.tolist(), strict=True)):
                one = q[:, :, q_first : q_first + n]
                row = slice(0, 1) if shared else slice(b, b + 1)
                parts = [one, *(t[row, :, k_first : k_first + m] for t in (k, v))]
                slopes = alibi[b] if kind == "bh" else alibi
                before = [t.new_zeros(b, *t.shape[1:]) for t in parts]
                out, lse = function(
                    *(torch.cat(pair) for pair in zip(before, parts, strict=True)), **options,
                    alibi_slopes=slopes, sinks=sinks, seed=seed,
                )  # fmt: skip
                outs += [out[b:], out.new_zeros(1, heads, gap, v_dim)]
                lses += [lse[b:], lse.new_full((1, heads, gap), -INF)]
                done = q_first + n + gap
            assert done == ends["q"]
            return torch.cat(outs, 2), torch.cat(lses, 2)

        return run

    def gradients(function: Callable, wide: torch.dtype) -> tuple[Tensor, ...]:
        own = {n: t.to(wide if t.dtype == dtype or wide == torch.float64 else t.dtype) for n, t in leaves.items()}
        own = {n: t.detach().requires_grad_() for n, t in own.items()}
        out, lse = function(**own)
        finite = lse.masked_fill(lse == -INF, 0.0)
        loss = (out * grad_out.to(out.dtype)).sum() + (finite * grad_lse.to(lse.dtype)).sum()
        return out, lse.to(wide), *torch.autograd.grad(loss, list(own.values()))

    ref, naive = gradients(loop(attention_reference), torch.float64), gradients(loop(naive_attention), dtype)
    for what, a, r, n in zip(("out", "lse", *leaves), gradients(ours, dtype), ref, naive, strict=True):
        try:
            assert_close(a, r, n, a.dtype)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
    grad_q, grad_k = gradients(ours, dtype)[2:4]
    for b, (n, m) in enumerate(LENGTHS):  # the gaps between sequences
        assert (grad_q[:, :, starts["q"][b] + n :][:, :, :gap] == 0).all()
        row = grad_k[0, :, starts["k"][b] + m :][:, :gap] if shared else grad_k[b, :, m:]
        assert (row == 0).all()


THREADED = [row for row in ROWS if row["seq_q"] > 60 and row["seq_k"] > 60 and row["head_dim"] < 100]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("row", THREADED[:4], ids=label)
def test_bits_do_not_depend_on_threads(row: dict, dropout_p: float, dtype: torch.dtype, same_bits: Callable) -> None:
    call = Call(label(row), dtype, row | {"dropout_p": dropout_p})

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        return call.run(attention, return_lse=True)

    same_bits(run)
