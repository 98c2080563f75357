"""What the model and `generate` return: dataclasses that can also be indexed, as transformers' can."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tilewright.cache.dynamic import DynamicCache


class ModelOutput:
    """Fields by attribute or by name; by position among the fields that are not None."""

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Any:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names of the fields that are not None."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(getattr(self, name) for name in self.keys())


@dataclass
class CausalLMOutput(ModelOutput):
    """logits: fp32 (batch, kept, vocab); past_key_values: the cache, None with use_cache=False;
    hidden_states: fp32 (batch, seq, hidden), the embeddings and every layer's output, the last one normed."""

    logits: Tensor
    past_key_values: DynamicCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """sequences: int64 (batch, length), prompt included; scores (after all processors) and logits (as the
    model gave them): one fp32 (batch, vocab) for each generated token; past_key_values: the cache, which
    holds every token of `sequences` but the last."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | None = None
