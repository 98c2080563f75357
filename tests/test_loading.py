"""Loading: which configs and files are taken, which are refused and how, quantising, saving, memory, time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright import AutoModelForCausalLM
from tilewright.io.errors import FormatError
from tilewright.io.pull import pull
from tilewright.models.config import ModelConfig
from tilewright.models.saver import parse_size
from tilewright.quant import quantize_weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny.save(path, "llama")
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder for a test to break."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        config.pop(name, None)
        if value is not ...:
            config[name] = value
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, **changes: Any) -> None:
    """Replace tensors; ... removes one. Dots in names are written as double underscores."""
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not ...:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# --- configs ---

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
    ({"quantization_config": {"quant_method": "gptq"}}, NotImplementedError, "quantised with 'gptq'"),
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


# --- folders ---


def test_tensor_problems(folder: Path, broken: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        edit_tensors(broken, **changes)
        with pytest.raises(FormatError, match=message) as caught:
            AutoModelForCausalLM.from_pretrained(broken)
        assert str(broken) in str(caught.value)

    name = "model__layers__1__mlp__down_proj__weight"
    refused(
        r"layers\.1\.mlp\.down_proj\.weight: expected a tensor of shape \(96, 160\), the file has none", **{name: ...}
    )
    refused(r"expected shape \(96, 160\) by the config, got \(160, 96\)", **{name: torch.zeros(160, 96)})
    refused(r"got \(15360,\)", **{name: torch.zeros(15360)})
    refused("expected float32, float16 or bfloat16, got torch.int64", **{name: torch.zeros(96, 160, dtype=torch.int64)})
    refused("expected no such tensor in a llama model", extra=torch.zeros(1))
    refused(r"lm_head\.weight: expected a tensor", lm_head__weight=...)
    edit_tensors(
        broken,
        extra=...,
        lm_head__weight=torch.zeros(211, 96),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8),
    )
    AutoModelForCausalLM.from_pretrained(broken)


def test_tied_heads(broken: Path) -> None:
    embedding = load_file(broken / "model.safetensors")["model.embed_tokens.weight"]
    edit_config(broken, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="differ; using both"):
        model = AutoModelForCausalLM.from_pretrained(broken)
    assert not model.config.tie_word_embeddings
    edit_tensors(broken, lm_head__weight=embedding)
    model = AutoModelForCausalLM.from_pretrained(broken)
    assert model.head is model.embedding.matrix
    edit_tensors(broken, lm_head__weight=...)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(broken).head.weight, embedding)


def test_arguments(folder: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    for kwargs, error, message in [
        ({"attn_implementation": "eager"}, TypeError, "attn_implementation"),
        ({"dtype": "int4"}, ValueError, "dtype must be"),
        ({"dtype": torch.float16}, NotImplementedError, "float16"),
        ({"device": "cuda"}, NotImplementedError, "device='cuda'"),
        ({"activation": "int4"}, ValueError, "activation must be one of"),
        ({"cache_implementation": "static"}, NotImplementedError, "cache_implementation='static'"),
        ({"quantization": "int3"}, ValueError, "quantization: expected 'int8', 'int4'"),
        ({"quantization": 4}, TypeError, "quantization"),
        ({"quantization": {"bits": 5}}, ValueError, "bits"),
        ({"quantization": {"bits": 4, "group_size": 7}}, ValueError, "group_size"),
        ({"quantization": {"group_size": 32}}, ValueError, "expected bits"),
        ({"quantization": {"bits": 4, "zero": 1}}, ValueError, "expected bits and maybe"),
    ]:
        with pytest.raises(error, match=message):
            load(folder, **kwargs)
    with pytest.raises(ValueError, match="known name"):
        load("no-such-model")
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoModelForCausalLM()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", torch.bfloat16])
def test_dtypes(stored: torch.dtype, dtype: Any, tmp_path: Path) -> None:
    import transformers

    tiny.build("llama").to(stored).save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = {"auto": torch.bfloat16 if stored == torch.bfloat16 else torch.float32}.get(dtype, dtype)
    assert model.head.weight.dtype == (torch.float32 if expected == "float32" else expected)
    ids = tiny.prompts(1, 12)
    logits = model(ids).logits
    assert logits.dtype == torch.float32
    with torch.no_grad():
        exact = reference.double()(ids).logits
    error = (logits - exact).abs().max() / exact.abs().max()
    assert error < (1e-5 if model.head.weight.dtype == torch.float32 else 0.03)
    assert model.cache_dtype == model.head.weight.dtype


# --- quantising ---


@pytest.mark.parametrize(
    "quantization", ["int8", "int4", {"bits": 4, "group_size": 64, "symmetric": False}, {"bits": 8, "skip": ()}]
)
def test_quantise_on_load(folder: Path, quantization: Any) -> None:
    """The packed model gives what the dense model gives with the same dequantised weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization=quantization, activation="fp32")
    arguments = {"int8": (8,), "int4": (4,)}.get(str(quantization))
    if arguments is None:
        arguments = (quantization["bits"], quantization.get("group_size", 32), quantization.get("symmetric", True))
    reference = tiny.build("llama")
    skip_head = not isinstance(quantization, dict) or "skip" not in quantization
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and not (skip_head and name == "lm_head"):
                module.weight.copy_(quantize_weight(module.weight, *arguments).dequantize())
        ids = tiny.prompts(2, 14)
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.cache_dtype == torch.float32
    with pytest.raises(NotImplementedError, match="quantised"):
        model.save_pretrained(folder / "never")


