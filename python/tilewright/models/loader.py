"""From a file to a model: which tensor goes where, checked before use, packed one by one.

The largest matrices come first, while little else is in memory; each one's pages are given back as soon as it
is packed, so the peak stays near the size of the packed model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.io.errors import FormatError
from tilewright.models.config import ModelConfig
from tilewright.models.decoder import CausalLM, DecoderLayer
from tilewright.models.linear import Embedding, Matrix, stacked
from tilewright.models.sources import FolderSource, GGUFSource, Names, open_source
from tilewright.quant import QuantizedWeight, quantize_weight


@dataclass(frozen=True)
class Quantization:
    """How to quantise on load: arguments of `quantize_weight`, and the modules to leave as they are.

    skip: module names as in the file, or their last part; "lm_head" means the head of any file, and with it a
    tied embedding.
    """

    bits: int
    group_size: int = 32
    symmetric: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    method: str = "rtn"

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | None) -> Quantization | None:
        """From from_pretrained's `quantization`. Raises TypeError or ValueError that names it."""
        if value is None:
            return None
        if isinstance(value, str):
            if value not in ("int8", "int4"):
                raise ValueError(f"quantization: expected 'int8', 'int4', a dict or None, got {value!r}")
            return cls(8 if value == "int8" else 4)
        if not isinstance(value, Mapping):
            raise TypeError(f"quantization: expected a string, a dict or None, got {type(value).__name__}")
        known = ("bits", "group_size", "symmetric", "skip", "method")
        unknown = [key for key in value if key not in known]
        if unknown or "bits" not in value:
            raise ValueError(f"quantization: expected bits and maybe {', '.join(known[1:])}, got {dict(value)}")
        skip = value.get("skip", ("lm_head",))
        found = cls(**{**value, "skip": (skip,) if isinstance(skip, str) else tuple(skip)})
        # Bad numbers are reported now, not after half of the model is loaded.
        found.apply(torch.zeros(1, 1))
        return found

    def covers(self, name: str, is_head: bool) -> bool:
        """Whether the module of this name is quantised."""
        names = {name, name.rpartition(".")[2]} | ({"lm_head"} if is_head else set())
        return names.isdisjoint(self.skip)

    def apply(self, weight: Tensor) -> QuantizedWeight:
        """weight: (N, K) of any float dtype, N at least 1."""
        return quantize_weight(weight, self.bits, self.group_size, self.symmetric, method=self.method)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    activation: str = "int8",
) -> CausalLM:
    """Load the model at `path`, a .gguf file or a Hugging Face folder.

    dtype: of dense matrices, float32 or bfloat16; None keeps the file's (float16, which has no fast
    arithmetic on a CPU, becomes float32). Norms and biases are float32. Raises FormatError or
    NotImplementedError.
    """
    source = open_source(Path(path))
    try:
        return _Loader(source, dtype, quantization, activation).model()
    finally:
        source.close()


def check_tensors(source: GGUFSource | FolderSource) -> None:
    """One FormatError for the first tensor that is missing, of another shape, or not expected."""
    shapes, path = source.shapes, source.path
    expected = set()
    for name, shape in _expected(source.config, source.names):
        expected.add(name)
        if name not in shapes:
            raise FormatError(path, name, f"expected a tensor of shape {shape}, the file has none of that name")
        if shapes[name] != shape:
            raise FormatError(path, name, f"expected shape {shape} by the config, got {shapes[name]}")
    for name in shapes:
        if name not in expected and not source.ignorable(name):
            raise FormatError(path, name, f"expected no such tensor in a {source.config.model_type} model, got one")


def _expected(config: ModelConfig, names: Names) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the config calls for, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield f"{names.embedding}.weight", (config.vocab_size, hidden)
    yield f"{names.norm}.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield f"{names.head}.weight", (config.vocab_size, hidden)
    matrices = (
        (names.q, q, hidden, config.attention_bias),
        (names.k, kv, hidden, config.attention_bias),
        (names.v, kv, hidden, config.attention_bias),
        (names.output, hidden, q, config.attention_output_bias),
        (names.gate, inner, hidden, config.mlp_bias),
        (names.up, inner, hidden, config.mlp_bias),
        (names.down, hidden, inner, config.mlp_bias),
    )
    for i in range(config.num_hidden_layers):
        yield f"{names.attention_norm.format(i)}.weight", (hidden,)
        yield f"{names.mlp_norm.format(i)}.weight", (hidden,)
        for name, rows, columns, has_bias in matrices:
            yield f"{name.format(i)}.weight", (rows, columns)
            if has_bias:
                yield f"{name.format(i)}.bias", (rows,)


