"""The llama-family decoder, readable from top to bottom.

Activations between the ops are fp32. Python makes about ten calls a layer, on weights bound to plain
functions beforehand; what depends only on the step (positions, tables, valid keys) is computed once for all
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.cache.dynamic import DynamicCache
from tilewright.generation.config import GenerationConfig
from tilewright.generation.loop import generate
from tilewright.models.config import ModelConfig
from tilewright.models.decode import DecodeStep
from tilewright.models.inputs import check_ids, check_kept, check_positions, left_padding
from tilewright.models.linear import Embedding, bound, bound_mlp, bound_residual
from tilewright.models.outputs import CausalLMOutput
from tilewright.models.saver import save_pretrained
from tilewright.ops import kv_append, rms_norm, rope, rope_tables
from tilewright.ops.attention import attention_cached
from tilewright.ops.registry import direct

_FIRST_POSITIONS = 1024


class DecoderLayer(nn.Module):
    """One layer's weights: norms fp32 (hidden,), matrices as modules of `models.linear`."""

    def __init__(
        self,
        attention_norm: Tensor,
        qkv: nn.Module,
        output: nn.Module,
        mlp_norm: Tensor,
        gate_up: nn.Module,
        down: nn.Module,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(attention_norm, requires_grad=False)
        self.qkv, self.output = qkv, output
        self.mlp_norm = nn.Parameter(mlp_norm, requires_grad=False)
        self.gate_up, self.down = gate_up, down


@dataclass(slots=True)
class BoundLayer:
    """A DecoderLayer bound for the hot path; output and mlp are called with `residual`, the residual stream, and add
    to it. left: see `ModelConfig.left_window`."""

    attention_norm: Tensor
    qkv: Callable[[Tensor], Tensor]
    output: Callable[..., Tensor]
    mlp_norm: Tensor
    mlp: Callable[..., Tensor]
    left: int


@dataclass(slots=True)
class Step:
    """What all layers of one forward pass share. int64 tensors; rows: where the new keys go in the cache."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    rows: Tensor
    k_start: Tensor
    k_end: Tensor


class CausalLM(nn.Module):
    """A decoder with its language-model head; made by `models.loader`, used through `forward` and `generate`.

    Weights take no gradient. A model may be used from several threads at once, each with its own cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: Tensor,
        head: nn.Module,
        *,
        cache_dtype: torch.dtype,
        generation_config: GenerationConfig,
    ) -> None:
        super().__init__()
        self.config, self.generation_config, self.cache_dtype = config, generation_config, cache_dtype
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(norm, requires_grad=False)
        self.head = head
        self.rope = RopeTables(config)
        self._bound: list[BoundLayer] | None = None
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations between ops, and of the logits."""
        return torch.float32

    @property
    def decode_nbytes(self) -> int:
        """Bytes of weights that one decoding step reads: everything but an embedding of its own."""
        read = (self.layers, self.head)
        return (
            sum(tensor.nbytes for part in read for tensor in (*part.parameters(), *part.buffers())) + self.norm.nbytes
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits of every position, or of the last `logits_to_keep` (or of the positions in that tensor).

        input_ids: integers (batch, seq) below vocab_size; attention_mask: (batch, past + seq), 0 for padding,
        which must be on the left; position_ids: integers (seq,) or (batch, seq), default: counted from each
        row's first real token; past_key_values: the cache to read and extend, default: a new one; use_cache
        False returns none. Raises ValueError or TypeError for anything else.
        """
        check_ids(input_ids, self.config.vocab_size)
        if use_cache is False and past_key_values is not None:
            raise ValueError("forward: use_cache=False contradicts past_key_values; leave one of them out")
        cache = DynamicCache() if past_key_values is None else past_key_values
        if not isinstance(cache, DynamicCache):
            raise TypeError(f"forward: past_key_values must be a DynamicCache, got {type(cache).__name__}")
        batch, seq = input_ids.shape
        states: list[Tensor] | None = [] if output_hidden_states else None
        logits = self.run(
            input_ids.long(),
            cache,
            starts=left_padding(attention_mask, batch, cache.length + seq),
            position_ids=check_positions(position_ids, batch, seq),
            logits_to_keep=check_kept(logits_to_keep, seq),
            hidden_states=states,
        )
        return CausalLMOutput(
            logits=logits,
            past_key_values=None if use_cache is False else cache,
            hidden_states=None if states is None else tuple(states),
        )

    def run(
        self,
        ids: Tensor,
        cache: DynamicCache,
        *,
        starts: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 1,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """`forward` without its checks: extends `cache`, appends to `hidden_states`, returns the logits.

        ids: int64 (batch, seq); starts: int64 (batch,), the first real token of each row counted from the
        cache's first, default: what the cache knows.
        """
        if ids.shape[1] == 1 and cache.length and starts is None and position_ids is None and hidden_states is None:
            prepared = self._prepared(ids, cache)
            if prepared is not None:
                state = prepared.run(ids, cache)
                cache.advance(1)
                return self._head(state)
        first = cache.starts if starts is None else starts
        padded = ids.shape[1] > 1 and first is not None and (ids.shape[0] > 1 or int(first[0]) > cache.length)
        if padded and position_ids is None and hidden_states is None and bool(first.any()):
            return self._run_rows(ids, cache, starts, logits_to_keep)
        config, layers = self.config, self.bound_layers()
        step = self._begin(ids, cache, starts, position_ids)
        total = self.embedding(ids)  # the residual stream
        for index, layer in enumerate(layers):
            if hidden_states is not None:
                hidden_states.append(total)
            x = rms_norm(total, layer.attention_norm, config.rms_norm_eps)
            x = attend(layer.qkv(x), step, cache.keys[index], cache.values[index], config, layer.left)
            total = layer.output(x, residual=total)
            total = layer.mlp(rms_norm(total, layer.mlp_norm, config.rms_norm_eps), residual=total)
        cache.advance(ids.shape[1])

        if hidden_states is not None:
            hidden_states.append(rms_norm(total, self.norm, config.rms_norm_eps))
        if isinstance(logits_to_keep, Tensor):
            total = total[:, logits_to_keep]
        elif 0 < logits_to_keep < ids.shape[1]:
            total = total[:, -logits_to_keep:]
        return self._head(rms_norm(total, self.norm, config.rms_norm_eps))

    def _run_rows(self, ids: Tensor, cache: DynamicCache, starts: Tensor | None, keep: int | Tensor) -> Tensor:
        """`run` for sequences with padding in front, one after the other: padding costs nothing, and a sequence's
        results have the same bits as if it were alone. Logits of padding are 0."""
        config, (batch, seq), past = self.config, ids.shape, cache.length
        heads, head_dim = config.num_key_value_heads, config.head_dim
        cache.reserve(seq, config.num_hidden_layers, batch, heads, head_dim, self.cache_dtype)
        if starts is not None:
            cache.set_starts(starts)
        wanted = torch.arange(seq)
        wanted = wanted[keep if isinstance(keep, Tensor) else slice(-keep, None) if keep else slice(None)]
        logits = torch.zeros(batch, len(wanted), config.vocab_size)
        for row, start in enumerate(cache.starts.tolist()):
            padding = max(start - past, 0)
            real = wanted >= padding
            if padding < seq:
                part = self.run(
                    ids[row : row + 1, padding:], cache.row(row, past + padding), logits_to_keep=wanted[real] - padding
                )
                logits[row, real] = part[0]
        cache.advance(seq)
        return logits

    # Free functions that take the model first.
    generate = generate
    save_pretrained = save_pretrained

    def _begin(self, ids: Tensor, cache: DynamicCache, starts: Tensor | None, position_ids: Tensor | None) -> Step:
        """Make room in the cache and work out what all layers share."""
        batch, seq = ids.shape
        past, end = cache.length, cache.length + seq
        self._reserve(seq, batch, cache)
        if starts is not None:
            cache.set_starts(starts)
        rows = torch.arange(past, end)
        if position_ids is not None:
            positions, last = position_ids, int(position_ids.max()) + 1
        else:
            # Without padding one row of positions serves the whole batch.
            positions = (rows - cache.starts[:, None]).clamp_(min=0) if cache.padded else rows
            last = end
        cos, sin = self.rope.upto(last)
        return Step(cos, sin, positions, rows, cache.starts, torch.full((batch,), end))

    def _prepared(self, ids: Tensor, cache: DynamicCache) -> DecodeStep | None:
        """The decoding step for this cache, with room for one more token; None where it may not be used."""
        if not direct(ids):
            return None  # some mode is on in which torch has to see every op
        self._reserve(1, ids.shape[0], cache)
        tables = self.rope.upto(cache.length + 1)
        if cache.step is None or not cache.step.fits(self, cache, tables):
            with torch.inference_mode(False):  # its buffers also serve later calls outside that mode
                cache.step = DecodeStep(self, cache, tables)
        return cache.step

    def _reserve(self, tokens: int, batch: int, cache: DynamicCache) -> None:
        config = self.config
        heads, head_dim = config.num_key_value_heads, config.head_dim
        cache.reserve(tokens, config.num_hidden_layers, batch, heads, head_dim, self.cache_dtype)

    def bound_layers(self) -> list[BoundLayer]:
        """The layers for the hot path; another list whenever weights may have been replaced."""
        if self._bound is not None:
            return self._bound
        self._head = bound(self.head)
        self._bound = [
            BoundLayer(
                layer.attention_norm,
                bound(layer.qkv),
                bound_residual(layer.output),
                layer.mlp_norm,
                bound_mlp(layer.gate_up, layer.down),
                self.config.left_window(index),
            )
            for index, layer in enumerate(self.layers)
        ]
        return self._bound

    def _apply(self, *args: Any, **kwargs: Any) -> CausalLM:
        self._bound = None  # parameters may be replaced, for example by to()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        self._bound = None
        return super().load_state_dict(*args, **kwargs)


def attend(qkv: Tensor, step: Step, keys: Tensor, values: Tensor, config: ModelConfig, left: int) -> Tensor:
    """Causal self-attention of fp32 (batch, seq, (heads + 2 kv_heads) * head_dim), (batch, seq, heads * head_dim);
    keys, values: the layer's cache."""
    batch, seq, _ = qkv.shape
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    heads = qkv.view(batch, seq, -1, head_dim).transpose(1, 2)
    q, k, v = heads.split((config.num_attention_heads, kv_heads, kv_heads), dim=1)
    q, k = rope(
        q,
        k,
        step.cos,
        step.sin,
        positions=step.positions,
        interleaved=config.rope_interleaved,
        rotary_dim=config.rotary_dim,
        inplace=True,
    )
    kv_append(keys, values, k, v, step.rows)
    out = attention_cached(q, keys, values, k_start=step.k_start, k_end=step.k_end, scale=head_dim**-0.5, left=left)
    return out.transpose(1, 2).reshape(batch, seq, -1)


class RopeTables:
    """cos and sin up to the longest position seen, grown by doubling; recomputed when the scaling says so."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tables: tuple[int, Tensor, Tensor] | None = None  # (regime, cos, sin)

    def upto(self, length: int) -> tuple[Tensor, Tensor]:
        """fp32 (at least length, rotary_dim / 2) each."""
        regime = self._regime(length)
        if self.tables is None or self.tables[0] != regime or self.tables[1].shape[0] < length:
            capacity = _FIRST_POSITIONS
            while capacity < length:
                capacity *= 2
            config = self.config
            dim = config.rotary_dim or config.head_dim
            # The length decides the frequencies only in the two regimes that depend on it.
            cos, sin = rope_tables(config.rope_theta, dim, capacity, config.rope_scaling, regime or None)
            self.tables = (regime, cos, sin)
        return self.tables[1], self.tables[2]

    def _regime(self, length: int) -> int:
        """What the frequencies depend on: nothing, the length, or whether it is beyond the context."""
        scaling = self.config.rope_scaling
        if scaling is None or scaling["rope_type"] not in ("dynamic", "longrope"):
            return 0
        original = scaling["original_max_position_embeddings"]
        beyond = length if scaling["rope_type"] == "dynamic" else original + 1
        return beyond if length > original else original
