"""The CUDA kernel of sampling, executed through its PTX: the CPU's tokens."""

from __future__ import annotations

import math

import cuda_device
import pytest
import torch
from cases import seeded
from ptx.compilers import needs_nvcc
from test_sample import FILTERS, PLAIN, SAMPLED, kept_by_transformers, undecided
from torch import Tensor

from tilewright.ops.sample import sample_reference

pytestmark = needs_nvcc
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = math.nan, math.inf


def draw(logits: Tensor, uniform: Tensor | None, **options: float) -> Tensor:
    out = torch.full((logits.shape[0],), -7)
    cuda_device.module().sample(logits, uniform, out, *{**PLAIN, **options}.values())
    return out


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_keeps_what_transformers_keeps(options: dict[str, float]) -> None:
    """A number in the middle of each kept token's stretch of the running sum hits it."""
    for vocabulary, dtype in ((1, BF16), (33, FP16), (400, FP32)):
        generator = seeded(f"{vocabulary} {options}")
        logits = (torch.randn(1, vocabulary, generator=generator) * 3).to(dtype)
        while undecided(logits, options):
            logits = (torch.randn(1, vocabulary, generator=generator) * 3).to(dtype)
        probabilities = kept_by_transformers(logits, options)[0]
        kept = probabilities.nonzero().flatten()
        ends = probabilities[kept].cumsum(0)
        clear = (probabilities[kept] > 1e-5).nonzero().flatten()
        clear = clear[:: max(1, len(clear) // 3)]
        middles = (ends - probabilities[kept] / 2)[clear]
        tokens = draw(logits.expand(len(middles), -1), middles, **options)
        assert torch.equal(tokens, kept[clear]), f"vocabulary {vocabulary}"


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_agrees_with_the_reference(options: dict[str, float]) -> None:
    logits = torch.randn(2, 4099, generator=seeded(str(options))) * 2
    uniform = torch.rand(2, dtype=torch.float64, generator=seeded("uniform"))
    assert torch.equal(draw(logits, uniform, **options), sample_reference(logits, uniform, **{**PLAIN, **options}))


def test_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -0.0, 0.0]])
    sweep = torch.linspace(0, 1 - 1e-6, 20).double()

    def found(**options: float) -> list[int]:
        return draw(logits.expand(20, -1), sweep, **options).unique().tolist()

    assert found(temperature=0.0) == [1]
    assert found(top_k=1) == [1, 3]
    assert found(top_k=3) == [1, 2, 3, 4, 5]
    assert draw(logits.expand(2, -1), torch.tensor([0.978, 0.992]).double(), top_k=7).tolist() == [6, 7]  # -0 is 0
    assert found(top_p=0.0) == found(top_p=0.29) == [3]
    assert found(top_p=0.7) == [1, 3, 5]
    assert found(min_p=1.0) == [1, 3]
    equal, sweep = torch.zeros(9, 300), torch.arange(9).double() / 9 + 1e-4
    assert draw(equal, sweep, top_p=0.5).tolist() == [150 + int(u * 150) for u in sweep.tolist()]
    assert draw(equal, sweep, top_k=3).tolist() == [int(u * 300) for u in sweep.tolist()]


def test_greedy_takes_the_first_maximum() -> None:
    logits = torch.randn(4, 3000, generator=seeded("greedy")).to(BF16)
    logits[1, [7, 2999]], logits[2, 0], logits[3] = 50, INF, -3
    assert torch.equal(draw(logits, None, temperature=0.0), logits.float().argmax(-1))


def test_rows_without_a_token() -> None:
    logits = torch.tensor([[0.0, NAN, 1.0], [-INF, -INF, -INF], [0.0, INF, 0.0], [-INF, 5.0, -INF]])
    logits = torch.cat((logits, torch.tensor([[0.0, -NAN, INF]])))
    half = torch.full((5,), 0.5).double()
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert draw(logits, half, **options).tolist() == [-1, -1, -1, 1, -1]
    assert draw(logits, None, temperature=0.0).tolist() == [-1, -1, 1, 1, -1]


def test_barred_tokens_and_extremes() -> None:
    logits = torch.full((1, 500), -INF)
    logits[0, [77, 301]] = 0
    sweep = torch.tensor([0.0, 0.3, 0.5, 0.99, 1 - 2**-53]).double()
    for options in FILTERS:
        assert set(draw(logits.expand(5, -1), sweep, **options).tolist()) <= {77, 301}
    big = torch.finfo(FP32).max
    for row in ([big, -big, 0.0], [-big, -big, -INF], [1e-45, 0.0, -1e-45]):
        for temperature in (1.0, 1e-300, 1e300):
            for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_p": 1e-300}):
                token = draw(torch.tensor([row]), sweep[1:2], **{**options, "temperature": temperature}).item()
                assert row[token] > -INF


def test_strided_and_empty() -> None:
    logits = torch.randn(6, 90, generator=seeded("strided"))
    uniform = torch.rand(6, dtype=torch.float64, generator=seeded("uniform"))
    expected = draw(logits[::2, 5:70].contiguous(), uniform[::2].contiguous(), top_k=9)
    assert torch.equal(draw(logits[::2, 5:70], uniform[::2], top_k=9), expected)
    assert draw(logits[:0], uniform[:0]).shape == (0,)
    with pytest.raises(ValueError, match="uniform must be float64"):
        draw(logits, uniform.float())
    with pytest.raises(ValueError, match="with 1 to"):
        draw(logits[:, :0], uniform)


def mutant_case() -> None:
    logits = torch.randn(1, 600, generator=seeded("mutants")) * 2
    uniform = torch.tensor([0.4]).double()
    options = {"top_k": 500, "top_p": 0.8}
    assert torch.equal(draw(logits, uniform, **options), sample_reference(logits, uniform, **{**PLAIN, **options}))


def test_every_barrier_is_needed() -> None:
    survivors = cuda_device.surviving_mutants(mutant_case)
    left = [f"{i}" for found in survivors.values() for i in found]
    assert left == [], "\n".join(left)


def test_runs_everywhere() -> None:
    with cuda_device.module().watched() as launches:
        for dtype in (BF16, FP16, FP32):
            logits = torch.randn(3, 300, generator=seeded("everywhere")).to(dtype)
            logits[2] = 0
            uniform = torch.tensor([0.0, 0.5, 1 - 2**-53]).double()
            for options in ({}, {"top_k": 5, "top_p": 0.5}, {"top_p": 0.0}, {"min_p": 0.3}):
                draw(logits, uniform, **options)
            draw(logits, None, temperature=0.0)
            draw(torch.cat((logits, -logits), 1), uniform, top_p=1 - 2**-53, temperature=1e-3)
    left = cuda_device.unexecuted(launches, "sample")
    assert left == [], "\n".join(left)
