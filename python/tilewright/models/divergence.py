"""How far a model is from another one on a text: perplexities and the mean Kullback-Leibler divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tilewright.models.layerwise import LayerReader

_ROWS = 128  # tokens whose probabilities are held at a time


@dataclass(frozen=True)
class Divergence:
    """tokens: how many predictions were compared; perplexities: of the text, before and after; kl: mean divergence in
    nats of the distribution after from the one before; same_choice: the share of tokens on which both agree first."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    same_choice: float


@torch.no_grad()
def divergence(before: Path, after: Path, ids: Tensor, step: Callable[[], None] = lambda: None) -> Divergence:
    """Compare two checkpoints of one model with fp32 activations, a layer of each in memory at a time.

    ids: int64 (samples, seq), seq at least 2, each sample a text of its own. step is called after each layer.
    """
    with LayerReader(before) as reader, LayerReader(after) as other:
        states, others = reader.embed(ids), other.embed(ids)
        for index in range(reader.config.num_hidden_layers):
            reader.forward(reader.layer(index), states)
            other.forward(other.layer(index), others)
            step()
        return _compare(reader, other, states, others, ids)


def _compare(reader: LayerReader, other: LayerReader, states: Tensor, others: Tensor, ids: Tensor) -> Divergence:
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()
    states, others = states.flatten(0, 1), others.flatten(0, 1)
    kl, same, surprise, other_surprise = 0.0, 0, 0.0, 0.0
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = reader.log_probabilities(states[rows]), other.log_probabilities(others[rows])
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        known = targets[rows] >= 0
        wanted = targets[rows][known, None]
        surprise -= float(p[known].gather(1, wanted).sum())
        other_surprise -= float(q[known].gather(1, wanted).sum())
    predicted = int((targets >= 0).sum())
    return Divergence(
        tokens=len(targets),
        perplexity_before=math.exp(surprise / predicted),
        perplexity_after=math.exp(other_surprise / predicted),
        kl=kl / len(targets),
        same_choice=same / len(targets),
    )
