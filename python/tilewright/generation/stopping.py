"""When a sequence is finished. A criterion is a callable (input_ids, scores) -> bool (batch,)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.generation.config import GenerationConfig
from tilewright.generation.logits import eos_tensor

Criterion = Callable[..., Any]


class EndOfSequence:
    """The row's last token is one of `tokens` (int64 (n,))."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        return (ids[:, -1:] == self.tokens).any(1)


class OutOfTime:
    """More than `seconds` have passed since the criterion was made."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        return torch.full((ids.shape[0],), time.monotonic() > self.deadline)


class StopStrings:
    """The row's last token completes one of `strings`, wherever in the tokens these begin and end."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings, self.tokenizer = strings, tokenizer
        # A token adds at least one byte, except special ones and the pieces of a character: 4 more for these.
        self.reach = max(len(text.encode()) for text in strings) + 4

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        return torch.tensor([self._completed(row) for row in ids[:, -self.reach :].tolist()])

    def _completed(self, row: list[int]) -> bool:
        text = self.tokenizer.decode(row, skip_special_tokens=False)
        # Half of a character at the end decodes to U+FFFD, which the last token may still change.
        before = self.tokenizer.decode(row[:-1], skip_special_tokens=False).rstrip("\ufffd")
        return any(text.rfind(stop) + len(stop) > len(before) for stop in self.strings if stop in text)


def stopping_criteria(config: GenerationConfig, tokenizer: Any, custom: Sequence[Criterion] | None) -> list[Criterion]:
    """The criteria that `config` (complete) asks for, beside the length, then the caller's own."""
    found: list[Criterion] = []
    eos = eos_tensor(config)
    if eos is not None:
        found.append(EndOfSequence(eos))
    if config.max_time is not None:
        found.append(OutOfTime(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("generate: stop_strings needs the tokenizer; pass tokenizer= beside stop_strings=")
        strings = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
        found.append(StopStrings(strings, tokenizer))
    for criterion in custom or ():
        if not callable(criterion):
            raise TypeError(
                "generate: stopping_criteria must hold callables (input_ids, scores) -> bool (batch,), got "
                f"{type(criterion).__name__}"
            )
        found.append(criterion)
    return found


def finished(criteria: Sequence[Criterion], ids: Tensor, scores: Any) -> Tensor:
    """bool (batch,): the rows that any criterion ends. A criterion may also return one bool for all rows."""
    done = torch.zeros(ids.shape[0], dtype=torch.bool)
    for criterion in criteria:
        done = done | criterion(ids, scores)
    return done
