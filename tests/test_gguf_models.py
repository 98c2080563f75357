"""Models from GGUF files, written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright import AutoModelForCausalLM
from tilewright.io.errors import FormatError

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
