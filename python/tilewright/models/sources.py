"""The files a model can come from, as the loader sees them: config, tensor names and shapes, matrices.

A source has `path`, `config`, `generation_config`, `names` (what it calls its tensors) and `shapes`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.generation.config import FILE_NAME, GenerationConfig
from tilewright.io.errors import FormatError
from tilewright.io.folder import HFFolder
from tilewright.io.gguf import GGUFFile
from tilewright.models.config import ModelConfig
from tilewright.models.linear import Matrix
from tilewright.models.schemes import scheme_of
from tilewright.quant import QuantizedWeight, from_gguf
from tilewright.quant.gguf import TYPES as _PACKED_GGUF

_DENSE_GGUF = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DENSE = tuple(_DENSE_GGUF.values())


@dataclass(frozen=True)
class Names:
    """What a kind of file calls its tensors; layer names are formatted with the layer's number."""

    embedding: str
    norm: str
    head: str
    attention_norm: str
    q: str
    k: str
    v: str
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str


HF_NAMES = Names(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    attention_norm="model.layers.{}.input_layernorm",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    output="model.layers.{}.self_attn.o_proj",
    mlp_norm="model.layers.{}.post_attention_layernorm",
    gate="model.layers.{}.mlp.gate_proj",
    up="model.layers.{}.mlp.up_proj",
    down="model.layers.{}.mlp.down_proj",
)
_GGUF = Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    attention_norm="blk.{}.attn_norm",
    q="blk.{}.attn_q",
    k="blk.{}.attn_k",
    v="blk.{}.attn_v",
    output="blk.{}.attn_output",
    mlp_norm="blk.{}.ffn_norm",
    gate="blk.{}.ffn_gate",
    up="blk.{}.ffn_up",
    down="blk.{}.ffn_down",
)
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource:
    """A GGUF file as the loader sees it."""

    names = _GGUF

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, GGUFFile(path)
        self.config = ModelConfig.from_gguf(self.file.metadata, path)
        self.file.metadata.clear()  # the vocabulary in it is a tenth of a small model's size
        self.shapes = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        self.config.tie_word_embeddings = f"{_GGUF.head}.weight" not in self.shapes
        self.generation_config = _token_ids(self.config)
        if _ROPE_FACTORS in self.shapes:
            self._take_rope_factors()

    def load(self, name: str) -> Matrix:
        """The tensor: packed as it is, or dense (a view of the file)."""
        kind, raw = self.file.tensors[name].type_name, self.file.raw(name)
        if kind in _DENSE_GGUF:
            return raw.view(-1).view(_DENSE_GGUF[kind]).view(self.shapes[name])
        if kind not in _PACKED_GGUF:
            supported = ", ".join((*_DENSE_GGUF, *_PACKED_GGUF))
            raise NotImplementedError(f"{self.path}: {name}: type {kind} is not supported, supported: {supported}")
        if len(self.shapes[name]) != 2:
            raise FormatError(
                self.path, name, f"expected F32, F16 or BF16 for a tensor of shape {self.shapes[name]}, got {kind}"
            )
        return from_gguf(raw, kind, self.shapes[name])

    def release(self) -> None:
        self.file.release_all()

    def close(self) -> None:
        self.file.close()

    def ignorable(self, name: str) -> bool:
        return name == _ROPE_FACTORS

    def _take_rope_factors(self) -> None:
        """Frequencies divided one by one, as llama 3.1 files have them: longrope with both lists the same."""
        half = (self.config.rotary_dim or self.config.head_dim) // 2
        if self.shapes[_ROPE_FACTORS] != (half,) or self.file.tensors[_ROPE_FACTORS].type_name != "F32":
            raise FormatError(
                self.path, _ROPE_FACTORS, f"expected F32 ({half},), got {self.file.tensors[_ROPE_FACTORS]}"
            )
        factors = self.load(_ROPE_FACTORS).tolist()
        self.config.rope_scaling = {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.config.max_position_embeddings,
        }


class FolderSource:
    """A Hugging Face folder as the loader sees it."""

    names = HF_NAMES

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, HFFolder(path)
        self.config = ModelConfig.from_hf(self.folder.config, path / "config.json")
        self.shapes = {name: self.folder.info(name)[1] for name in self.folder.names()}
        self.scheme = scheme_of(self.folder.config, self.folder)
        self.quantised = {} if self.scheme is None else self.scheme.matrices
        for name, matrix in self.quantised.items():
            for part in matrix.tensors.values():
                self.shapes.pop(part, None)
            self.shapes[name] = matrix.shape
        given = GenerationConfig.from_dict(self.folder.generation_config, path / FILE_NAME)
        self.generation_config = given.over(_token_ids(self.config))
        self.generation_config.extra = given.extra
        self._check_tie()

    def load(self, name: str) -> Matrix:
        """The tensor: packed where the file has it quantised, else a view of the file."""
        if name in self.quantised:
            return self._packed(name)
        dtype, _ = self.folder.info(name)
        if dtype not in _DENSE:
            raise FormatError(self.path, name, f"expected float32, float16 or bfloat16, got {dtype}")
        return self.folder.tensor(name)

    def release(self) -> None:
        self.folder.release_all()

    def close(self) -> None:
        self.folder.close()

    def ignorable(self, name: str) -> bool:
        # Old checkpoints store the rotary frequencies, which follow from the config.
        tied_head = self.config.tie_word_embeddings and name == f"{HF_NAMES.head}.weight"
        others = self.scheme is not None and self.scheme.ignorable(name)
        return tied_head or name.endswith(".rotary_emb.inv_freq") or others

    def _packed(self, name: str) -> QuantizedWeight:
        matrix = self.quantised[name]
        try:
            return matrix.convert({part: self.folder.tensor(file) for part, file in matrix.tensors.items()})
        except NotImplementedError as error:
            raise NotImplementedError(f"{self.path}: {name}: {error}") from None
        except (TypeError, ValueError) as error:
            raise FormatError(self.path, name, str(error)) from None

    def _check_tie(self) -> None:
        """A folder that says "tied" and holds two different matrices means two, as in transformers."""
        head, embedding = f"{HF_NAMES.head}.weight", f"{HF_NAMES.embedding}.weight"
        if not self.config.tie_word_embeddings or not {head, embedding} <= self.shapes.keys():
            return
        quantised = {head, embedding} & self.quantised.keys()
        if quantised or not torch.equal(self.load(head), self.load(embedding)):
            warnings.warn(
                f"{self.path}: config.json says tie_word_embeddings, but {head} and {embedding} differ; using both",
                stacklevel=2,
            )
            self.config.tie_word_embeddings = False
            self.config.raw["tie_word_embeddings"] = False
        self.release()


def open_source(path: Path) -> GGUFSource | FolderSource:
    """The model at `path`, a .gguf file or a Hugging Face folder."""
    return FolderSource(path) if path.is_dir() else GGUFSource(path)


def _token_ids(config: ModelConfig) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
