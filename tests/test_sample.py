"""sample: the filters' sets, the distribution, the walk, the errors."""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch
from buffers import poisoned
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import tilewright
from tilewright.ops.sample import sample_reference

PLAIN: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS: list[dict[str, float]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 7.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_k": 700},
    {"top_k": 10**6},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.8, "min_p": 0.2},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 300, "top_p": 0.5},
]
VOCABULARIES = (1, 2, 15, 16, 17, 63, 64, 65, 200, 1023, 1025, 5000)


def draw(logits: Tensor, uniform: Tensor, **options: float) -> Tensor:
    """sample, for given uniform numbers."""
    return torch.ops.tilewright.sample(logits, uniform, *{**PLAIN, **options}.values())


def kept_by_transformers(logits: Tensor, options: dict[str, float]) -> Tensor:
    """Probabilities after transformers' warpers, float64; of equal logits its top-p cuts arbitrary ones, so its
    sort is made stable here."""
    scores = logits.double()
    if "temperature" in options:
        scores = TemperatureLogitsWarper(options["temperature"])(None, scores)
    if options.get("top_k"):
        scores = TopKLogitsWarper(int(options["top_k"]))(None, scores)
    if "top_p" in options:
        with mock.patch("torch.sort", functools.partial(torch.sort, stable=True)):
            scores = TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(None, scores)
    return scores.softmax(-1)


def undecided(logits: Tensor, options: dict[str, float]) -> bool:
    """Whether top-p's cut hangs on a rounding of the sum of float32 weights."""
    before = kept_by_transformers(logits, {k: v for k, v in options.items() if k in ("temperature", "top_k")})
    sums = before.sort(-1, descending=True).values.cumsum(-1)
    return bool(((sums - options.get("top_p", 2.0)).abs() < 3e-7).any())


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_keeps_what_transformers_keeps(options: dict[str, float], dtype: torch.dtype, kernel_impl: str) -> None:
    """Every kept token is hit by a number in the middle of its stretch of the running sum, and only those."""
    for vocabulary in VOCABULARIES:
        logits = (torch.randn(1, vocabulary) * 3).to(dtype)
        while undecided(logits, options):
            logits = (torch.randn(1, vocabulary) * 3).to(dtype)
        probabilities = kept_by_transformers(logits, options)[0]
        kept = probabilities.nonzero().flatten()
        ends = probabilities[kept].cumsum(0)
        clear = probabilities[kept] > 1e-5  # wide enough for float32 weights to hit
        middles = (ends - probabilities[kept] / 2)[clear]
        tokens = draw(logits.expand(len(middles), -1), middles, **options)
        assert torch.equal(tokens, kept[clear]), f"vocabulary {vocabulary}"
        # The ends of the unit interval lead to the first and the last token that is kept.
        ends = draw(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-53]).double(), **options)
        heavy = probabilities > 1e-7
        assert ends[0] == heavy.nonzero()[0, 0] or probabilities[ends[0]] > 0
        assert probabilities[ends[1]] > 0
    assert tilewright.last_impl("sample") == kernel_impl


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_agrees_with_the_reference(options: dict[str, float], dtype: torch.dtype) -> None:
    logits = (torch.randn(64, 4099) * 2).to(dtype)
    uniform = torch.rand(64, dtype=torch.float64)
    want = sample_reference(logits, uniform, **{**PLAIN, **options})
    assert torch.equal(draw(logits, uniform, **options), want)
    assert torch.equal(draw(poisoned(logits), uniform, **options), want)
    assert torch.equal(draw(logits.t().contiguous().t(), uniform, **options), want)
    assert torch.equal(draw(logits.double(), uniform, **options), want)
    assert tilewright.last_impl("sample") == "reference"


def test_large_vocabulary() -> None:
    logits = torch.randn(3, 152_064) * 4
    uniform = torch.rand(3, dtype=torch.float64)
    for options in ({}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.95}, {"min_p": 0.01}, {"temperature": 0.0}):
        want = sample_reference(logits, uniform, **{**PLAIN, **options})
        assert torch.equal(draw(logits, uniform, **options), want)


