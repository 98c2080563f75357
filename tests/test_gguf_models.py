"""Models from GGUF files, written by the gguf package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from cases import gguf_rows, gguf_values, seeded
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


def encoded(values: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor as GGUF's bytes, which it takes its values from; random blocks where the gguf package cannot write."""
    type_ = gguf.GGMLQuantizationType[kind]
    try:
        raw = gguf.quants.quantize(values.numpy(), type_)
    except NotImplementedError:
        size = gguf_values(gguf_rows(kind, *values.shape, seeded(kind)), kind).std()
        raw = gguf_rows(kind, *values.shape, seeded(kind), float(0.1 * 0.15 / size)).numpy()
    values.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(raw, type_), np.float32)).view(values.shape))
    return raw


def write_gguf(
    path: Path,
    model: Any,
    kind: str | dict[str, str],
    metadata: dict[str, Any] | None = None,
    vectors: str = "F32",
    **tensors: Any,
) -> None:
    """A transformers llama as GGUF, as convert_hf_to_gguf.py writes it. The model's weights become the file's.

    kind: the matrices' type, or types by a part of the name, the first that fits; vectors: the type of the others.
    """
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
    kinds = {"": kind} if isinstance(kind, str) else kind
    written = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if name in tensors:
            continue
        type_ = vectors if tensor.dim() == 1 else next(kinds[part] for part in kinds if part in name)
        rows = encoded(tensor, type_)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        written[name] = rows, type_
    for name, array in tensors.items():
        written[name] = array, "F32"
    for name, (array, type_) in written.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[type_])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_logits(path: Path, reference: Any) -> Any:
    """Our model of the file against transformers' in float64 with the file's weights; returns ours."""
    model = AutoModelForCausalLM.from_pretrained(path, activation="fp32", dtype="float32")
    ids = tiny.prompts(2, 13)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(ids).logits
        # Codes times x and minima times its sum round elsewhere than a dense product; both lie within this.
        assert (model(ids).logits - exact).abs().max() <= 1e-5 * exact.abs().max()
    return model


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_types(kind: str, tied: bool, tmp_path: Path) -> None:
    reference = tiny.build("llama", tie_word_embeddings=tied)
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, kind, **({"output.weight": None} if tied else {}))
    model = assert_same_logits(path, reference)
    assert model.config.tie_word_embeddings == tied
    assert model.generation_config.eos_token_id == [2, 5]
    if kind == "F32":
        model.save_pretrained(tmp_path / "hf")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        ids = tiny.prompts(2, 13)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


# What llama-quantize makes of the parts of a model: Q4_K_M and the like mix types even within a layer.
MIXES = {
    "Q4_K_M": {"token_embd": "Q4_K", "output.": "Q6_K", "attn_v": "Q6_K", "1.ffn_down": "Q6_K", "": "Q4_K"},
    "Q5_K_M": {"output.": "Q6_K", "attn_v": "Q6_K", "": "Q5_K"},
    "IQ4_XS": {"token_embd": "Q6_K", "output.": "Q6_K", "attn_v": "Q5_K", "": "IQ4_XS"},
    "Q2_K": {"token_embd": "Q2_K", "output.": "Q6_K", "attn_v": "Q4_K", "ffn_down": "Q3_K", "": "Q2_K"},
    "IQ1_M": {"token_embd": "Q2_K", "output.": "Q5_K", "attn_output": "IQ2_XXS", "ffn_down": "IQ2_S", "": "IQ1_M"},
    "IQ3_S": {"token_embd": "IQ3_S", "output.": "Q6_K", "attn_v": "IQ4_XS", "attn_q": "IQ3_XXS", "": "IQ3_S"},
    "IQ2_XS": {"token_embd": "BF16", "output.": "F16", "attn_v": "IQ1_S", "": "IQ2_XS"},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("vectors", ["F32", "F16", "BF16"])
def test_mixes(mix: str, vectors: str, tmp_path: Path) -> None:
    reference = tiny.build("llama", hidden_size=256, intermediate_size=512, num_attention_heads=16, num_hidden_layers=2)
    write_gguf(tmp_path / "model.gguf", reference, MIXES[mix], vectors=vectors)
    assert_same_logits(tmp_path / "model.gguf", reference)


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
    write_gguf(path, tiny.build("llama", hidden_size=256, intermediate_size=256, num_attention_heads=16), "TQ2_0")
    supported = "F32, F16, BF16, Q4_0, .*, MXFP4"
    with pytest.raises(
        NotImplementedError, match=rf"model\.gguf: .*type TQ2_0 is not supported, supported: {supported}"
    ):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_vector_is_not_quantised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny.build("llama"), "F32", vectors="Q8_0")
    with pytest.raises(FormatError, match=r"norm\.weight: expected F32, F16 or BF16 .* shape \(96,\), got Q8_0"):
        AutoModelForCausalLM.from_pretrained(path)
