"""What happens to the logits between the model and the choice of a token.

Every function takes scores (batch, vocab) fp32 and returns new scores; a removed token has -inf. Definitions
and order are those of transformers' logits processors, so that scores agree value by value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tilewright.generation.config import GenerationConfig

Processor = Callable[[Tensor, Tensor], Tensor]


def penalise_repetition(ids: Tensor, scores: Tensor, *, penalty: float, starts: Tensor | None = None) -> Tensor:
    """Divide positive scores of tokens that occur in `ids` by `penalty`, multiply negative ones.

    ids: int64 (batch, seq); starts: int64 (batch,), the first real token of each row (what comes before it is
    padding), or None. Keskar et al. 2019, https://arxiv.org/abs/1909.05858.
    """
    if starts is not None:
        positions = torch.arange(ids.shape[1], device=ids.device)
        # The last token is always a real one: standing in for the padding it adds nothing.
        ids = torch.where(positions >= starts[:, None], ids, ids[:, -1:])
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def block_until(ids: Tensor, scores: Tensor, *, length: int, tokens: Tensor) -> Tensor:
    """Remove `tokens` (int64) while the sequence is shorter than `length`."""
    return scores.index_fill(1, tokens, -math.inf) if ids.shape[1] < length else scores


def warp_temperature(scores: Tensor, temperature: float) -> Tensor:
    """Scores divided by the temperature."""
    return scores / temperature


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` best tokens, and those that tie with the last of them."""
    least = torch.topk(scores, min(top_k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, -math.inf)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of best tokens whose probability reaches `top_p`: at least one.

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    ascending, order = torch.sort(scores)
    # Summed from the least likely token, as transformers does: the boundary falls on the same token.
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    remove[:, -1] = False
    return scores.masked_fill(torch.zeros_like(remove).scatter(1, order, remove), -math.inf)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Keep the tokens with at least `min_p` times the best one's probability (https://arxiv.org/abs/2407.01082)."""
    probabilities = scores.softmax(-1)
    best, index = probabilities.max(-1, keepdim=True)
    remove = (probabilities < min_p * best).scatter(1, index, False)
    return scores.masked_fill(remove, -math.inf)


def processors(
    config: GenerationConfig, prompt_length: int, starts: Tensor | None, custom: Sequence[Processor] | None
) -> list[Processor]:
    """The processors that `config` asks for, then the caller's own; greedy decoding and sampling use them.

    config: complete (see `GenerationConfig.complete`); starts as in `penalise_repetition`.
    """
    found: list[Processor] = []
    if config.repetition_penalty != 1.0:
        found.append(partial(penalise_repetition, penalty=config.repetition_penalty, starts=starts))
    eos = eos_tensor(config)
    if eos is not None:
        length = max(config.min_length, prompt_length + (config.min_new_tokens or 0))
        if length > prompt_length:
            found.append(partial(block_until, length=length, tokens=eos))
    for processor in custom or ():
        if not callable(processor):
            raise TypeError(
                "generate: logits_processor must hold callables (input_ids, scores) -> scores, got "
                f"{type(processor).__name__}"
            )
        found.append(processor)
    return found


def warp(scores: Tensor, config: GenerationConfig) -> Tensor:
    """Temperature, top-k, top-p, min-p, in this order: the scores whose softmax sampling draws from."""
    if config.temperature != 1.0:
        scores = warp_temperature(scores, config.temperature)
    if config.top_k:
        scores = keep_top_k(scores, config.top_k)
    if config.top_p < 1.0:
        scores = keep_top_p(scores, config.top_p)
    if config.min_p:
        scores = keep_min_p(scores, config.min_p)
    return scores


def eos_tensor(config: GenerationConfig) -> Tensor | None:
    """The end-of-sequence ids, int64 (n,), None without any."""
    eos = config.eos_token_id
    if eos is None:
        return None
    return torch.tensor([eos] if isinstance(eos, int) else list(eos), dtype=torch.int64)
