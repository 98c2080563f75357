"""Folders with a quantization_config that are broken, contradict themselves or are not supported: what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import MUTATIONS, mutated
from hf_folders import DOWN, FOLDERS, edit, quantise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import edit_config, one_thread  # noqa: F401  (a fixture)
from torch import Tensor

from tilewright import AutoModelForCausalLM
from tilewright.io.errors import FormatError
from tilewright.models.sources import FolderSource


def first(change: Callable[[Tensor], Tensor], part: str) -> dict[str, Any]:
    return {f"{DOWN}.{part}": change}


def without(part: str) -> dict[str, Any]:
    return {f"{DOWN}.{part}": ...}


def ct_group(**changes: Any) -> dict[str, Any]:
    """config_groups with changes to the weights of group_0."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **changes}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


# A folder, changes of its tensors and of its quantization_config, the message; "?" before it: NotImplementedError,
# otherwise FormatError.
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("gptq-4", {}, {"quant_method": "aqlm"}, "?config.json: quantization_config.quant_method: 'aqlm'"),
    ("gptq-4", {}, {"quant_method": ...}, "quantization_config.quant_method: expected a string, the field"),
    ("gptq-4", {}, {"quant_method": 4}, "quant_method: expected a string, got 4"),
    ("gptq-4", {}, {"bits": 5}, "?quantization_config.bits: 5 is not supported, supported: 2, 3, 4"),
    ("gptq-4", {}, {"bits": "4"}, "quantization_config.bits: expected an integer"),
    ("gptq-4", {}, {"bits": ...}, "quantization_config.bits: expected an integer"),
    ("gptq-4", {}, {"bits": 8}, r"weight: expected shape \(96, 96\) by the config, got \(96, 48\)"),
    ("gptq-4", {}, {"checkpoint_format": "marlin"}, "?checkpoint_format: 'marlin' is not supported"),
    ("gptq-4", {}, {"is_marlin_format": True}, "?checkpoint_format: 'gptq' is not|is_marlin"),
    ("gptq-4", {}, {"pack_dtype": "int16"}, "?pack_dtype: 'int16' is not supported"),
    ("gptq-4", {}, {"rotation": "hadamard"}, "?rotation: 'hadamard' is not supported"),
    ("gptq-4", {}, {"dynamic": {"+:(": {"bits": 4}}}, "dynamic: expected regular expressions"),
    ("gptq-4", {}, {"dynamic": {".*": 4}}, r"dynamic\.\.\*: expected an object, got 4"),
    ("gptq-4", {}, {"dynamic": {".*": {"bits": 7}}}, r"?dynamic\.\.\*\.bits: 7 is not supported"),
    ("gptq-4", {}, {"dynamic": {".*": {"format": "gptq_v2"}}}, r"?dynamic\.\.\*\.format: an override"),
    ("gptq-4", {}, {"dynamic": {"-:.*down": {}}}, "dynamic: expected modules that are not quantised after"),
    ("gptq-4", without("qzeros"), {}, r"down_proj\.qzeros: expected this tensor for a matrix quantised with g"),
    ("gptq-4", without("qweight"), {}, r"down_proj\.weight: expected a tensor of shape \(96, 160\)"),
    ("gptq-4", first(lambda t: t[0], "qweight"), {}, r"down_proj\.qweight: expected two dimensions"),
    ("gptq-4", first(lambda t: t[:-1], "qweight"), {}, r"down_proj\.weight: expected shape \(96, 160\)"),
    ("gptq-4", first(lambda t: t.double(), "scales"), {}, r"down_proj\.weight: from_gptq: scales must be"),
    ("gptq-4", first(lambda t: t + 1, "g_idx"), {}, r"down_proj\.weight: from_gptq: g_idx must be in \[0, 5"),
    ("awq", {}, {"version": "gemv"}, "?quantization_config.version: 'gemv' is not supported"),
    ("awq", {}, {"bits": 8}, "?quantization_config.bits: 8 is not supported"),
    ("awq", {}, {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: expected a list of strings"),
    (
        "awq",
        {},
        {"modules_to_not_convert": ["down_proj"]},
        r"expected modules that are not quantised \(model.layers.0.mlp.do",
    ),
    ("awq", {}, {"modules_to_not_convert": ["*"]}, "modules_to_not_convert: expected regular expressions"),
    ("awq", without("scales"), {}, r"down_proj\.scales: expected this tensor"),
    ("llm-int8", without("SCB"), {}, r"down_proj\.SCB: expected this tensor"),
    ("llm-int8", first(lambda t: t[1:], "SCB"), {}, r"state\.SCB must have shape \(96\)"),
    ("llm-int8", {}, {"llm_int8_threshold": "6"}, "llm_int8_threshold: expected a positive finite number"),
    ("llm-int8", {}, {"llm_int8_threshold": -1.0}, "llm_int8_threshold: expected a positive finite number"),
    ("nf4", without("weight.absmax"), {}, r"down_proj\.weight\.absmax: expected this tensor"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), {}, "bitsandbytes__nf4: expected this tensor"),
    ("nf4", first(lambda t: t[5:], "weight.quant_state.bitsandbytes__nf4"), {}, "must be JSON"),
    ("nf4", without("weight.nested_absmax"), {}, r"state\['absmax'\] must be float32"),
    ("nf4", first(lambda t: t * 2, "weight.quant_map"), {}, "?is not nf4's table"),
    ("hqq-4", without("zero"), {}, r"down_proj\.zero: expected this tensor"),
    ("hqq-4", without("shape"), {}, r"down_proj\.shape: expected this tensor"),
    ("hqq-4", first(lambda t: t.float(), "shape"), {}, r"down_proj\.shape: expected integers"),
    ("hqq-4", first(lambda t: t[:1], "shape"), {}, r"down_proj\.shape: expected two sizes"),
    ("hqq-4", first(lambda t: t * 0, "axis"), {}, r"?down_proj\.weight: from_hqq: meta\['axis'\] 0"),
    ("eetq", {}, {"weights": "int4"}, "?quantization_config.weights: 'int4' is not supported"),
    ("eetq", without("weight_scales"), {}, r"down_proj\.weight_scales: expected this tensor"),
    ("ct-int4", without("weight_scale"), {}, r"down_proj\.weight_scale: expected this tensor"),
    ("ct-int4", without("weight_shape"), {}, r"down_proj\.weight_shape: expected this tensor"),
    ("ct-int4", first(lambda t: t.float(), "weight_shape"), {}, "weight_shape: expected two integers"),
    ("ct-int4", {f"{DOWN}.weight": torch.ones(96, 160)}, {}, r"weight: expected none beside weight_packed"),
    ("ct-int4", first(lambda t: t[1:], "weight_packed"), {}, "weight_shape must fit weight_packed"),
    ("ct-int4", {}, ct_group(num_bits=16), r"config_groups\.group_0: .*scheme\.weights\.num_bits must be"),
    ("ct-int4", {}, ct_group(num_bits=8), r"weight_packed must have shape \(160, 24\), got \(160, 12\)"),
    ("ct-int4", {}, ct_group(group_size=64), r"weight_scale must have shape \(160, 2\), got \(160, 3\)"),
    ("ct-int4", {}, ct_group(strategy="tensor_group"), r"?scheme\.weights\.strategy 'tensor_group'"),
    ("ct-int4", {}, ct_group(type="float"), r"?group_0: .*4-bit floats are not supported"),
    ("ct-int4", {}, {"format": "nvfp4-pack-quantized"}, "?scheme.format 'nvfp4-pack-quantized'"),
    ("ct-int4", {}, {"format": "mixed-precision"}, "quantization_config.format: expected each group's own"),
    ("ct-int4", {}, {"format": "int-quantized"}, "expected a int-quantized weight by config_groups.group_0"),
    ("ct-int4", {}, {"config_groups": {"W4A16": ["Linear"]}}, "?config_groups.W4A16: the name of a p"),
    ("ct-int4", {}, {"config_groups": {"group_0": 4}}, "config_groups.group_0: expected an object, got 4"),
    ("ct-int4", {}, {"config_groups": []}, r"quantization_config.config_groups: expected an object, got \[\]"),
    ("ct-int4", {}, {"config_groups": {}}, "expected a dense weight: no group of config_groups quantises"),
    ("ct-int4", {}, {"ignore": ["re:["]}, "quantization_config.ignore: expected regular expressions"),
    ("ct-int4", {}, {"ignore": []}, r"lm_head\.weight: expected a pack-quantized weight by config_groups.gro"),
    ("ct-int4", {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "?sparsity_config: only the"),
    ("ct-int4", {}, {"transform_config": {"config_groups": {"u": {}}}}, "?transform_config: weights th"),
    ("ct-int8", without("weight_scale"), {}, r"down_proj\.weight_scale: expected this tensor"),
    ("ct-int8", first(lambda t: t.float(), "weight"), {}, r"down_proj\.weight: expected a int-quantized weig"),
    ("fp8", without("weight_scale_inv"), {}, r"down_proj\.weight_scale_inv: expected this tensor"),
    ("fp8", {}, {"weight_block_size": [32]}, "weight_block_size: expected two positive integers or null"),
    ("fp8", {}, {"weight_block_size": [0, 64]}, "weight_block_size: expected two positive integers"),
    ("fp8", {}, {"weight_block_size": [64, 64]}, r"from_fp8: scale must have shape \(3, 2\) for blocks of 64"),
    ("fp8", first(lambda t: t.bfloat16(), "weight"), {}, "from_fp8: weight must be float8_e4m3fn, got bfloat"),
    ("fp8", first(lambda t: t.view(torch.float8_e5m2), "weight"), {}, "must be float8_e4m3fn, got float8_e5"),
    ("fp8", first(lambda t: t.view(torch.int8), "weight"), {}, "from_fp8: weight must be float8_e4m3fn"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, for tests to copy and break."""
    path = tmp_path_factory.mktemp("folders")
    for name, (maker, overrides) in FOLDERS.items():
        if any(row[0] == name for row in REFUSED):
            quantise(path / name, maker, num_hidden_layers=2, **overrides)
    return path


@pytest.mark.parametrize("row", range(len(REFUSED)), ids=lambda i: f"{i}-{REFUSED[i][0]}")
def test_refuses(row: int, folders: Path, tmp_path: Path) -> None:
    name, tensors, config, message = REFUSED[row]
    for file in (folders / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, tensors, **config)
    error = NotImplementedError if message.startswith("?") else FormatError
    with pytest.raises(error, match=message.lstrip("?")) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(caught.value) is error
    assert str(tmp_path) in str(caught.value)


def test_tensors_without_a_config(folders: Path, tmp_path: Path) -> None:
    for file in (folders / "gptq-4").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, quantization_config=...)
    with pytest.raises(FormatError, match=r"q_proj\.weight: expected a tensor of shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=[])
    with pytest.raises(FormatError, match="quantization_config: expected an object"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def read_all(path: Path) -> None:
    """Every matrix, checked and packed as the loader does it, or an error that names what is wrong."""
    try:
        source = FolderSource(path)
        for name in source.quantised:
            source.load(name)
    except (FormatError, NotImplementedError) as error:
        assert str(path) in str(error)


HOSTILE = st.sampled_from(
    [
        None,
        "",
        "re:(",
        "re:.*",
        "(((",
        -1,
        0,
        3,
        2**70,
        1e400,
        -0.5,
        True,
        [],
        [[]],
        ["x"],
        [1, 2, 3],
        {},
        {"a": 1},
        "gptq_v2",
    ]
)


@given(st.sampled_from(sorted({row[0] for row in REFUSED})), st.integers(0, 99), HOSTILE, st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_configs(folders: Path, name: str, which: int, value: Any, rename: bool) -> None:
    path = folders / name
    text = (path / "config.json").read_text()
    config = json.loads(text)
    places = list(entries(config["quantization_config"]))
    holder, key = places[which % len(places)]
    if rename and isinstance(value, str):
        holder[value] = holder.pop(key)
    else:
        holder[key] = value
    try:
        (path / "config.json").write_text(json.dumps(config))
        read_all(path)
    finally:
        (path / "config.json").write_text(text)


def entries(holder: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key of an object and of the objects in it."""
    for key, value in holder.items():
        yield holder, key
        if isinstance(value, dict):
            yield from entries(value)


@given(st.sampled_from(sorted({row[0] for row in REFUSED})), st.lists(MUTATIONS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_tensors(folders: Path, name: str, mutations: list[tuple[int, str, int]]) -> None:
    whole = (folders / name / "model.safetensors").read_bytes()
    tensors = load_file(folders / name / "model.safetensors")
    parts = sorted(part for part in tensors if part.startswith(DOWN))
    for which, kind, number in mutations:
        part = parts[which % len(parts)]
        if part in tensors:
            broken = mutated(tensors.pop(part), kind, number)
            tensors |= {} if broken is None else {part: broken.contiguous()}
    try:
        save_file(tensors, folders / name / "model.safetensors")
        read_all(folders / name)
    finally:
        (folders / name / "model.safetensors").write_bytes(whole)
