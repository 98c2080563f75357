"""Which configs are taken, and which are refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import edit_config, one_thread  # noqa: F401  (a fixture)

from tilewright import AutoModelForCausalLM
from tilewright.io.errors import FormatError
from tilewright.models.config import ModelConfig

BAD_CONFIGS = [
    ({"hidden_size": ...}, FormatError, "config.json: hidden_size: expected an integer .*missing"),
    ({"hidden_size": "96"}, FormatError, "hidden_size: expected an integer .*got '96'"),
    ({"hidden_size": 96.0}, FormatError, "hidden_size: expected an integer"),
    ({"hidden_size": True}, FormatError, "hidden_size: expected an integer"),
    ({"hidden_size": 0}, FormatError, "hidden_size: expected an integer from 1"),
    ({"hidden_size": -96}, FormatError, "hidden_size: expected an integer from 1"),
    ({"hidden_size": 2**40}, FormatError, "hidden_size: expected an integer from 1"),
    ({"hidden_size": 97, "head_dim": ...}, FormatError, "hidden_size: expected a multiple of num_attention_heads"),
    ({"num_hidden_layers": 10**6}, FormatError, "num_hidden_layers: expected an integer from 1 to 65536"),
    ({"num_hidden_layers": 60000}, FormatError, r"layers\.3\..*: expected a tensor of shape"),
    ({"num_hidden_layers": 2}, FormatError, r"layers\.2\..*: expected no such tensor"),
    ({"num_key_value_heads": 4}, FormatError, "num_key_value_heads: expected a divisor"),
    ({"num_key_value_heads": 3}, FormatError, r"k_proj\.weight: expected shape \(48, 96\) .*, got \(32, 96\)"),
    ({"head_dim": 24}, FormatError, "expected shape"),
    ({"head_dim": 15}, FormatError, "partial_rotary_factor: expected an even share"),
    ({"vocab_size": 212}, FormatError, r"embed_tokens\.weight: expected shape \(212, 96\)"),
    ({"vocab_size": None}, FormatError, "vocab_size: expected an integer"),
    ({"rms_norm_eps": "small"}, FormatError, "rms_norm_eps: expected a positive finite number"),
    ({"rms_norm_eps": 0}, FormatError, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, FormatError, "tie_word_embeddings: expected true or false"),
    ({"attention_bias": True}, FormatError, r"q_proj\.bias: expected a tensor of shape \(96,\)"),
    ({"eos_token_id": "</s>"}, FormatError, "eos_token_id"),
    ({"eos_token_id": []}, FormatError, "eos_token_id"),
    ({"model_type": ...}, FormatError, "model_type: expected a string, the field is missing"),
    ({"model_type": "mamba"}, NotImplementedError, "'mamba' is not supported, supported: llama"),
    ({"architectures": ["LlamaForQuestionAnswering"]}, NotImplementedError, "LlamaForQuestionAnswering"),
    ({"architectures": "LlamaForCausalLM"}, FormatError, "architectures: expected a list"),
    ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act: 'gelu' is not supported"),
    ({"quantization_config": {"quant_method": "aqlm"}}, NotImplementedError, "quant_method: 'aqlm' is not supported"),
    ({"rope_parameters": []}, FormatError, "rope_parameters: expected an object"),
    ({"rope_parameters": {"rope_type": "spiral"}}, NotImplementedError, "'spiral' is not supported, supported: "),
    ({"rope_parameters": {"rope_type": ["linear"]}}, FormatError, "rope_type: expected a string"),
    ({"rope_parameters": {"rope_type": "linear"}}, FormatError, "rope_parameters: .*factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, FormatError, "rope_parameters: .*factor"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, FormatError, "short_factor"),
    ({"rope_parameters": {"rope_theta": -1.0}}, FormatError, "rope_theta: expected a positive finite number"),
    ({"rope_parameters": {"partial_rotary_factor": 1.5}}, FormatError, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, NotImplementedError, "rope for each layer"),
    ({"max_position_embeddings": 0}, FormatError, "max_position_embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CONFIGS, ids=lambda value: str(value)[:60])
def test_bad_configs(broken: Path, changes: dict, error: type, message: str) -> None:
    edit_config(broken, **changes)
    with pytest.raises(error, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(broken)
    assert str(broken) in str(caught.value), "the message names the file"
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_config_value_crashes(data: Any) -> None:
    """Any JSON value in any field: a config, FormatError or NotImplementedError, nothing else."""
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", **tiny.SHAPE,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1, "layer_types": None, "torch_dtype": "float32", "rope_theta": 1e4,
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "quantization_config": None,
    }  # fmt: skip
    target = data.draw(st.sampled_from([config, config["rope_parameters"]]))
    target[data.draw(st.sampled_from(sorted({*target, "short_factor", "beta_fast"})))] = data.draw(VALUES)
    try:
        ModelConfig.from_hf(config, "config.json")
    except (FormatError, NotImplementedError) as error:
        assert "config.json" in str(error)


def test_configs_of_transformers_defaults() -> None:
    """Absent keys mean what they mean to transformers."""
    import transformers

    for family, theirs in (
        ("llama", transformers.LlamaConfig()),
        ("mistral", transformers.MistralConfig()),
        ("qwen2", transformers.Qwen2Config()),
    ):
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = {"model_type": family, **{name: getattr(theirs, name) for name in required}}
        ours = ModelConfig.from_hf(config, "config.json")
        for name in (
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
            "sliding_window",
        ):
            assert getattr(ours, name) == getattr(theirs, name, None), (family, name)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert list(ours.layer_types) == getattr(
            theirs,
            "layer_types",
            [("sliding" if ours.sliding_window else "full") + "_attention"] * len(ours.layer_types),
        )
