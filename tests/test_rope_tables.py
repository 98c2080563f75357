"""rope_tables against transformers' frequencies."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import tilewright

FACTORS = {"short_factor": [1 + i / 16 for i in range(16)], "long_factor": [1.5 + i for i in range(16)]}
MAX = 256
CASES: list[dict[str, object]] = [
    {},
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 1.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2,
     "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False},
    {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 32, "attention_factor": 1.25},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS},
    {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 3.0, **FACTORS},
    {"rope_type": "longrope", "original_max_position_embeddings": 64, "attention_factor": 0.8, **FACTORS},
]  # fmt: skip


@pytest.mark.parametrize("scaling", CASES, ids=lambda s: f"{s.get('rope_type')}-{len(s)}")
@pytest.mark.parametrize("theta", [10000.0, 500000])
@pytest.mark.parametrize("seq_len", [None, 50, 256, 700])
def test_bits_of_transformers(scaling: dict[str, object], theta: float, seq_len: int | None) -> None:
    parameters = {"rope_theta": theta, **scaling}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=MAX, rope_parameters=parameters
    )
    module = LlamaRotaryEmbedding(config)
    positions = torch.arange(MAX)
    if seq_len is not None:  # what one forward of this length leaves the module with
        module(torch.zeros(1), torch.arange(seq_len)[None])
    angles = positions[:, None].float() * module.inv_freq
    cos, sin = tilewright.rope_tables(theta, 32, MAX, scaling, seq_len)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (MAX, 16)
    assert torch.equal(cos, angles.cos() * module.attention_scaling)
    assert torch.equal(sin, angles.sin() * module.attention_scaling)


def test_old_spelling_and_partial_rotation() -> None:
    old = tilewright.rope_tables(10000.0, 32, 8, {"type": "linear", "factor": 2.0})
    new = tilewright.rope_tables(10000.0, 32, 8, {"rope_type": "linear", "factor": 2.0})
    assert torch.equal(old[0], new[0])
    part = tilewright.rope_tables(10000.0, 64, 8, {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5})
    assert torch.equal(part[1], new[1])
    assert tilewright.rope_tables(10000.0, 32, 0)[0].shape == (0, 16)


YARN = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 8, **FACTORS}
LLAMA3 = CASES[8]
REJECTED: list[tuple[str, dict[str, object]]] = [
    ("rope_type must be one of default, linear", {"rope_type": "mrope"}),
    ("needs the field 'factor'", {"rope_type": "linear"}),
    ("needs the field 'factor'", {"rope_type": "dynamic"}),
    ("needs the field 'factor'", {**YARN, "factor": None}),
    ("needs the field 'original_max_position_embeddings'", {"rope_type": "yarn", "factor": 2}),
    ("needs the field 'low_freq_factor'", {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}),
    ("needs the field 'original_max_position_embeddings'", {"rope_type": "longrope", **FACTORS}),
    ("needs the field 'short_factor'", {**LONG, "short_factor": None}),
    ("short_factor must be a list of 16 numbers", {**LONG, "short_factor": [1.0]}),
    ("factor must be a positive number, got '2'", {"rope_type": "linear", "factor": "2"}),
    ("factor must be a positive number, got 0", {"rope_type": "linear", "factor": 0}),
    ("factor must be a positive number, got nan", {"rope_type": "linear", "factor": float("nan")}),
    ("high_freq_factor must exceed low_freq_factor", {**LLAMA3, "high_freq_factor": 1.0}),
    ("rotary dimension must be even", {"partial_rotary_factor": 0.1}),
]


@pytest.mark.parametrize("message,scaling", REJECTED, ids=[m for m, _ in REJECTED])
def test_rejected(message: str, scaling: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        tilewright.rope_tables(10000.0, 32, 16, scaling)
    assert "rope_tables: " in str(error.value) and message in str(error.value)


def test_rejected_arguments() -> None:
    for theta, head_dim, positions in ((0.0, 32, 8), (float("inf"), 32, 8), (1e4, 31, 8), (1e4, 0, 8), (1e4, 32, -1)):
        with pytest.raises(ValueError, match="rope_tables: "):
            tilewright.rope_tables(theta, head_dim, positions)
