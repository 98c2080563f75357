"""Folders with a quantization_config: they load with no option given, compute what their matrices mean, and complain
by name about what is missing, wrong or not supported."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hf_packers as packers
import numpy as np
import pytest
import tiny
import torch
from hf_packers import Stored
from safetensors.torch import load_file, save_file
from tiny import edit_config, one_thread  # noqa: F401  (a fixture)
from torch import nn

from tilewright import AutoModelForCausalLM
from tilewright.models.linear import DenseLinear

Maker = Callable[..., Stored]
LAYER = "model.layers.1."
DOWN = f"{LAYER}mlp.down_proj"


def quantise(path: Path, maker: Maker, *, dense: tuple[str, ...] = ("lm_head",), **overrides: Any) -> nn.Module:
    """A tiny llama in ``path`` whose linears are random matrices of a format; returns transformers' model with what
    they mean. maker: may take the module's name. dense: ends of names of the modules that stay as they are."""
    reference = tiny.save(path, "llama", **overrides)
    tensors = load_file(path / "model.safetensors")
    rng = np.random.default_rng(5)
    config = {}
    for name, module in reference.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith(dense):
            continue
        stored = maker(rng, *module.weight.shape)
        tensors.pop(f"{name}.weight", None)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.tensors.items()}
        config = stored.config
        with torch.no_grad():
            module.weight = nn.Parameter(stored.w.float())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, quantization_config=config)
    return reference


def edit(path: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> None:
    """Replace tensors and entries of quantization_config; ... removes one."""
    stored = load_file(path / "model.safetensors")
    for name, value in (tensors or {}).items():
        stored.pop(name, None)
        if value is not ...:
            stored[name] = value
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    edit_config(path, quantization_config=config)


def assert_same_logits(path: Path, reference: nn.Module) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, activation="fp32")
    ids = tiny.prompts(2, 14)
    with torch.no_grad():
        expected = reference(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    return model


WIDE = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 192}  # EETQ's tiles are 64 wide
ct = packers.compressed_tensors
FOLDERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "gptq-4": (packers.gptq, {}),
    "gptq-3-act-order": (partial(packers.gptq, bits=3, act_order=True), {}),
    "gptq-2-v2": (partial(packers.gptq, bits=2, version=2), {}),
    "gptq-8-symmetric": (partial(packers.gptq, bits=8, symmetric=True, group=-1), {}),
    "awq": (packers.awq, {}),
    "llm-int8": (packers.llm_int8, {}),
    "nf4": (partial(packers.four_bit, nested=256), {}),
    "fp4": (partial(packers.four_bit, kind="fp4"), {}),
    "hqq-4": (packers.hqq, {}),
    "hqq-3": (partial(packers.hqq, bits=3), {}),
    "eetq": (packers.eetq, WIDE),
    "ct-int4": (ct, {}),
    "ct-int4-zeros": (partial(ct, symmetric=False, act_order=True), {}),
    "ct-int8-packed": (partial(ct, bits=8, strategy="channel"), {}),
    "ct-int8": (partial(ct, form="int-quantized", bits=8, strategy="channel"), {}),
    "ct-fp8": (partial(ct, form="float-quantized", bits=8, strategy="channel", floating=True), {}),
    "fp8": (packers.fp8, {}),
    "fp8-tensor": (partial(packers.fp8, block=None), {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_loads_and_computes(name: str, tmp_path: Path) -> None:
    maker, overrides = FOLDERS[name]
    model = assert_same_logits(tmp_path, quantise(tmp_path, maker, **overrides))
    assert isinstance(model.head, DenseLinear)
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path)(tiny.prompts(1, 5)).logits).all()
    with pytest.raises(ValueError, match="already quantised"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization="int4")