SAMPLED: list[dict[str, float]] = [{}, {"top_k": 12}, {"top_p": 0.7}, {"min_p": 0.1}, {"temperature": 1.7, "top_k": 9}]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_distribution(options: dict[str, float]) -> None:
    """Chi-square over 40,000 draws with a fixed seed; the bound is the 1 - 1e-6 quantile."""
    logits, n = torch.randn(1, 30) * 2, 40_000
    generator = torch.Generator().manual_seed(7)
    tokens = tilewright.sample(logits.expand(n, -1), generator=generator, **options)
    expected = kept_by_transformers(logits, options)[0] * n
    counts = torch.bincount(tokens, minlength=30).double()
    assert counts[expected == 0].sum() == 0
    cell = torch.where(expected < 20, 30, torch.arange(30))  # the rare tokens share one, as the test wants it
    counts, expected = (torch.zeros(31).double().index_add(0, cell, t) for t in (counts, expected))
    used = expected > 0
    statistic = ((counts - expected).square() / expected)[used].sum().item()
    freedom = int(used.sum()) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert statistic < quantile


def test_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])
    sweep = torch.linspace(0, 1 - 1e-6, 200).double()

    def found(**options: float) -> list[int]:
        return draw(logits.expand(200, -1), sweep, **options).unique().tolist()

    assert found(temperature=0.0) == [1]
    assert found(top_k=1) == [1, 3]  # all that equal the k-th
    assert found(top_k=3) == [1, 2, 3, 4, 5]
    assert found(top_p=0.0) == found(top_p=0.3) == [3]  # the higher id first, as in transformers
    assert found(top_p=0.7) == [1, 3, 5]
    assert found(min_p=1.0) == [1, 3]
    equal, sweep = torch.zeros(600, 300), torch.arange(600).double() / 600 + 1e-4
    assert draw(equal, sweep, top_p=0.5).unique().tolist() == list(range(150, 300))
    assert draw(equal, sweep, top_k=3).unique().numel() == 300


def test_greedy_takes_the_first_maximum(dtype: torch.dtype) -> None:
    for vocabulary in (*VOCABULARIES, 70_001):
        logits = torch.randn(3, vocabulary).to(dtype)
        for at in {0, vocabulary // 2, vocabulary - 1}:
            logits[1, at] = 50
            tokens = tilewright.sample(logits, temperature=0)
            assert torch.equal(tokens, logits.argmax(-1)) and tokens.dtype == torch.int64
            logits[1, -1] = 50
            assert tilewright.sample(logits, temperature=0.0)[1] == logits[1].tolist().index(50)
            logits[1] = -1
    state = torch.get_rng_state()
    tilewright.sample(logits, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)  # draws nothing
    infinite = torch.tensor([[1.0, float("inf"), float("inf")]])
    assert tilewright.sample(infinite, temperature=0).item() == 1


def test_barred_tokens_are_never_chosen(dtype: torch.dtype) -> None:
    logits = torch.full((1, 500), -math.inf).to(dtype)
    logits[0, [77, 301]] = 0
    sweep = torch.cat((torch.linspace(0, 1, 101).double(), torch.tensor([1 - 2**-53]).double()))
    for options in FILTERS:
        tokens = draw(logits.expand(102, -1), sweep, **options)
        assert set(tokens.tolist()) <= {77, 301}
    assert tilewright.sample(logits, temperature=0).item() == 77


def test_extreme_values() -> None:
    big = torch.finfo(torch.float32).max
    uniform = torch.tensor([0.3]).double()
    for row in ([big, -big, 0.0], [-big, -big, -math.inf], [1e-45, 0.0, -1e-45], [-big / 2, -big, -big]):
        for temperature in (1.0, 1e-45, 1e-300, 1e300, 1e-3):
            for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_p": 1e-300}, {"min_p": 1e-300}):
                token = draw(torch.tensor([row]), uniform, **{**options, "temperature": temperature}).item()
                assert row[token] > -math.inf
    assert draw(torch.tensor([[0.0, 1.0]]), uniform, temperature=1e-300).item() == 1
    assert draw(torch.tensor([[0.0, -math.inf, 0.0]]), torch.tensor([0.7]).double(), temperature=1e300).item() == 2


def test_generator_and_default_generator() -> None:
    logits = torch.randn(8, 1000)
    first = tilewright.sample(logits, generator=torch.Generator().manual_seed(3))
    assert torch.equal(tilewright.sample(logits, generator=torch.Generator().manual_seed(3)), first)
    torch.manual_seed(3)
    assert torch.equal(tilewright.sample(logits), first)
    numbers = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(logits, numbers), first)
    leaf = logits.clone().requires_grad_()
    assert torch.equal(tilewright.sample(leaf, generator=torch.Generator().manual_seed(3)), first)


