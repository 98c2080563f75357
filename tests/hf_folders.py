"""Tiny llama folders in every quantised Hugging Face format, and how to change them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hf_packers as packers
import numpy as np
import tiny
from hf_packers import Stored
from safetensors.torch import load_file, save_file
from tiny import edit_config
from torch import nn

Maker = Callable[..., Stored]
DOWN = "model.layers.1.mlp.down_proj"


def quantise(
    path: Path,
    maker: Maker | Mapping[str, Maker],
    *,
    dense: tuple[str, ...] = ("lm_head",),
    also: tuple[str, ...] = (),
    **overrides: Any,
) -> nn.Module:
    """A tiny llama in ``path`` whose linears are random matrices of a format; returns transformers' model with what
    they mean. maker: one for all, or by ends of names, the first that fits. dense: ends of the names of modules that
    stay as they are; also: of those to quantise that are no linears."""
    reference = tiny.save(path, "llama", **overrides)
    tensors = load_file(path / "model.safetensors")
    rng = np.random.default_rng(5)
    config: dict[str, Any] = {}
    for name, module in reference.named_modules():
        if not (isinstance(module, nn.Linear) and not name.endswith(dense)) and name not in also:
            continue
        make = maker if callable(maker) else next(made for end, made in maker.items() if name.endswith(end))
        stored = make(rng, *module.weight.shape)
        tensors.pop(f"{name}.weight", None)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.tensors.items()}
        config = stored.config
        module.weight = nn.Parameter(stored.w.float(), requires_grad=False)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, quantization_config=config)
    return reference


def edit(path: Path, tensors: Mapping[str, Any] | None = None, **changes: Any) -> None:
    """Replace tensors and entries of quantization_config; ... removes one, a function is applied to a tensor."""
    stored = load_file(path / "model.safetensors")
    for name, value in (tensors or {}).items():
        old = stored.pop(name, None)
        if value is not ...:
            stored[name] = (value(old) if callable(value) else value).contiguous()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    edit_config(path, quantization_config=config)


WIDE = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 192}  # EETQ's tiles are 64 wide
gptq, ct = packers.gptq, packers.compressed_tensors
FOLDERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "gptq-4": (gptq, {}),
    "gptq-3-act-order": (partial(gptq, bits=3, act_order=7), {}),
    "gptq-2-v2": (partial(gptq, bits=2, version=2), {}),
    "gptq-8-symmetric": (partial(gptq, bits=8, symmetric=True, group=-1), {}),
    "awq": (packers.awq, {}),
    "llm-int8": (packers.llm_int8, {}),
    "nf4": (partial(packers.four_bit, nested=256), {}),
    "fp4": (partial(packers.four_bit, kind="fp4"), {}),
    "hqq-4": (packers.hqq, {}),
    "hqq-3": (partial(packers.hqq, bits=3), {}),
    "eetq": (packers.eetq, WIDE),
    "ct-int4": (ct, {}),
    "ct-int4-zeros": (partial(ct, symmetric=False), {}),
    "ct-int8-packed": (partial(ct, bits=8, strategy="channel"), {}),
    "ct-int8": (partial(ct, form="int-quantized", bits=8, strategy="channel"), {}),
    "ct-fp8": (partial(ct, form="float-quantized", bits=8, strategy="channel", floating=True), {}),
    "fp8": (packers.fp8, {}),
    "fp8-tensor": (partial(packers.fp8, block=None), {}),
}
