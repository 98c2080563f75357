"""A checkpoint one layer at a time: its fp32 weights under transformers' names, and the two halves of a layer.

What needs every layer once (quantising, comparing two models) runs so in the memory of one layer, however large the
model is. The forward pass is `models.decoder`'s own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.models.config import ModelConfig
from tilewright.models.decoder import RopeTables, Step, attend
from tilewright.models.linear import Matrix
from tilewright.models.loader import check_tensors
from tilewright.models.saver import halves
from tilewright.models.sources import HF_NAMES, open_source
from tilewright.ops import rms_norm, silu_mul
from tilewright.quant import QuantizedWeight

# The matrices of a layer, in the order in which they are needed: those in a group read the same input.
GROUPS = (("q", "k", "v"), ("output",), ("gate", "up"), ("down",))
MATRICES = tuple(name for group in GROUPS for name in group)
NORMS = ("attention_norm", "mlp_norm")
# States pass through half a layer in pieces of about this many tokens: what lies in between stays small.
_TOKENS = 2048
_VOCABULARY = 1 << 14  # rows of the head that are widened at a time


@dataclass
class Layer:
    """One layer's weights, float32, by their `Names`' fields: NORMS (K,) and MATRICES (N, K); biases (N,) by the same
    names, where there are any."""

    index: int
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]


class LayerReader:
    """An open checkpoint, a Hugging Face folder or a .gguf file, checked against its config.

    config: the model's, with rotary pairs in transformers' order, which the weights that this class gives have too;
    dtype: what a folder made from this checkpoint holds its dense tensors in. Raises FormatError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = open_source(path)
        try:
            check_tensors(self.source)
            self.config: ModelConfig = replace(self.source.config, rope_interleaved=False)
            self.dtype = self._dtype()
        except BaseException:
            self.source.close()
            raise
        self._swap = self.source.config.rope_interleaved
        self._tables = RopeTables(self.config)

    def close(self) -> None:
        """Let go of the file."""
        self.source.close()

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def layer(self, index: int) -> Layer:
        """The weights of one layer, in memory of their own. Raises ValueError for NaN and infinity in them."""
        names, weights, biases = self.source.names, {}, {}
        for name in (*NORMS, *MATRICES):
            tensor = getattr(names, name).format(index)
            weights[name] = self._float(f"{tensor}.weight", name)
            if f"{tensor}.bias" in self.source.shapes:
                biases[name] = self._float(f"{tensor}.bias", name)
        return Layer(index, weights, biases)

    def norm(self) -> Tensor:
        """The last norm's weight, float32 (hidden,)."""
        return self._float(f"{self.source.names.norm}.weight", "norm")

    def embedding(self) -> Matrix:
        """The embedding as the file has it, (vocab, hidden)."""
        return self.source.load(f"{self.source.names.embedding}.weight")

    def head(self) -> Matrix:
        """The language-model head as the file has it, (vocab, hidden)."""
        if self.config.tie_word_embeddings:
            return self.embedding()
        return self.source.load(f"{self.source.names.head}.weight")

    def head_weight(self) -> Tensor:
        """The head as float32 in memory of its own. Raises ValueError for NaN and infinity in it."""
        return self._float(f"{self.source.names.head}.weight", "head")

    def linear_columns(self) -> Iterator[tuple[str, int]]:
        """transformers' names of all linear modules, and how many columns each has."""
        for index in range(self.config.num_hidden_layers):
            for name in MATRICES:
                tensor = getattr(self.source.names, name).format(index)
                yield hf_name(name, index), self.source.shapes[f"{tensor}.weight"][1]
        yield HF_NAMES.head, self.config.hidden_size

    def embed(self, ids: Tensor) -> Tensor:
        """float32 (*ids.shape, hidden) of int64 ``ids``."""
        matrix = self.embedding()
        states = matrix.rows(ids) if isinstance(matrix, QuantizedWeight) else F.embedding(ids, matrix).float()
        self.source.release()
        return states

    def attended(self, layer: Layer, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The input of the output projection for each piece of ``states`` (samples, seq, hidden): (which samples,
        (them, seq, heads * head_dim))."""
        config, (samples, seq, _) = self.config, states.shape
        cos, sin = self._tables.upto(seq)
        positions = torch.arange(seq)
        for piece in _pieces(samples, seq):
            batch = piece.stop - piece.start
            cached = (batch, config.num_key_value_heads, seq, config.head_dim)
            step = Step(
                cos, sin, positions, positions, torch.zeros(batch, dtype=torch.int64), torch.full((batch,), seq)
            )
            x = rms_norm(states[piece], layer.weights["attention_norm"], config.rms_norm_eps)
            qkv = _beside(layer, GROUPS[0], x)
            left = config.left_window(layer.index)
            yield piece, attend(qkv, step, torch.empty(cached), torch.empty(cached), config, left)

    def gated(self, layer: Layer, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same for the down projection; ``states``: the residual stream after attention."""
        for piece in _pieces(*states.shape[:2]):
            x = rms_norm(states[piece], layer.weights["mlp_norm"], self.config.rms_norm_eps)
            yield piece, silu_mul(*_beside(layer, GROUPS[2], x).chunk(2, dim=-1))

    def normed(self, weight: Tensor, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """``states`` behind a norm, piece by piece."""
        for piece in _pieces(*states.shape[:2]):
            yield piece, rms_norm(states[piece], weight, self.config.rms_norm_eps)

    def forward(self, layer: Layer, states: Tensor) -> None:
        """One layer, in place on the residual stream ``states`` (samples, seq, hidden)."""
        for piece, x in self.attended(layer, states):
            states[piece] += linear(layer, "output", x)
        for piece, x in self.gated(layer, states):
            states[piece] += linear(layer, "down", x)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """float32 (tokens, vocab) of states (tokens, hidden) behind the last layer."""
        x = rms_norm(states, self.norm(), self.config.rms_norm_eps)
        head = self.head()
        logits = []
        for start in range(0, self.config.vocab_size, _VOCABULARY):
            rows = torch.arange(start, min(start + _VOCABULARY, self.config.vocab_size))
            part = head.rows(rows) if isinstance(head, QuantizedWeight) else head[rows].float()
            logits.append(x @ part.t())
        self.source.release()
        return torch.cat(logits, dim=-1).log_softmax(-1)

    def _float(self, name: str, kind: str) -> Tensor:
        tensor = self.source.load(name)
        if isinstance(tensor, QuantizedWeight):
            tensor = tensor.dequantize()
        else:
            tensor = tensor.to(torch.float32, copy=True)
        self.source.release()
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.path}: {name}: expected finite numbers, got NaN or infinity")
        return halves(tensor, self.config.head_dim) if self._swap and kind in ("q", "k") else tensor

    def _dtype(self) -> torch.dtype:
        """What the config names, which transformers loads everything in; else the embedding's, or float16 where that
        is quantised."""
        named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if self.config.dtype in named:
            return named[self.config.dtype]
        embedding = self.embedding()
        self.source.release()
        return torch.float16 if isinstance(embedding, QuantizedWeight) else embedding.dtype


def linear(layer: Layer, name: str, x: Tensor) -> Tensor:
    """One of the layer's matrices on x."""
    return F.linear(x, layer.weights[name], layer.biases.get(name))


def _beside(layer: Layer, names: tuple[str, ...], x: Tensor) -> Tensor:
    return torch.cat([linear(layer, name, x) for name in names], dim=-1)


def hf_name(name: str, index: int) -> str:
    """transformers' name of a module of a layer."""
    return getattr(HF_NAMES, name).format(index)


def _pieces(samples: int, seq: int) -> Iterator[slice]:
    step = max(_TOKENS // seq, 1)
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))