def test_quantise_some(folder: Path) -> None:
    from tilewright.models.linear import Parallel
    from tilewright.quant import QuantizedLinear

    skip = ("k_proj", "model.layers.1.mlp.down_proj")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization={"bits": 8, "skip": skip})
    assert isinstance(model.layers[0].qkv, Parallel)
    assert isinstance(model.layers[0].down, QuantizedLinear)
    assert not isinstance(model.layers[1].down, QuantizedLinear)
    assert isinstance(model.head, QuantizedLinear)
    assert torch.isfinite(model(tiny.prompts(1, 5)).logits).all()
    assert model.cache_dtype == torch.bfloat16


def test_quantised_files_are_not_quantised_again() -> None:
    with pytest.raises(ValueError, match="already quantised"):
        AutoModelForCausalLM.from_pretrained(pull("smollm2"), quantization="int4")


# --- saving ---


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("shard", ["5GB", "100KB", 60000])
def test_saved_folders_load_everywhere(family: str, shard: Any, tmp_path: Path) -> None:
    import transformers

    tiny.save(tmp_path / "a", family, tie_word_embeddings=family == "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size=shard)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(shards) == 1) == (shard == "5GB")
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.startswith(".")]
    ids = tiny.prompts(1, 8)
    expected = model(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "b").forward(ids).logits, expected)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
    # Over an earlier save: nothing of it stays behind.
    model.save_pretrained(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "b")(ids).logits, expected)


def test_failed_save_leaves_the_old_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path, max_shard_size=60000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        model.save_pretrained(tmp_path / "file")


