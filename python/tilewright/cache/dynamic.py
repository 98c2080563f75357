"""The key-value cache that grows with the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FIRST_CAPACITY = 256  # tokens; a chat turn of the default model fits without growing


class DynamicCache:
    """Keys and values of every layer, (batch, kv_heads, capacity, head_dim) each, grown by doubling.

    Rows of all sequences are written at the same place, so a sequence that is shorter than the others has
    padding in front: its valid keys are [starts[b], length). What lies outside is never read.

    A forward pass calls `reserve`, writes its keys and values behind `length` in each layer's `keys` and
    `values`, and calls `advance` when all layers are done. Until then nothing has changed for a reader, so an
    exception in between leaves the cache as it was. Empty until the first use, which fixes batch and dtype.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.length = 0
        self.starts: Tensor | None = None  # int64 (batch,)
        self.padded = False  # whether any start is not 0
        self.step: Any = None  # the model's prepared decoding step on these buffers; the model sees to it

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens per sequence, padding included; the same for every layer."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes of the cached keys and values (without the room to grow)."""
        return sum(buffer[:, :, : self.length].numel() * buffer.element_size() for buffer in (*self.keys, *self.values))

    def reserve(self, tokens: int, layers: int, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Make room for `tokens` more. Raises ValueError if the cache belongs to another batch or model."""
        shape = (layers, batch, heads, head_dim)
        have = (len(self.keys), *self.keys[0].shape[:2], self.keys[0].shape[3]) if self.keys else None
        if self.length == 0:
            if have != shape:
                self.keys, self.values = [], []
            self.set_starts(torch.zeros(batch, dtype=torch.int64))
        elif have != shape:
            raise ValueError(
                f"past_key_values: expected (layers, batch, kv heads, head_dim) = {shape}, got a cache of "
                f"{have}; use a new DynamicCache() for another batch or model"
            )
        capacity = self.keys[0].shape[2] if self.keys else 0
        needed = self.length + tokens
        if needed <= capacity:
            return
        capacity = max(needed, 2 * capacity, _FIRST_CAPACITY)
        dtype = self.keys[0].dtype if self.keys else dtype
        if not self.keys:
            keys = [torch.empty(batch, heads, capacity, head_dim, dtype=dtype) for _ in range(layers)]
            self.values = [torch.empty_like(buffer) for buffer in keys]
            self.keys = keys
            return
        # keys[0], whose capacity stands for all, comes last: an interrupt leaves nothing that looks grown.
        for buffers in (self.values, self.keys):
            for layer in reversed(range(layers)):
                grown = torch.empty(batch, heads, capacity, head_dim, dtype=dtype)
                grown[:, :, : self.length] = buffers[layer][:, :, : self.length]
                buffers[layer] = grown

    def row(self, index: int, length: int) -> DynamicCache:
        """Sequence `index` as a cache of its own, `length` tokens long, that shares the memory reserved here."""
        row = DynamicCache()
        row.keys = [buffer[index : index + 1] for buffer in self.keys]
        row.values = [buffer[index : index + 1] for buffer in self.values]
        row.length = length
        row.set_starts(self.starts[index : index + 1])
        return row

    def set_starts(self, starts: Tensor) -> None:
        """Where each sequence's first real token is, int64 (batch,)."""
        self.starts, self.padded = starts, bool(starts.any())

    def __getstate__(self) -> dict[str, Any]:
        # A copy prepares a step of its own; this one's holds on to the model's weights.
        return {**self.__dict__, "step": None}

    def advance(self, tokens: int) -> None:
        """Count `tokens` rows, written behind `length` in every layer, as cached."""
        self.length += tokens

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` tokens; a negative number says how many to forget."""
        if max_length < 0:
            max_length = max(self.length + max_length, 0)
        self.length = min(self.length, max_length)
        if self.starts is not None:
            self.set_starts(self.starts.clamp(max=self.length))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies next to each other."""
        keys = [buffer.repeat_interleave(repeats, dim=0) for buffer in self.keys]
        values = [buffer.repeat_interleave(repeats, dim=0) for buffer in self.values]
        starts = None if self.starts is None else self.starts.repeat_interleave(repeats)
        self.keys, self.values, self.starts = keys, values, starts
