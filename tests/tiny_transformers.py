"""Tiny random models of transformers' types, and inputs for them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, logging

logging.set_verbosity_error()

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = TEXT | {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
SLIDING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Case:
    """A model type, the fields of its tiny config, and how many calls of the attention function a forward makes."""

    config: dict[str, Any]
    calls: int = 2
    auto: type = AutoModelForCausalLM
    inputs: str = "text"  # "text", "seq2seq", "image", "audio"
    type: str = ""
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case(DECODER),
    "mistral": Case(DECODER | {"sliding_window": 4}),
    "qwen2": Case(DECODER),
    "qwen3": Case(DECODER | {"head_dim": 16}),
    "phi3": Case(DECODER),
    "olmo2": Case(DECODER),
    "gemma2": Case(DECODER | {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0}),
    "gemma3_text": Case(DECODER | {"head_dim": 16, "sliding_window": 4, "layer_types": SLIDING}),
    "gpt_oss": Case(DECODER | {"head_dim": 16, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2}),
    "deepseek_v3": Case(  # keys wider than values
        DECODER
        | {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 12}
        | {"qk_nope_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 4}
    ),
    "gpt2": Case({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": Case(TEXT | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bert": Case(TEXT, auto=AutoModel),
    "roberta": Case(TEXT | {"max_position_embeddings": 64}, auto=AutoModel),
    "distilbert": Case({"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}, auto=AutoModel),
    "modernbert": Case(TEXT | {"local_attention": 4}, auto=AutoModel),
    "clip_text_model": Case(TEXT, auto=AutoModel),
    "t5": Case(T5, calls=6, auto=AutoModelForSeq2SeqLM, inputs="seq2seq"),
    "bart": Case(SEQ2SEQ, calls=6, auto=AutoModelForSeq2SeqLM, inputs="seq2seq"),
    "whisper": Case(SEQ2SEQ | {"max_source_positions": 16, "num_mel_bins": 8}, 6, AutoModel, "audio"),
    "vit": Case(VISION, auto=AutoModel, inputs="image"),
    "clip_vision_model": Case(VISION, auto=AutoModel, inputs="image"),
    "splinter": Case(TEXT, auto=AutoModel),  # no sdpa, no is_causal: a mask of None must not become causal
    # These read the mask in code of their own, and must be given one that they can add to scores.
    "bloom": Case({"hidden_size": 64, "n_layer": 2, "n_head": 4}, calls=0),
    "mpt": Case({"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}, calls=0),
    "codegen": Case({"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, calls=0),
}


def build(name: str, implementation: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same random weights for every implementation, large enough that attention is far from uniform."""
    case = CASES[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = AutoConfig.for_model(name, **{"vocab_size": 100} | tokens | case.config)
    for option, value in vars(config).items():
        if "drop" in option and isinstance(value, float):
            setattr(config, option, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.auto.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() >= 2:
                p.copy_(noise * (1.2 * p.shape[-1] ** -0.5))
            else:
                p.copy_(noise * 0.1 + (0 if parameter_name.endswith("bias") else 1))
    return model.to(dtype)


def inputs(name: str, padding: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two sequences, the first of them padded by 4 of 11 tokens on the left or right."""
    generator = torch.Generator().manual_seed(1)
    kind, given = CASES[name].inputs, {}
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(dtype)}
    if kind == "audio":
        given["input_features"] = torch.randn(2, 8, 32, generator=generator).to(dtype)
    else:
        given["input_ids"] = torch.randint(3, 99, (2, 11), generator=generator)
        given["attention_mask"] = torch.ones(2, 11, dtype=torch.int64)
        padded = {"none": slice(0, 0), "left": slice(0, 4), "right": slice(7, 11)}[padding]
        given["attention_mask"][0, padded] = 0
        given["input_ids"][0, padded] = 0
    if kind in ("seq2seq", "audio"):
        given["decoder_input_ids"] = torch.randint(3, 99, (2, 6), generator=generator)
    return given


def first_output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits or hidden states of the tokens that are not padding, whose rows mean nothing."""
    with torch.no_grad():
        out = model(**given)[0]
    mask = given.get("attention_mask")
    return out[mask.bool()] if mask is not None and mask.shape == out.shape[:2] else out


def relative_error(out: Tensor, exact: Tensor) -> float:
    assert out.shape == exact.shape
    error = (out.double() - exact.double()).abs().max() / exact.double().abs().max()
    return float("inf") if error.isnan() else float(error)
