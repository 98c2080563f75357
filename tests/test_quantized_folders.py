"""Folders with a quantization_config: they load with no option given and compute what their matrices mean."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import hf_packers as packers
import numpy as np
import pytest
import tiny
import torch
from hf_folders import DOWN, FOLDERS, Maker, edit, quantise
from safetensors.torch import load_file, save_file
from tiny import edit_config, one_thread  # noqa: F401  (a fixture)
from torch import nn

from tilewright import AutoModelForCausalLM
from tilewright.io.errors import FormatError
from tilewright.models.linear import DenseLinear, Parallel
from tilewright.quant import QuantizedLinear
from tilewright.quant.weight import FLOAT_CODES

gptq, ct = packers.gptq, packers.compressed_tensors


def assert_same_logits(path: Path, reference: nn.Module) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, activation="fp32")
    ids = tiny.prompts(2, 14)
    with torch.no_grad():
        expected = reference(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("name", FOLDERS)
def test_loads_and_computes(name: str, tmp_path: Path) -> None:
    maker, overrides = FOLDERS[name]
    model = assert_same_logits(tmp_path, quantise(tmp_path, maker, **overrides))
    assert isinstance(model.head, DenseLinear)
    for layer in model.layers:  # matrices with the same input are stacked
        assert all(isinstance(m, QuantizedLinear) for m in (layer.qkv, layer.output, layer.gate_up, layer.down))
    ids = tiny.prompts(1, 9)
    exact = model(ids).logits
    usual = AutoModelForCausalLM.from_pretrained(tmp_path)
    down = usual.layers[0].down
    assert down.activation == ("bf16" if down.weight.codes in FLOAT_CODES else "int8")
    rounded = usual(ids).logits
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(ValueError, match="already quantised"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization="int4")


def test_generates_and_shards(tmp_path: Path) -> None:
    """The tensors of one matrix may lie in several files."""
    quantise(tmp_path, packers.awq)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).generate(tiny.prompts(1, 4), max_new_tokens=5)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(tiny.prompts(1, 4), max_new_tokens=5), expected
    )


def test_orders_that_differ_stay_side_by_side(tmp_path: Path) -> None:
    model = assert_same_logits(tmp_path, quantise(tmp_path, partial(gptq, act_order=True)))
    assert isinstance(model.layers[0].qkv, Parallel)
    assert model.layers[0].down.weight.columns is not None


def test_formats_that_differ_stay_side_by_side(tmp_path: Path) -> None:
    makers = {"k_proj": partial(gptq, symmetric=True), "": gptq}
    model = assert_same_logits(tmp_path, quantise(tmp_path, makers))
    assert isinstance(model.layers[0].qkv, Parallel)
    assert isinstance(model.layers[0].gate_up, QuantizedLinear)


# --- what the config says of modules ---


@pytest.mark.parametrize(
    "maker, key",
    [
        (packers.awq, "modules_to_not_convert"),
        (packers.llm_int8, "llm_int8_skip_modules"),
        (packers.four_bit, "llm_int8_skip_modules"),
        (packers.hqq, "skip_modules"),
        (packers.fp8, "modules_to_not_convert"),
        (packers.fp8, "ignored_layers"),
        (ct, "ignore"),
    ],
)
def test_modules_that_are_not_quantised(maker: Maker, key: str, tmp_path: Path) -> None:
    reference = quantise(tmp_path, maker, dense=("lm_head", "layers.1.mlp.down_proj", "v_proj"))
    # "mlp.gate" is no part of "mlp.gate_proj".
    edit(
        tmp_path, **{key: ["lm_head", DOWN, "model.layers.0.mlp.gate", "re:.*v_proj" if key == "ignore" else "v_proj"]}
    )
    model = assert_same_logits(tmp_path, reference)
    assert isinstance(model.layers[1].down, DenseLinear)
    assert isinstance(model.layers[0].down, QuantizedLinear)
    assert isinstance(model.layers[0].qkv, Parallel)
    # A config that lists a matrix which the file holds quantised contradicts it.
    listed = ["lm_head", DOWN, "re:.*v_proj", "re:model.layers.2.mlp"] if key == "ignore" else ["model.layers.2.mlp"]
    edit(tmp_path, **{key: listed})
    with pytest.raises(FormatError, match=r"layers\.2\.mlp\.\w+_proj") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert key == "ignore" or f"quantization_config.{key}" in str(caught.value)


def test_gptq_dynamic(tmp_path: Path) -> None:
    """Bits by name, first match first; "-:" for modules that stay dense."""
    makers = {"down_proj": partial(gptq, bits=8), "o_proj": partial(gptq, bits=3), "": gptq}
    reference = quantise(tmp_path, makers, dense=("lm_head", "layers.0.mlp.up_proj"))
    dynamic = {r"-:.*\.0\.mlp\.up_proj": {}, r"+:.*\.(down|o)_proj$": {"bits": 8}, "": {"bits": 4, "group_size": 32}}
    dynamic = {r"model\.layers\.\d+\.self_attn\.o_proj": {"bits": 3, "group_size": 32}, **dynamic}
    edit(tmp_path, bits=2, dynamic=dynamic)
    model = assert_same_logits(tmp_path, reference)
    assert isinstance(model.layers[0].gate_up, Parallel)
    assert model.layers[0].down.weight.codes == "int8"


def test_compressed_tensors_groups(tmp_path: Path) -> None:
    """Groups by name, by expression, by class; of several that fit: the name, then the expression, then the class."""
    makers = {
        "embed_tokens": partial(ct, strategy="channel", form="int-quantized", bits=8),
        "layers.1.mlp.down_proj": partial(ct, bits=3, group=64),
        "down_proj": partial(ct, bits=8),
        "k_proj": partial(ct, form="float-quantized", bits=8, strategy="tensor", floating=True),
        "": ct,
    }
    reference = quantise(tmp_path, makers, also=("model.embed_tokens",))
    rng = np.random.default_rng(0)

    def group(targets: list[str], maker: Maker) -> dict[str, Any]:
        config = maker(rng, 32, 64).config
        return {**config["config_groups"]["group_0"], "targets": targets, "format": config["format"]}

    groups = {
        "linears": group(["Linear"], makers[""]),
        "eight": group(["re:.*down_proj"], makers["down_proj"]),
        "name": group([DOWN], makers["layers.1.mlp.down_proj"]),
        "embeddings": group(["Embedding"], makers["embed_tokens"]),
        "keys": group([r"re:.*self_attn\.k_proj$"], makers["k_proj"]),
    }
    edit(tmp_path, config_groups=groups, format="mixed-precision", ignore=["lm_head"])
    model = assert_same_logits(tmp_path, reference)
    assert model.layers[0].down.weight.codes == "int8"
    assert model.layers[1].down.weight.codes == "int4"
    assert isinstance(model.embedding.matrix, QuantizedLinear)
    edit(tmp_path, ignore=["Linear"])
    with pytest.raises(FormatError, match="weight_packed: expected a dense weight: no group of config_groups"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_heads(tmp_path: Path) -> None:
    """A quantised head; beside a tied embedding, which it then is not the same as."""
    reference = quantise(tmp_path / "head", packers.llm_int8, dense=())
    model = assert_same_logits(tmp_path / "head", reference)
    assert isinstance(model.head, QuantizedLinear)
    assert {m.weight.outlier_threshold for m in model.modules() if isinstance(m, QuantizedLinear)} == {6.0}
    edit(tmp_path / "head", llm_int8_threshold=0.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    assert model.layers[0].down.weight.outlier_threshold == 0.0

    reference = quantise(tmp_path / "tied", gptq, tie_word_embeddings=True)
    model = assert_same_logits(tmp_path / "tied", reference)
    assert model.head is model.embedding.matrix
    head = gptq(np.random.default_rng(1), 256, 96)
    edit_config(tmp_path / "tied", vocab_size=256)
    edit(
        tmp_path / "tied",
        {"model.embed_tokens.weight": torch.randn(256, 96), **{f"lm_head.{k}": v for k, v in head.tensors.items()}},
    )
    with pytest.warns(UserWarning, match="differ; using both"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert torch.equal(model.head.weight.dequantize(), head.w.float())


def test_biases(tmp_path: Path) -> None:
    """They are dense; those that early tools added, all 0, are left out."""
    reference = quantise(tmp_path, gptq, attention_bias=True)
    assert_same_logits(tmp_path, reference)
    edit(tmp_path, {f"{DOWN}.bias": torch.zeros(96).half()})
    assert_same_logits(tmp_path, reference)
    edit(tmp_path, {f"{DOWN}.bias": torch.ones(96).half()})
    with pytest.raises(FormatError, match=r"down_proj\.bias: expected no such tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_scales_of_inputs_and_caches_are_left_out(tmp_path: Path) -> None:
    reference = quantise(tmp_path / "ct", ct)
    extra = {f"{DOWN}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    edit(tmp_path / "ct", extra, kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert_same_logits(tmp_path / "ct", reference)
    reference = quantise(tmp_path / "fp8", partial(packers.fp8, block=None))
    edit(tmp_path / "fp8", {f"{DOWN}.activation_scale": torch.ones(())}, activation_scheme="static")
    assert_same_logits(tmp_path / "fp8", reference)


def test_spellings(tmp_path: Path) -> None:
    """What older tools left out or called otherwise."""
    reference = quantise(tmp_path / "bnb", packers.four_bit)
    edit(tmp_path / "bnb", quant_method=...)
    assert_same_logits(tmp_path / "bnb", reference)
    reference = quantise(tmp_path / "gptq", gptq)
    edit(tmp_path / "gptq", checkpoint_format=..., format="gptq")
    assert_same_logits(tmp_path / "gptq", reference)
    edit(tmp_path / "gptq", format=...)
    assert_same_logits(tmp_path / "gptq", reference)
    reference = quantise(tmp_path / "awq", packers.awq)
    edit(tmp_path / "awq", version=..., format="gemm")
    assert_same_logits(tmp_path / "awq", reference)
    reference = quantise(tmp_path / "fp8", partial(packers.fp8, block=(128, 128)))
    edit(tmp_path / "fp8", weight_block_size=...)
    assert_same_logits(tmp_path / "fp8", reference)
    reference = quantise(tmp_path / "tensor", partial(packers.fp8, block=None))
    stored = load_file(tmp_path / "tensor/model.safetensors")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): t for name, t in stored.items()}
    save_file(renamed, tmp_path / "tensor/model.safetensors")
    edit(tmp_path / "tensor", weight_block_size=...)
    assert_same_logits(tmp_path / "tensor", reference)
