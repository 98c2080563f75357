"""`tilewright quantize`: from a checkpoint to a folder in the compressed-tensors format, and how good it is."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tilewright.io.folder import HFFolder
from tilewright.io.tokenizer import AutoTokenizer
from tilewright.models.compressed import quantization_config
from tilewright.models.divergence import Divergence, divergence
from tilewright.models.layer_quantizer import CALIBRATED, LayerQuantizer, Recipe
from tilewright.models.layerwise import LayerReader
from tilewright.models.partial import PartialFolder

# Copied from a folder as they are, where they exist: what belongs to the tokenizer and to generation.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "generation_config.json",
)  # fmt: skip
_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Report:
    """nbytes: of all tensors; group_sizes: how many matrices have which (-1: a row); bits_per_weight: of these
    matrices, scales and zero points included; dense: the names of linear modules that are not quantised; divergence:
    from the checkpoint, if a text was given."""

    nbytes: int
    group_sizes: dict[int, int]
    bits_per_weight: float
    dense: list[str]
    divergence: Divergence | None

    def rows(self) -> dict[str, str]:
        """For people: names and texts."""
        sizes = ", ".join(
            f"{count} with {'one group a row' if size == -1 else f'groups of {size}'}"
            for size, count in sorted(self.group_sizes.items())
        )
        rows = {
            "size": f"{self.nbytes / 1e6:.1f} MB",
            "quantised matrices": f"{sizes or 'none'}; {self.bits_per_weight:.2f} bits a weight",
            "dense matrices": ", ".join(sorted({_LAYER.sub(".*.", name) for name in self.dense})) or "none",
        }
        if (found := self.divergence) is not None:
            rows |= {
                "compared on": f"{found.tokens} tokens",
                "perplexity": f"{found.perplexity_before:.4g} before, {found.perplexity_after:.4g} after",
                "mean KL divergence": f"{found.kl:.4g}",
                "same first choice": f"{100 * found.same_choice:.1f}%",
            }
        return rows


@torch.no_grad()
def quantize_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    calibration: Tensor | None = None,
    evaluation: Tensor | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Report:
    """Quantise the checkpoint `source`, a Hugging Face folder or a .gguf file, into the new folder `target`.

    calibration: int64 (samples, seq), for the methods that need it; evaluation: int64 (samples, seq) on which both
    models are compared. A run that was stopped goes on when it is called again with the same arguments. Progress
    goes to stderr. Raises ValueError (FormatError for a broken checkpoint) or OSError.
    """
    if (calibration is not None) != (recipe.method in CALIBRATED):
        raise ValueError(
            f"quantize: calibration text goes with {', '.join(CALIBRATED)} and only with them, got "
            f"{'none' if calibration is None else 'one'} for {recipe.method}"
        )
    with LayerReader(source) as reader:
        quantizer = LayerQuantizer(reader, recipe)
        with PartialFolder(target, _description(source, recipe, calibration)) as partial:
            _run(reader, quantizer, partial, calibration)
            partial.assemble(max_shard_size, lambda folder: _describe(folder, quantizer))
            compared = None
            if evaluation is not None:
                with _progress("comparing", reader.config.num_hidden_layers) as bar:
                    compared = divergence(source, target, evaluation, bar.update)
            partial.remove()
        return _report(target, quantizer, compared)


def _run(reader: LayerReader, quantizer: LayerQuantizer, partial: PartialFolder, calibration: Tensor | None) -> None:
    """Every layer that is not finished, and what belongs to no layer."""
    layers, done = reader.config.num_hidden_layers, partial.done()
    if done > layers:
        return
    states = None
    if calibration is not None:
        states = partial.states(done) if done else reader.embed(calibration)
    with _progress("quantising", layers, done) as bar:
        for index in range(done, layers):
            partial.commit(index, quantizer.layer(index, states), states)
            bar.update()
    partial.commit(layers, quantizer.outside(states))


def _description(source: Path, recipe: Recipe, calibration: Tensor | None) -> dict[str, object]:
    """What the parts of a run depend on."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    text = None if calibration is None else hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    return {
        **asdict(recipe),
        "checkpoint": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "calibration windows": None if calibration is None else list(calibration.shape),
        "calibration text": text,
    }


def _describe(folder: Path, quantizer: LayerQuantizer) -> None:
    """Everything but the weights: config.json, generation_config.json and the tokenizer."""
    reader, recipe = quantizer.reader, quantizer.recipe
    config = reader.config.to_hf()
    config.pop("torch_dtype", None)
    config |= {
        "dtype": str(reader.dtype).removeprefix("torch."),
        "tie_word_embeddings": reader.config.tie_word_embeddings,
        "quantization_config": quantization_config(
            quantizer.plan, recipe.group_size, act_order=recipe.method == "gptq" and recipe.act_order
        ),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if reader.path.is_dir():
        for name in _FILES:
            if (reader.path / name).is_dir():
                shutil.copytree(reader.path / name, folder / name)
            elif (reader.path / name).is_file():
                shutil.copyfile(reader.path / name, folder / name)
    else:
        AutoTokenizer.from_pretrained(reader.path).save_pretrained(folder)
        reader.source.generation_config.save_pretrained(folder)


def _report(target: Path, quantizer: LayerQuantizer, compared: Divergence | None) -> Report:
    nbytes, bits = sizes(target)
    return Report(
        nbytes=nbytes,
        group_sizes=dict(Counter(settings.group_size for settings in quantizer.plan.values() if settings is not None)),
        bits_per_weight=bits,
        dense=[name for name, settings in quantizer.plan.items() if settings is None],
        divergence=compared,
    )


def sizes(path: Path) -> tuple[int, float]:
    """(bytes of all tensors of a quantised folder, bits a quantised weight takes, scales and zero points included)."""
    with HFFolder(path) as folder:
        nbytes = {name: prod(shape) * dtype.itemsize for name in folder.names() for dtype, shape in [folder.info(name)]}
        shapes = {name: folder.tensor(name).tolist() for name in folder.names() if name.endswith(".weight_shape")}
    stored = sum(
        nbytes.get(name.replace("_shape", part), 0) for name in shapes for part in ("_packed", "_scale", "_zero_point")
    )
    elements = sum(map(prod, shapes.values()))
    return sum(nbytes.values()), 8 * stored / elements if elements else 0.0


@contextmanager
def _progress(what: str, total: int, done: int = 0) -> Iterator[tqdm]:
    with tqdm(total=total, initial=done, desc=what, unit="layer") as bar:
        yield bar
