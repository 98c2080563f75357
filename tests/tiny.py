"""Small random models of each family, written by transformers: the parity tests' second opinion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import this: models this small only lose to torch's threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHAPE = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def build(family: str, **overrides: Any) -> Any:
    """A transformers model, fp32 and in eval mode, with weights large enough that its choices differ clearly."""
    import transformers

    config_class = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }[family]
    torch.manual_seed(len(family))
    settings = {"initializer_range": 0.15, **SHAPE, **overrides}
    if family == "qwen2":
        settings.pop("head_dim")
    config = config_class(**settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a forgotten one.
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save(folder: Path, family: str, **overrides: Any) -> Any:
    """`build`, saved into `folder` as safetensors; returns the transformers model."""
    model = build(family, **overrides)
    model.save_pretrained(folder)
    return model


def prompts(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids, int64 (batch, length), without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=generator)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        config.pop(name, None)
        if value is not ...:
            config[name] = value
    (path / "config.json").write_text(json.dumps(config))
