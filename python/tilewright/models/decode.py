"""One decoding step, prepared: the calls of all layers on buffers that stay.

Python's part of a step falls from about 60 to 8 microseconds a layer, which is what makes the difference for a
small model. The calls are those of `models.decoder`, in the same order on the same values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright.cache.dynamic import DynamicCache
from tilewright.ops import bound

if TYPE_CHECKING:
    from tilewright.models.decoder import CausalLM


class DecodeStep:
    """A step of one token a sequence for one model and the present buffers of one cache.

    It lives in the cache (`DynamicCache.step`), so that threads with caches of their own do not share buffers.
    """

    def __init__(self, model: CausalLM, cache: DynamicCache, tables: tuple[Tensor, Tensor]) -> None:
        config, eps = model.config, model.config.rms_norm_eps
        batch, kv_heads, _, head_dim = cache.keys[0].shape
        heads = config.num_attention_heads
        self.layers, self.keys, self.starts = model.bound_layers(), cache.keys[0], cache.starts
        self.tables = tables

        self.ids, self.rows = torch.zeros(batch, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self.end = torch.zeros(batch, dtype=torch.int64)
        # Without padding the cache's row is the position of every sequence.
        self.positions = torch.zeros(batch, 1, dtype=torch.int64) if cache.padded else self.rows

        def buffer(*shape: int) -> Tensor:
            return torch.empty(batch, *shape)

        total, other = buffer(1, config.hidden_size), buffer(1, config.hidden_size)
        self.normed = buffer(1, config.hidden_size)
        qkv = buffer(1, (heads + 2 * kv_heads) * head_dim)
        q, k, v = qkv.view(batch, 1, -1, head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        attended = buffer(heads, 1, head_dim)

        calls = [bound.embedding(self.ids, model.embedding.matrix, total.view(batch, -1))]
        for index, layer in enumerate(model.layers):
            # The residual stream goes back and forth between two buffers.
            keys, values, left = cache.keys[index], cache.values[index], config.left_window(index)
            calls += [
                bound.norm(total, layer.attention_norm, eps, self.normed),
                bound.linear(self.normed, layer.qkv, qkv),
                bound.rope(q, k, *self.tables, self.positions, config.rope_interleaved, config.rotary_dim),
                bound.kv_append(keys, values, k, v, self.rows),
                bound.attention(q, keys, values, self.starts, self.end, head_dim**-0.5, left, attended),
                bound.linear(attended.view(batch, 1, -1), layer.output, other, total),
                bound.norm(other, layer.mlp_norm, eps, self.normed),
                *bound.mlp(self.normed, layer.gate_up, layer.down, config.intermediate_size, total, other),
            ]
        self.calls = [*calls, bound.norm(total, model.norm, eps, self.normed)]

    def fits(self, model: CausalLM, cache: DynamicCache, tables: tuple[Tensor, Tensor]) -> bool:
        """Whether it still describes model, cache and rotary tables: buffers grow, weights may be replaced."""
        return (
            self.keys is cache.keys[0]
            and self.starts is cache.starts
            and self.tables[0] is tables[0]
            and self.layers is model.bound_layers()
        )

    def run(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Take one token of each sequence, int64 (batch, 1); gives the last normed state, fp32 (batch, 1, hidden).

        The result is overwritten by the next step. The cache has room and is not advanced here.
        """
        self.ids.copy_(ids[:, 0])
        self.rows.fill_(cache.length)
        self.end.fill_(cache.length + 1)
        if cache.padded:
            torch.sub(self.rows, self.starts[:, None], out=self.positions)
        for call in self.calls:
            call()
        return self.normed