def test_sizes() -> None:
    assert [parse_size(size) for size in (7, "7GB", "1.5 MB", "2KiB")] == [7, 7 * 10**9, 1_500_000, 2048]
    for size in (0, -1, True, "5", "GB", "0GB", None, "5 apples"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(size)


# --- GGUF files, written by the gguf package ---

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path: Path, model: Any, kind: str, metadata: dict[str, Any] | None = None, **tensors: Any) -> None:
    """A transformers llama as GGUF, as convert_hf_to_gguf.py writes it; matrices of the type `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
        **(metadata or {}),
    }
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    written = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        written[name] = tensor.numpy()
    written.update(tensors)
    for name, array in written.items():
        if array is None:
            continue
        type_ = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_types(kind: str, tied: bool, tmp_path: Path) -> None:
    reference = tiny.build("llama", tie_word_embeddings=tied)
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, kind, **({"output.weight": None} if tied else {}))
    model = AutoModelForCausalLM.from_pretrained(path, activation="fp32", dtype="float32")
    assert model.config.tie_word_embeddings == tied
    assert model.generation_config.eos_token_id == [2, 5]
    type_ = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 2:
                packed = gguf.quants.quantize(parameter.numpy(), type_)
                values = gguf.quants.dequantize(packed, type_).reshape(parameter.shape)
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))
        ids = tiny.prompts(2, 13)
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    if kind == "F32":
        model.save_pretrained(tmp_path / "hf")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_gguf_rope_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    }  # fmt: skip
    reference = tiny.build("llama", rope_parameters=rope)
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / reference.model.rotary_emb.inv_freq
    write_gguf(tmp_path / "a.gguf", reference, "F32", **{"rope_freqs.weight": factors.numpy()})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a.gguf")
    ids = tiny.prompts(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    write_gguf(tmp_path / "b.gguf", reference, "F32", **{"rope_freqs.weight": factors[:3].numpy()})
    with pytest.raises(FormatError, match=r"rope_freqs\.weight: expected F32 \(8,\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b.gguf")


BAD_GGUF = [
    ({"llama.block_count": None}, {}, FormatError, "llama.block_count: expected an integer .*missing"),
    ({"llama.block_count": 4}, {}, FormatError, r"blk\.3\..*: expected a tensor of shape"),
    ({"llama.embedding_length": "96"}, {}, FormatError, "llama.embedding_length: expected an integer"),
    ({"llama.embedding_length": 97}, {}, FormatError, "llama.embedding_length: expected a multiple"),
    ({"llama.attention.head_count_kv": 5}, {}, FormatError, "head_count_kv: expected a divisor"),
    ({"llama.attention.head_count_kv": [2, 2, 3]}, {}, NotImplementedError, "a different value for each layer"),
    ({"llama.attention.value_length": 8}, {}, FormatError, "value_length: expected attention.key_length"),
    ({"llama.rope.dimension_count": 17}, {}, FormatError, "rope.dimension_count: expected an even number up to 16"),
    ({"llama.rope.scaling.type": "spiral"}, {}, NotImplementedError, "'spiral' is not supported"),
    ({"llama.rope.scaling.type": "linear"}, {}, FormatError, "rope.scaling.factor: expected a positive"),
    ({"llama.expert_count": 8}, {}, NotImplementedError, "expert_count: mixtures of experts"),
    ({"llama.vocab_size": 200}, {}, FormatError, r"token_embd\.weight: expected shape \(200, 96\)"),
    ({"general.architecture": "mamba"}, {}, NotImplementedError, "'mamba' is not supported, supported: llama"),
    ({}, {"blk.1.attn_v.weight": None}, FormatError, r"blk\.1\.attn_v\.weight: expected a tensor"),
    ({}, {"blk.1.attn_v.weight": np.zeros((96, 32), np.float32)}, FormatError, r"expected shape \(32, 96\)"),
    ({}, {"blk.1.attn_q.bias": np.zeros(96, np.float32)}, FormatError, "expected no such tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("metadata", "tensors", "error", "message"), BAD_GGUF, ids=lambda value: str(value)[:50])
def test_bad_gguf(tmp_path: Path, metadata: dict, tensors: dict, error: type, message: str) -> None:
    path = tmp_path / "model.gguf"
    metadata = dict(metadata)
    architecture = metadata.pop("general.architecture", None)
    write_gguf(path, tiny.build("llama"), "F32", metadata, **tensors)
    if architecture:
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(error, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(path)
    assert str(path) in str(caught.value)


def test_unsupported_gguf_type(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny.build("llama"), "Q5_0")
    with pytest.raises(NotImplementedError, match=r"model\.gguf: .*type Q5_0 is not supported, supported: F32, F16"):
        AutoModelForCausalLM.from_pretrained(path)


# --- memory and time, each in a process of its own ---

MEASURE = """
import re, sys, time
import tilewright
from tilewright import AutoModelForCausalLM
import tilewright.models.auto

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def current():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

quantization = eval(sys.argv[2])
if len(sys.argv) > 3:  # a small model first, so that the libraries' own pages are there
    AutoModelForCausalLM.from_pretrained(sys.argv[3], quantization=quantization)
before = current()
open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization=quantization)
seconds = time.perf_counter() - start
packed = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
print(peak() - before, packed, seconds)
"""


def measure(path: Path, quantization: str = "None", *first: str) -> tuple[int, int, float]:
    """(peak growth in bytes, packed bytes, seconds) of loading in a new process."""
    command = [sys.executable, "-c", MEASURE, str(path), quantization, *first]
    # One thread: with more, and other work on the machine, torch's own small operations wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    growth, packed, seconds = output.split()
    return int(growth), int(packed), float(seconds)


@pytest.mark.measures
def test_default_model_loads_fast_and_small(folder: Path) -> None:
    path = pull("smollm2")
    growth, packed, seconds = measure(path, "None", str(folder))
    assert 0.95 * path.stat().st_size < packed < 1.05 * path.stat().st_size
    assert growth <= 1.15 * packed, f"{growth / 1e6:.0f} MB for {packed / 1e6:.0f} MB"
    for _ in range(4):  # again if something else had the machine
        if seconds >= 0.5:
            seconds = measure(path, "None", str(folder))[2]
    assert seconds < 0.5


@pytest.mark.parametrize("quantization", ["None", "'int8'", "'int4'"])
def test_folder_memory(quantization: str, folder: Path, tmp_path: Path) -> None:
    tiny.build(
        "llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8, head_dim=64,
        vocab_size=4000,
    ).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30MB")  # fmt: skip
    growth, packed, _ = measure(tmp_path, quantization, str(folder))
    # 4 MB for what does not grow with the model: the pieces being quantised, and holes in the C library's heap.
    assert growth <= 1.15 * packed + 4e6, f"{growth / 1e6:.0f} MB for {packed / 1e6:.0f} MB"
