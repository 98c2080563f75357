"""Attention and its gradients where features meet: every pair of levels of the table below occurs in some case."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
import torch
from cases import INF, allowed_keys, assert_ran_natively, lay_out, naive_attention, seeded
from compare import assert_close
from torch import Tensor

import tilewright
from tilewright import _C, attention
from tilewright.ops.attention import attention_packed, dropout_seed
from tilewright.ops.attention_reference import Operands, attention_reference


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread for torch's side of the comparison, two for ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tilewright.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    _C.set_num_threads(0)


# Patterns of masks and biases as in cases.py; a bias or float mask says its dtype too, "own" is that of q.
FACTORS: dict[str, tuple] = {
    "causal": (None, "top_left", "bottom_right"),
    "window": (None, (0, 0), (5, -1), (64, 3), (-1, 20), (100, 100)),
    "mask": (None, "bhqk", "b1qk", "1hqk", "11qk", "b11k", "bhq1", "qk", "k", "float bhqk", "float 11qk", "float b11k"),
    "bias": (None, "own bhqk", "own 1hqk", "float32 b1qk", "float64 1h1k", "own bhq1", "float32 qk", "float16 1hq1"),
    "alibi": (None, "h", "bh"),
    "softcap": (None, 2.0, 30.0),
    "sinks": (False, True),
    "scale": (None, 0.31, -0.2),
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
    the other factors, in random order, take the level that adds most pairs to those already chosen."""
    names, rng = list(factors), random.Random(3)
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
            chosen[f] = rng.choice([x for x, gain in enumerate(gains) if gain == max(gains)])
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
    of too few becomes a full one): of fewer, the errors' maxima are random numbers, and the rule compares nothing."""

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
            return shape if torch.Size(shape).numel() >= FEW else [batch, heads, seq_q, seq_k]

        shapes = (heads, seq_q, dim), (kv_heads, seq_k, dim), (kv_heads, seq_k, v_dim)
        self.leaves = {
            letter: lay_out(normal(batch, *shape).to(dtype), row["layout"])
            for letter, shape in zip("qkv", shapes, strict=True)
        }
        self.options = {name: row[name] for name in ("causal", "window", "softcap", "scale", "dropout_p")}
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
