"""Logits processors and sampling, value by value against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright.generation import logits as processing

SCORES = torch.randn(5, 97, generator=torch.Generator().manual_seed(7)) * 3
IDS = torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(8))
STARTS = torch.tensor([0, 3, 11, 5, 0])


def processor_pairs() -> list[tuple[str, Any, Any]]:
    from transformers.generation import logits_process as theirs

    pairs = []
    for value in (0.1, 0.7, 1.3, 5.0):
        pairs.append(
            (
                f"temperature {value}",
                lambda s, v=value: processing.warp_temperature(s, v),
                theirs.TemperatureLogitsWarper(value),
            )
        )
        pairs.append(
            (
                f"penalty {value}",
                lambda s, v=value: processing.penalise_repetition(IDS, s, penalty=v),
                theirs.RepetitionPenaltyLogitsProcessor(value),
            )
        )
        pairs.append((
            f"penalty {value} padded",
            lambda s, v=value: processing.penalise_repetition(IDS, s, penalty=v, starts=STARTS),
            theirs.RepetitionPenaltyLogitsProcessor(value, prompt_ignore_length=STARTS),
        ))  # fmt: skip
    for value in (1, 2, 50, 97, 1000):
        pairs.append((f"top_k {value}", lambda s, v=value: processing.keep_top_k(s, v), theirs.TopKLogitsWarper(value)))
    for value in (0.01, 0.5, 0.9, 0.999, 1.0):
        pairs.append((f"top_p {value}", lambda s, v=value: processing.keep_top_p(s, v), theirs.TopPLogitsWarper(value)))
        pairs.append((f"min_p {value}", lambda s, v=value: processing.keep_min_p(s, v), theirs.MinPLogitsWarper(value)))
    eos = torch.tensor([4, 9])
    for length in (12, 13):
        pairs.append((
            f"min_length {length}",
            lambda s, v=length: processing.block_until(IDS, s, length=v, tokens=eos),
            theirs.MinLengthLogitsProcessor(length, [4, 9]),
        ))  # fmt: skip
    return pairs


@pytest.mark.parametrize("scores", [SCORES, SCORES.round(), SCORES * 1e-3, SCORES.masked_fill(SCORES > 0, -math.inf)],
                         ids=["random", "ties", "flat", "barred"])  # fmt: skip
def test_processors_equal_transformers(scores: torch.Tensor) -> None:
    for name, ours, theirs in processor_pairs():
        before = scores.clone()
        assert torch.equal(ours(scores), theirs(IDS, scores)), name
        assert torch.equal(scores, before), f"{name} changed its input"


def test_processors_run_in_transformers_order(models: tuple[Any, Any]) -> None:
    """Scores of a whole sampling configuration equal those that transformers reports for the same tokens."""
    model, reference = models
    ids = tiny.prompts(2, 9)
    options = {
        "max_new_tokens": 6, "do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02,
        "repetition_penalty": 1.3, "min_new_tokens": 6, "output_scores": True, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    out = model.generate(ids, generator=torch.Generator().manual_seed(3), **options)
    assert out.sequences.shape == (2, 15)

    one_more = {**options, "max_new_tokens": 1, "min_new_tokens": 1}
    for length, ours in enumerate(out.scores, start=9):
        theirs = reference.generate(out.sequences[:, :length], **one_more).scores[0]
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
        finite = ~torch.isinf(ours)
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-4)
        assert torch.isfinite(ours.gather(1, out.sequences[:, length, None])).all(), "a barred token was drawn"


def test_sampling_follows_the_seed(models: tuple[Any, Any]) -> None:
    model, _ = models
    ids = tiny.prompts(1, 5)
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0, "top_k": 0, "eos_token_id": 210}

    def draw(seed: int, **more: Any) -> torch.Tensor:
        return model.generate(ids, generator=torch.Generator().manual_seed(seed), **options, **more)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    with_scores = draw(1, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(with_scores.sequences, draw(1))
    torch.manual_seed(5)
    first = model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **options), first)


def test_sampling_draws_from_the_scores(models: tuple[Any, Any]) -> None:
    model, _ = models
    ids = tiny.prompts(1, 5).expand(2000, -1).contiguous()
    out = model.generate(
        ids, max_new_tokens=1, do_sample=True, top_k=5, generator=torch.Generator().manual_seed(0),
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = out.scores[0][0].softmax(-1)
    counts = torch.bincount(out.sequences[:, -1], minlength=expected.numel()) / 2000
    # 5 standard deviations of a binomial frequency, at most 0.5 / sqrt(2000) each.
    assert (counts - expected).abs().max() < 5 * 0.5 / math.sqrt(2000)


def test_return_sequences(models: tuple[Any, Any]) -> None:
    model, _ = models
    ids = tiny.prompts(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    out = model.generate(
        ids, attention_mask=mask, num_return_sequences=3, do_sample=True, temperature=1.5, max_new_tokens=5,
        generator=torch.Generator().manual_seed(0), return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert out.sequences.shape == (6, 11)
    assert torch.equal(out.sequences[:, :6], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out.sequences.tolist()}) > 2
    # Every copy goes on from its own prompt's cache.
    mask = torch.cat([mask.repeat_interleave(3, dim=0), torch.ones(6, 4)], dim=1)
    expected = model(out.sequences[:, :-1], attention_mask=mask, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(out.logits[-1], expected, rtol=1e-4, atol=1e-4)
