"""A model back into a Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilewright.models.linear import Parallel, dense_dtype, dense_rows

if TYPE_CHECKING:
    from tilewright.models.decoder import CausalLM

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_pretrained(model: CausalLM, directory: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    """Write config.json, generation_config.json and safetensors shards (with an index if there are several).

    max_shard_size: bytes, or a string such as "5GB"; a larger tensor gets a shard of its own. Files appear
    under their names only when complete, config.json last; shards of an earlier save that are not part of
    this one are removed. Raises NotImplementedError for a model with quantised matrices.
    """
    limit = parse_size(max_shard_size)
    tensors = list(stored_tensors(model))
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_pretrained: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)

    shards: list[list[Stored]] = [[]]
    sizes = [0]
    for stored in tensors:
        if shards[-1] and sizes[-1] + stored.nbytes > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(stored)
        sizes[-1] += stored.nbytes

    count = len(shards)
    files = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    texts = {"config.json": _config(model)}
    if count > 1:
        weight_map = {stored.name: file for file, shard in zip(files, shards, strict=True) for stored in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        texts = {"model.safetensors.index.json": index, **texts}
    _write(folder, files, shards, texts)
    model.generation_config.save_pretrained(folder)


@dataclass(frozen=True)
class Stored:
    """A tensor of the file, made when its shard is written: packed bf16 matrices are not unpacked all at once."""

    name: str
    nbytes: int
    tensor: Callable[[], Tensor]


def stored_tensors(model: CausalLM) -> Iterator[Stored]:
    """Every tensor under transformers' name, stacked matrices taken apart."""
    config = model.config
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    yield from _parts(model.embedding.matrix, {"model.embed_tokens": config.vocab_size})
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        yield _whole(f"{prefix}.input_layernorm.weight", layer.attention_norm)
        attention = f"{prefix}.self_attn"
        rows = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        for stored in _parts(layer.qkv, rows):
            rotary = config.rope_interleaved and not stored.name.startswith(f"{attention}.v_proj")
            yield Stored(stored.name, stored.nbytes, _halved(stored, config.head_dim)) if rotary else stored
        yield from _parts(layer.output, {f"{attention}.o_proj": config.hidden_size})
        yield _whole(f"{prefix}.post_attention_layernorm.weight", layer.mlp_norm)
        yield from _parts(layer.gate_up, {f"{prefix}.mlp.gate_proj": inner, f"{prefix}.mlp.up_proj": inner})
        yield from _parts(layer.down, {f"{prefix}.mlp.down_proj": config.hidden_size})
    yield _whole("model.norm.weight", model.norm)
    if not config.tie_word_embeddings:
        yield from _parts(model.head, {"lm_head": config.vocab_size})


def parse_size(size: int | str) -> int:
    """Bytes from an integer or from a string such as "5GB" or "200MiB"."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", size.strip().upper()) if isinstance(size, str) else None
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"save_pretrained: max_shard_size must be like '5GB' or a number of bytes, got {size!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _parts(module: nn.Module, rows: dict[str, int]) -> Iterator[Stored]:
    """The matrices and biases that a module holds, under the names in `rows` with their row counts."""
    if isinstance(module, Parallel):
        for part, (name, count) in zip(module.parts, rows.items(), strict=True):
            yield from _parts(part, {name: count})
        return
    dtype = dense_dtype(module)
    if dtype is None:
        raise NotImplementedError(
            f"save_pretrained: {next(iter(rows))} is quantised; supported are models whose matrices are all dense"
        )
    first, columns = 0, module.weight.shape[1]
    for name, count in rows.items():
        yield Stored(
            f"{name}.weight", count * columns * dtype.itemsize, partial(dense_rows, module, first, first + count)
        )
        if module.bias is not None:
            yield _whole(f"{name}.bias", module.bias[first : first + count])
        first += count


def _whole(name: str, tensor: Tensor) -> Stored:
    return Stored(name, tensor.nbytes, lambda: tensor)


def _halved(stored: Stored, head_dim: int) -> Callable[[], Tensor]:
    return lambda: halves(stored.tensor(), head_dim)


def halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from interleaved rotary pairs, as GGUF stores them, to the halves of transformers."""
    pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _config(model: CausalLM) -> dict:
    config = model.config.to_hf()
    name = str(dense_dtype(model.head) or torch.float32).removeprefix("torch.")
    config.pop("torch_dtype", None)
    return {**config, "dtype": name, "tie_word_embeddings": model.config.tie_word_embeddings}


def _write(folder: Path, files: list[str], shards: list[list[Stored]], texts: dict[str, dict]) -> None:
    """Write everything beside its place, then rename; a failure leaves the folder as it was."""
    from safetensors.torch import save_file

    def temporary(name: str) -> Path:
        return folder / f".{name}.{os.getpid()}"

    names = [*files, *texts]
    try:
        for name, shard in zip(files, shards, strict=True):
            tensors = {stored.name: stored.tensor().detach().contiguous() for stored in shard}
            save_file(tensors, temporary(name), metadata={"format": "pt"})
        for name, values in texts.items():
            temporary(name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in names:
            temporary(name).replace(folder / name)
    finally:
        for name in names:
            temporary(name).unlink(missing_ok=True)
    for old in folder.iterdir():
        if _SHARD.fullmatch(old.name) and old.name not in names:
            old.unlink()