class _Loader:
    def __init__(
        self,
        source: GGUFSource | FolderSource,
        dtype: torch.dtype | None,
        quantization: Quantization | None,
        activation: str,
    ) -> None:
        self.source, self.config, self.names = source, source.config, source.names
        self.dtype, self.quantization, self.activation = dtype, quantization, activation
        self.dtypes: set[torch.dtype | None] = set()  # of the matrices; None: packed

    def model(self) -> CausalLM:
        """Check all names and shapes, then load unit by unit, the largest first."""
        check_tensors(self.source)
        shapes = self.source.shapes
        units = sorted(self.units(), key=lambda unit: -sum(prod(shapes[f"{name}.weight"]) for name in unit[1]))
        modules = {slot: self.matrix(names) for slot, names in units}
        layers = [
            DecoderLayer(
                self.vector(self.names.attention_norm.format(i)),
                modules["qkv", i],
                modules["output", i],
                self.vector(self.names.mlp_norm.format(i)),
                modules["gate_up", i],
                modules["down", i],
            )
            for i in range(self.config.num_hidden_layers)
        ]
        fp32_cache = self.activation == "fp32" if None in self.dtypes else torch.float32 in self.dtypes
        return CausalLM(
            self.config,
            Embedding(modules["embedding", 0]),
            layers,
            self.vector(self.names.norm),
            modules["embedding" if self.config.tie_word_embeddings else "head", 0],
            cache_dtype=torch.float32 if fp32_cache else torch.bfloat16,
            generation_config=self.source.generation_config,
        )

    def units(self) -> Iterator[tuple[tuple[str, int], tuple[str, ...]]]:
        """(slot, module names): the matrices that become one module."""
        names = self.names
        yield ("embedding", 0), (names.embedding,)
        if not self.config.tie_word_embeddings:
            yield ("head", 0), (names.head,)
        for i in range(self.config.num_hidden_layers):
            yield ("qkv", i), tuple(name.format(i) for name in (names.q, names.k, names.v))
            yield ("output", i), (names.output.format(i),)
            yield ("gate_up", i), (names.gate.format(i), names.up.format(i))
            yield ("down", i), (names.down.format(i),)

    def matrix(self, names: tuple[str, ...]) -> nn.Module:
        """The module of the matrices `names`, which read the same input."""
        weights = [self.weight(name) for name in names]
        biases = [self.vector(name, "bias") for name in names]
        module = stacked(weights, biases, self.activation)
        self.dtypes.update(None if isinstance(w, QuantizedWeight) else w.dtype for w in weights)
        # All pages, not only these tensors': reading maps neighbours too, a large folio at a time.
        self.source.release()
        return module

    def weight(self, name: str) -> Matrix:
        """A matrix, packed or dense; a dense one may be a view of the file."""
        weight = self.source.load(f"{name}.weight")
        is_head = name == self.names.head or (name == self.names.embedding and self.config.tie_word_embeddings)
        is_lookup = name == self.names.embedding and not is_head
        wanted = self.quantization is not None and not is_lookup and self.quantization.covers(name, is_head)
        if isinstance(weight, QuantizedWeight):
            if wanted and not is_head:
                raise ValueError(
                    f"quantization: {self.source.path} is already quantised ({name}: {weight.format}); "
                    "leave quantization out"
                )
            return weight
        if wanted:
            return self.quantization.apply(weight)
        if self.dtype is not None:
            return weight.to(self.dtype)
        return weight.float() if weight.dtype == torch.float16 else weight

    def vector(self, name: str, kind: str = "weight") -> Tensor | None:
        """A norm's weight or a bias, fp32, in memory of its own; None where there is none."""
        name = f"{name}.{kind}"
        if name not in self.source.shapes:
            return None
        tensor = self.source.load(name)
        if isinstance(tensor, QuantizedWeight):
            raise FormatError(self.source.path, name, f"expected F32, F16 or BF16, got {tensor.format}")
        copy = tensor.to(torch.float32, copy=True)
        self.source.release()
        return copy
