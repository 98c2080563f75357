"""What a checkpoint says about its model, read from config.json or GGUF metadata and checked field by field.

A family is a row of `FAMILIES`, not a code path: the decoder looks only at `ModelConfig`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilewright.io.errors import FormatError
from tilewright.models.fields import REQUIRED, Fields
from tilewright.ops import rope_tables


@dataclass(frozen=True)
class Family:
    """One architecture of the llama kind: what its config leaves out, and where it has biases and windows.

    `qkv_bias`, `output_bias`, `mlp_bias` and `windowed` (the sliding window) name the config key that
    switches the feature, or say True or False; `defaults` is what transformers assumes for absent keys.
    """

    model_type: str
    architecture: str
    qkv_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    windowed: str | bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            defaults={"max_position_embeddings": 2048},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            windowed=True,
            defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            qkv_bias=True,
            windowed="use_sliding_window",
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
    )
}

# general.architecture -> whether its q and k rows are stored for interleaved rotary pairs.
GGUF_ARCHITECTURES: dict[str, bool] = {"llama": True}

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_MAX_LAYERS = 1 << 16


@dataclass
class ModelConfig:
    """The model's shape and constants, under transformers' names.

    `rope_scaling` is None or a complete dict for `ops.rope_tables` (defaults filled in); `rotary_dim` None
    stands for all of the head. `sliding_window` counts the keys a query sees, itself included, in the layers
    whose `layer_types` is "sliding_attention". `attention_bias` is the bias of q, k and v,
    `attention_output_bias` that of the output projection. `raw` is the config.json, {} for a GGUF file.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: dict[str, Any] | None = None
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def left_window(self, layer: int) -> int:
        """How many keys before its own position a query of the layer sees; -1: all of them."""
        if self.sliding_window is None or self.layer_types[layer] != "sliding_attention":
            return -1
        return self.sliding_window - 1

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], path: str | os.PathLike[str]) -> ModelConfig:
        """Read the dict of the config.json at `path`, in the spelling of transformers 4 or 5.

        Raises FormatError for a field that is missing, ill-typed or contradicts another, NotImplementedError
        for an architecture, activation or rotary variant that is not supported. What its quantization_config says is
        left to `models.schemes`.
        """
        family = _hf_family(Fields(config, path))
        fields = Fields(config, path, defaults=family.defaults)
        activation = fields.text("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise fields.unsupported("hidden_act", f"{activation!r} is not supported, only 'silu' is")

        heads = fields.integer("num_attention_heads")
        hidden = fields.integer("hidden_size")
        layers = fields.integer("num_hidden_layers", most=_MAX_LAYERS)
        if fields.get("head_dim") is None and hidden % heads:
            raise fields.error("hidden_size", f"a multiple of num_attention_heads ({heads})", hidden)
        head_dim = fields.integer("head_dim", hidden // heads)
        kv_heads = fields.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})", kv_heads)
        max_positions = fields.integer("max_position_embeddings")
        theta, rotary_dim, scaling = _hf_rope(fields, head_dim, max_positions)
        sliding_window, layer_types = _hf_windows(fields, family, layers)
        return cls(
            model_type=family.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            max_position_embeddings=max_positions,
            rope_scaling=scaling,
            rotary_dim=rotary_dim,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=_switch(fields, family.qkv_bias),
            attention_output_bias=_switch(fields, family.output_bias),
            mlp_bias=_switch(fields, family.mlp_bias),
            sliding_window=sliding_window,
            layer_types=layer_types,
            bos_token_id=fields.token("bos_token_id"),
            eos_token_id=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            dtype=fields.text("dtype" if fields.get("dtype") is not None else "torch_dtype", None),
            raw=dict(config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> ModelConfig:
        """Read the metadata of the GGUF file at `path`. Raises as `from_hf` does."""
        general = Fields(metadata, path)
        arch = general.text("general.architecture")
        if arch not in GGUF_ARCHITECTURES:
            raise general.unsupported(
                "general.architecture",
                f"{arch!r} is not supported, supported: {', '.join(GGUF_ARCHITECTURES)}",
            )
        fields = Fields(metadata, path, prefix=f"{arch}.")
        if fields.integer("expert_count", 0, least=0):
            raise fields.unsupported("expert_count", "mixtures of experts are not supported")
        heads = fields.same_everywhere("attention.head_count")
        kv_heads = fields.same_everywhere("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise fields.error("attention.head_count_kv", f"a divisor of head_count ({heads})", kv_heads)
        hidden = fields.integer("embedding_length")
        if fields.get("attention.key_length") is None and hidden % heads:
            raise fields.error("embedding_length", f"a multiple of attention.head_count ({heads})", hidden)
        head_dim = fields.integer("attention.key_length", hidden // heads)
        value_dim = fields.integer("attention.value_length", head_dim)
        if value_dim != head_dim:
            raise fields.error("attention.value_length", f"attention.key_length ({head_dim})", value_dim)
        rotary_dim = fields.integer("rope.dimension_count", head_dim)
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise fields.error("rope.dimension_count", f"an even number up to {head_dim}", rotary_dim)
        layers = fields.integer("block_count", most=_MAX_LAYERS)
        max_positions = fields.integer("context_length")
        theta = fields.number("rope.freq_base", 10000.0)
        tokens = Fields(metadata, path, prefix="tokenizer.ggml.")
        vocabulary = tokens.get("tokens")
        return cls(
            model_type=arch,
            vocab_size=fields.integer("vocab_size", len(vocabulary) if isinstance(vocabulary, list) else REQUIRED),
            hidden_size=hidden,
            intermediate_size=fields.same_everywhere("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            max_position_embeddings=max_positions,
            rope_scaling=_gguf_rope_scaling(fields, theta, rotary_dim, max_positions),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            rope_interleaved=GGUF_ARCHITECTURES[arch],
            layer_types=("full_attention",) * layers,
            bos_token_id=tokens.token("bos_token_id"),
            eos_token_id=_gguf_eos(tokens),
            pad_token_id=tokens.token("padding_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json: the one this model was read from, or one in transformers 5's spelling."""
        if self.raw:
            return dict(self.raw)
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        if self.rotary_dim is not None:
            rope["partial_rotary_factor"] = self.rotary_dim / self.head_dim
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings "
            "attention_bias mlp_bias hidden_act bos_token_id eos_token_id pad_token_id"
        )
        return {
            "architectures": [FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in names.split()},
            "rope_parameters": rope,
        }


def _hf_family(fields: Fields) -> Family:
    model_type = fields.text("model_type")
    supported = ", ".join(f"{name} ({family.architecture})" for name, family in FAMILIES.items())
    if model_type not in FAMILIES:
        raise fields.unsupported("model_type", f"{model_type!r} is not supported, supported: {supported}")
    family = FAMILIES[model_type]
    architectures = fields.get("architectures")
    if architectures is None:
        return family
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise fields.error("architectures", "a list of class names", architectures)
    if family.architecture not in architectures:
        raise fields.unsupported("architectures", f"{architectures} is not supported, supported: {supported}")
    return family


def _switch(fields: Fields, rule: str | bool) -> bool:
    return rule if isinstance(rule, bool) else fields.boolean(rule, False)


def _hf_windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """The sliding window, and for each layer whether it applies."""
    # 0 stands for none here: an explicit null, or a family or a config without windows.
    window = fields.integer("sliding_window", 0, least=0) if _switch(fields, family.windowed) else 0
    if window == 0:
        return None, ("full_attention",) * layers
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", 0, least=0)
        layer_types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise fields.error("layer_types", f"a list of {layers} names", layer_types)
    if any(kind not in ("full_attention", "sliding_attention") for kind in layer_types):
        raise fields.error("layer_types", "entries full_attention or sliding_attention", layer_types)
    return window, tuple(layer_types)


def _hf_rope(fields: Fields, head_dim: int, max_positions: int) -> tuple[float, int | None, dict[str, Any] | None]:
    """rope_theta, rotary_dim (None: all of the head) and the scaling dict, from either spelling."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    given = {key: value for key, value in fields.mapping(name).items() if value is not None}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise fields.unsupported(name, "a different rope for each layer is not supported")
    # Where the dict has no entry of its own the top level counts, which is where transformers 4 kept theta.
    rope = Fields(given, fields.path, defaults=fields.values)
    theta = rope.number("rope_theta", 10000.0)
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", 1.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise fields.error("partial_rotary_factor", f"an even share of head_dim ({head_dim})", rotary_dim)
    partial = None if rotary_dim == head_dim else rotary_dim
    rope_type = rope.text("rope_type", None) or rope.text("type", "default")
    if rope_type not in _ROPE_TYPES:
        raise fields.unsupported(name, f"rope_type {rope_type!r} is not supported, supported: {', '.join(_ROPE_TYPES)}")
    if rope_type == "default":
        return theta, partial, None

    original = max_positions  # dynamic scaling grows from there, whatever else the dict says
    if rope_type != "dynamic":
        original = rope.integer("original_max_position_embeddings", max_positions)
    scaling = {**given, "rope_type": rope_type, "original_max_position_embeddings": original}
    for key in ("type", "rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    if rope_type in ("yarn", "longrope"):
        scaling.setdefault("factor", max_positions / original)
    return theta, partial, _checked_scaling(fields, name, theta, rotary_dim, scaling)


def _checked_scaling(
    fields: Fields, name: str, theta: float, rotary_dim: int, scaling: dict[str, Any]
) -> dict[str, Any]:
    """The scaling, tried out, so that a bad value is reported with its file."""
    for length in (1, scaling["original_max_position_embeddings"] + 1):
        try:
            tables = rope_tables(theta, rotary_dim, 2, scaling, length)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise FormatError(fields.path, fields.prefix + name, f"expected a usable scaling, {error}") from None
        if not all(bool(table.isfinite().all()) for table in tables):
            raise fields.error(name, "finite rotary frequencies", scaling)
    return scaling


def _gguf_rope_scaling(fields: Fields, theta: float, rotary_dim: int, max_positions: int) -> dict[str, Any] | None:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise fields.unsupported("rope.scaling.type", f"{kind!r} is not supported, supported: none, linear, yarn")
    original = fields.integer("rope.scaling.original_context_length", max_positions)
    factor = fields.number("rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind == "yarn" and fields.get("rope.scaling.attn_factor") is not None:
        # llama.cpp multiplies its factor with the one that transformers infers when none is given.
        inferred = 0.1 * math.log(max(factor, 1.0)) + 1.0
        scaling["attention_factor"] = fields.number("rope.scaling.attn_factor") * inferred
    return _checked_scaling(fields, "rope.scaling", theta, rotary_dim, scaling)


def _gguf_eos(tokens: Fields) -> int | list[int] | None:
    """The end of sequence, and the end of turn and of message where the file names them."""
    found = [tokens.token(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    ids = sorted({token for token in found if token is not None})
    return ids[0] if len(ids) == 1 else ids or None