def test_bits_do_not_depend_on_threads(same_bits, dtype: torch.dtype) -> None:
    for rows, vocabulary in ((1, 49_152), (5, 70_001), (300, 40)):
        logits = torch.randn(rows, vocabulary).to(dtype)
        uniform = torch.rand(rows, dtype=torch.float64)
        for options in ({}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.01}):
            same_bits(lambda a=(logits, uniform), o=options: (draw(*a, **o),))


def test_empty() -> None:
    for temperature in (0.0, 1.0):
        assert tilewright.sample(torch.empty(0, 10), temperature=temperature).shape == (0,)


NAN, INF = float("nan"), float("inf")
REJECTED: list[tuple[str, dict[str, object]]] = [
    ("row 1 of logits holds NaN", {"logits": torch.tensor([[0.0, 1.0], [NAN, 1.0]])}),
    ("row 0 of logits holds NaN", {"logits": torch.tensor([[*[0.0] * 99, NAN]]), "temperature": 0}),
    ("row 0 of logits holds NaN", {"logits": torch.tensor([[INF, NAN]]), "top_k": 1}),
    ("row 1 of logits is -inf throughout", {"logits": torch.tensor([[0.0, 1.0], [-INF, -INF]])}),
    ("row 0 of logits is -inf throughout", {"logits": torch.tensor([[-INF]]), "temperature": 0}),
    ("row 0 of logits holds +inf", {"logits": torch.tensor([[0.0, INF]])}),
    ("logits must be (batch, vocab), got shape (5,)", {"logits": torch.zeros(5)}),
    ("at least one token, got (2, 0)", {"logits": torch.zeros(2, 0)}),
    ("logits must be float32, bfloat16 or float16, got int64", {"logits": torch.zeros(2, 3).long()}),
    ("temperature must be at least 0 and finite, got -1", {"temperature": -1}),
    ("temperature must be at least 0 and finite, got nan", {"temperature": NAN}),
    ("temperature must be at least 0 and finite, got inf", {"temperature": INF}),
    ("top_k must be a whole number, 0 or more, got -1", {"top_k": -1}),
    ("top_k must be a whole number, 0 or more, got 2.5", {"top_k": 2.5}),
    ("top_p must be from 0 to 1, got 1.1", {"top_p": 1.1}),
    ("top_p must be from 0 to 1, got nan", {"top_p": NAN}),
    ("min_p must be from 0 to 1, got -0.1", {"min_p": -0.1}),
]


@pytest.mark.parametrize("message,changed", REJECTED, ids=[m for m, _ in REJECTED])
def test_rejected(message: str, changed: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        tilewright.sample(**{"logits": torch.zeros(2, 5), **changed})
    assert "sample: " in str(error.value) and message in str(error.value)


def test_registration() -> None:
    args = torch.randn(3, 50), torch.rand(3, dtype=torch.float64), 0.7, 5, 0.9, 0.01
    torch.library.opcheck(torch.ops.tilewright.sample, args)
    torch.library.opcheck(torch.ops.tilewright.sample, (args[0], None, 0.0, 0, 1.0, 0.0), test_utils="test_faketensor")


def test_compiles_whole() -> None:
    def f(logits: Tensor) -> Tensor:
        return tilewright.sample(logits * 2, temperature=0.0) + tilewright.sample(logits, top_k=1)

    logits = torch.randn(4, 100)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(logits), 2 * logits.argmax(-1))
