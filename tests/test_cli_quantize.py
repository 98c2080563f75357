"""`tilewright quantize`: what it writes, that it goes on after a stop, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_gguf_models import write_gguf
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright import AutoModelForCausalLM, AutoTokenizer, cli, quantize_weight
from tilewright.io.safetensors import SafetensorsFile
from tilewright.models.compressed import pack_words
from tilewright.models.layer_quantizer import LayerQuantizer, Recipe
from tilewright.models.layerwise import MATRICES, LayerReader, hf_name
from tilewright.models.quantize import quantize_checkpoint

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
CALIBRATION = ["--samples", "6", "--seq-len", "24"]


def save_tokenizer(folder: Path) -> None:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {text: index for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny.save(folder, "llama", vocab_size=256)
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.5}')
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    words = [
        "the",
        "a",
        "of",
        "model",
        "weight",
        "is",
        "are",
        "in",
        "on",
        "and",
        "codes",
        "group",
        "scale",
        "zero",
        "row",
        "column",
    ]
    chosen = torch.randint(len(words), (700,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[index] for index in chosen))
    return path


def quantize(*arguments: object) -> int:
    return cli.main(["quantize", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# What is written.


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_folder_holds_what_quantize_weight_gives(
    method: str, symmetric: bool, bits: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kind = "--symmetric" if symmetric else "--asymmetric"
    assert quantize(source, tmp_path / "new", "--bits", bits, "--method", method, kind) == 0
    printed = capsys.readouterr()
    assert re.search(r"^quantised matrices: 21 with groups of 32; [\d.]+ bits a weight$", printed.out, re.M)
    assert re.search(r"^dense matrices: lm_head$", printed.out, re.M)
    assert "layer" in printed.err

    dense, state = load_file(source / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", activation="fp32")
    reference = tiny.build("llama", vocab_size=256)
    with torch.no_grad():
        for index, layer in enumerate(reference.model.layers):
            for name in LINEARS:
                full = f"model.layers.{index}.{name}"
                weight = quantize_weight(dense[f"{full}.weight"], bits, 32, symmetric, method=method)
                layer.get_submodule(name).weight.copy_(weight.dequantize())
                n, k = weight.shape
                assert state[f"{full}.weight_packed"].shape == (n, k * bits // 32)
                assert state[f"{full}.weight_shape"].tolist() == [n, k]
                assert (f"{full}.weight_zero_point" in state) != symmetric
        ids = tiny.prompts(2, 20)
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(state[name], dense[name])

    assert not (tmp_path / "new" / ".partial").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    theirs = json.loads((source / "config.json").read_text())
    weights = {"dynamic": False, "group_size": 32, "num_bits": bits, "strategy": "group", "symmetric": symmetric,
               "type": "int"}  # fmt: skip
    assert config.pop("quantization_config") == {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized", "input_activations": None, "output_activations": None,
                "targets": ["Linear"], "weights": weights,
            }
        },
        "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "moe_sparsity_config": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip
    assert config == theirs


@pytest.mark.parametrize("bits", [4, 8])
def test_words_by_their_definition(bits: int) -> None:
    """Code j of a row lies at bit j * bits of the row's words, low bits first."""
    codes = torch.randint(0, 2**bits, (3, 13), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-13 * bits // 32))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(packed))
        assert stream == sum(code << (bits * index) for index, code in enumerate(row))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: biases; both: two query heads a key head
def test_calibrated_models_stay_close(family: str, method: str, tmp_path: Path) -> None:
    """8 bits leave little but mistakes: inputs taken from elsewhere, factors folded into the wrong place."""
    tiny.save(tmp_path / "source", family)
    ids = tiny.prompts(8, 32)
    options: dict[str, Any] = {"calibration": ids, "evaluation": tiny.prompts(4, 32, seed=1)}
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "new", Recipe(method, 8), **options)
    plain = quantize_checkpoint(
        tmp_path / "source", tmp_path / "plain", Recipe("rtn", 8), evaluation=options["evaluation"]
    )
    assert report.divergence.kl < 2 * plain.divergence.kl < 5e-3
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(ids).logits
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "new", activation="fp32")(ids).logits
    assert (before - after).abs().max() < 0.1 * before.abs().max()


def dense_twin(source: Path, folder: Path) -> Any:
    """transformers' model of the source with the weights of the quantised folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with LayerReader(folder) as reader, torch.no_grad():
        for index, block in enumerate(model.model.layers):
            layer = reader.layer(index)
            block.input_layernorm.weight.copy_(layer.weights["attention_norm"])
            block.post_attention_layernorm.weight.copy_(layer.weights["mlp_norm"])
            for name in MATRICES:
                linear = model.get_submodule(hf_name(name, index))
                linear.weight.copy_(layer.weights[name])
                if linear.bias is not None:
                    linear.bias.copy_(layer.biases[name])
    return model


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_calibration_sees_the_quantised_model(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs by which each matrix was rounded are those that it has in the folder that was written."""
    hessians: list[torch.Tensor] = []
    choose = LayerQuantizer._codes

    def codes(self: LayerQuantizer, w: torch.Tensor, settings: Any, hessian: torch.Tensor) -> Any:
        hessians.append(hessian)
        return choose(self, w, settings, hessian)

    monkeypatch.setattr(LayerQuantizer, "_codes", codes)
    tiny.save(tmp_path / "source", family)
    ids = tiny.prompts(5, 24)
    quantize_checkpoint(tmp_path / "source", tmp_path / "new", Recipe(method, skip=()), calibration=ids)

    model, inputs = dense_twin(tmp_path / "source", tmp_path / "new"), []
    firsts = ("q_proj", "o_proj", "gate_proj", "down_proj", "lm_head")
    for name, module in model.named_modules():
        if name.endswith(firsts):
            module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    assert len(hessians) == len(inputs) == 4 * 3 + 1
    for hessian, x in zip(hessians, inputs, strict=True):
        expected = x.t() @ x / len(x)
        torch.testing.assert_close(hessian, expected, rtol=2e-3, atol=2e-3 * float(expected.diagonal().mean()))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_pays(method: str, source: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    reports = {}
    for name, extra in {"rtn": ["--eval", text], method: ["--calibration", text, *CALIBRATION]}.items():
        file = tmp_path / f"{name}.json"
        extra = ["--eval", text, "--seq-len", 24, *extra]
        assert quantize(source, tmp_path / name, "--method", name, "--json", file, *extra) == 0
        reports[name] = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert len(re.findall(r"^mean KL divergence: [\d.e-]+$", out, re.M)) == 2
    found, plain = reports[method]["divergence"], reports["rtn"]["divergence"]
    assert found["kl"] < 0.8 * plain["kl"]
    assert found["perplexity_before"] == plain["perplexity_before"]
    assert reports[method]["method"] == method and reports[method]["bits"] == 4


def test_report_is_what_the_models_give(source: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert quantize(source, tmp_path / "new", "--eval", text, "--seq-len", 50, "--json", file) == 0
    report = json.loads(file.read_text())
    ids = torch.tensor(AutoTokenizer.from_pretrained(source).encode(text.read_text()))
    ids = ids[: len(ids) // 50 * 50].view(-1, 50)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, activation="fp32")(ids).logits.double().log_softmax(-1)
        for path in (source, tmp_path / "new")
    )
    found = report["divergence"]
    assert found["tokens"] == ids.numel()
    assert found["kl"] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    for key, logits in (("perplexity_before", before), ("perplexity_after", after)):
        surprise = -logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        assert found[key] == pytest.approx(float(surprise.exp()), rel=1e-4)
    assert found["same_choice"] == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
    assert report["bits_per_weight"] == 5.0  # the scales of an fp32 model are fp32
    assert report["nbytes"] == sum(t.nbytes for t in load_file(tmp_path / "new" / "model.safetensors").values())


def test_rest_of_the_calibration_text_is_not_calibrated_on(source: Path, text: Path, tmp_path: Path) -> None:
    """Without --eval the end of the text is compared on; with another end the weights are the same."""
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[:-200] + "x" * 200)
    weights, reports = [], []
    for name, file in (("a", text), ("b", other)):
        options = ["--method", "gptq", "--calibration", file, "--seq-len", 64, "--json", tmp_path / f"{name}.json"]
        assert quantize(source, tmp_path / name, *options) == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        reports.append(json.loads((tmp_path / f"{name}.json").read_text())["divergence"])
    assert weights[0] == weights[1]
    assert reports[0]["kl"] != reports[1]["kl"] and reports[0]["tokens"] == reports[1]["tokens"] > 64


def test_groups_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """160 columns have no groups of 128, 100 none of any size: smaller groups, named apart, and dense."""
    shape = {"hidden_size": 128, "num_attention_heads": 8}
    tiny.save(tmp_path / "source", "llama", intermediate_size=160, **shape)
    assert quantize(tmp_path / "source", tmp_path / "new", "--group-size", 128) == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert [(group["targets"], group["weights"]["group_size"]) for group in groups.values()] == [
        (["Linear"], 128),
        (["re:model\\.layers\\.\\d+\\.mlp\\.down_proj$"], 32),
    ]
    assert "3 with groups of 32, 18 with groups of 128" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    tiny.save(tmp_path / "odd", "llama", intermediate_size=100, **shape)
    assert quantize(tmp_path / "odd", tmp_path / "odd4") == 0
    assert "dense matrices: lm_head, model.layers.*.mlp.down_proj\n" in capsys.readouterr().out
    assert quantize(tmp_path / "odd", tmp_path / "rows", "--group-size", -1, "--bits", 8) == 0
    config = json.loads((tmp_path / "rows" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("odd", "rows"))
    ids = tiny.prompts(1, 9)
    assert (before(ids).logits - after(ids).logits).abs().max() < 0.1 * before(ids).logits.abs().max()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_skip(method: str, source: Path, tmp_path: Path) -> None:
    skip = ("down_proj", "model.layers.1.self_attn.v_proj", "q_proj")
    calibration = None if method == "rtn" else tiny.prompts(4, 16)
    quantize_checkpoint(source, tmp_path, Recipe(method, 8, skip=skip), calibration=calibration)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.self_attn.v_proj.weight" in names and "model.layers.0.self_attn.v_proj.weight" not in names
    assert "model.layers.2.mlp.down_proj.weight" in names and "lm_head.weight_packed" in names
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignored) == 7 and "model.layers.1.self_attn.v_proj" in ignored and "lm_head" not in ignored
    before, after = (AutoModelForCausalLM.from_pretrained(path, activation="fp32") for path in (source, tmp_path))
    ids = tiny.prompts(1, 30)
    assert (before(ids).logits - after(ids).logits).abs().max() < 0.1 * before(ids).logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """A folder stays in its dtype, scales included, and each stored value is what was calibrated with."""
    model = tiny.build("llama").to(dtype)
    model.save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "new", Recipe("awq"), calibration=tiny.prompts(4, 16))
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {dtype, torch.int32, torch.int64}
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "new").layers[0].down.weight
    assert weight.scale in ("f16", "bf16")


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q8_0"])
def test_gguf_becomes_a_folder(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny.build("llama", intermediate_size=160), kind)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf", activation="fp32")
    with pytest.MonkeyPatch.context() as patch:
        # That file has no vocabulary; test_default_model quantises one that has.
        patch.setattr("tilewright.models.quantize.AutoTokenizer.from_pretrained", lambda path: _NoTokenizer())
        quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "new", Recipe("rtn", 8))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "new", activation="fp32")
    assert after.config.rope_interleaved is False and before.config.rope_interleaved is True
    ids = tiny.prompts(2, 30)
    assert (before(ids).logits - after(ids).logits).abs().max() < 0.1 * before(ids).logits.abs().max()
    assert after.generation_config.eos_token_id == [2, 5]


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        pass


def test_shards(source: Path, tmp_path: Path) -> None:
    for name, size in (("one", 5 * 10**9), ("many", 60_000)):
        quantize_checkpoint(source, tmp_path / name, Recipe(), max_shard_size=size)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    whole, parts = load_file(tmp_path / "one" / "model.safetensors"), {}
    for file in files:
        parts |= load_file(tmp_path / "many" / file)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    a, b = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(tiny.prompts(1, 5)).logits for name in ("one", "many")
    )
    assert torch.equal(a, b)


# Going on after a stop.


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_goes_on_after_ctrl_c(
    method: str, stop: int, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["--method", method, "--eval", text]
    arguments += [] if method == "rtn" else ["--calibration", text, *CALIBRATION]
    assert quantize(source, tmp_path / "whole", *arguments) == 0
    seen: list[int] = []
    whole = LayerQuantizer.layer

    def layer(self: LayerQuantizer, index: int, states: Any) -> Any:
        seen.append(index)
        tensors = whole(self, index, states)
        if index == stop and len(seen) == stop + 1:
            raise KeyboardInterrupt
        return tensors

    monkeypatch.setattr(LayerQuantizer, "layer", layer)
    capsys.readouterr()
    target = tmp_path / "stopped"
    assert quantize(source, target, *arguments) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert [file.name for file in target.iterdir()] == [".partial"], "something stands under its final name already"
    assert quantize(source, target, *arguments) == 0
    assert seen == [*range(stop + 1), *range(stop, 3)], "a finished layer was done again"
    assert contents(target) == contents(tmp_path / "whole")


def test_killed_process(source: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--method", "gptq", "--calibration", str(text), *CALIBRATION, "--eval", str(text)]
    command = [sys.executable, "-m", "tilewright.cli", "quantize", str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed"), *arguments], stderr=subprocess.DEVNULL, env=environment
    )
    parts = tmp_path / "killed" / ".partial"
    end = time.monotonic() + 60
    while process.poll() is None and not list(parts.glob("part-*.safetensors")):
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / name), *arguments], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_stopped_while_assembling(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment: no config.json before all shards are there, and the same folder in the end."""
    quantize_checkpoint(source, tmp_path / "whole", Recipe())
    replace, calls = Path.replace, []

    def stopping(self: Path, target: Path) -> Path:
        calls.append(target.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return replace(self, target)

    target = tmp_path / "stopped"
    for stop in range(1, 6):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", stopping)
            quantize_checkpoint(source, target, Recipe())
        assert (target / "config.json").exists() <= (target / "model.safetensors").exists()
        assert calls[-1] == "config.json" or stop < 5
    quantize_checkpoint(source, target, Recipe())
    assert contents(target) == contents(tmp_path / "whole")


def test_other_options_are_refused(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    target, arguments = tmp_path / "new", ["--method", "gptq", "--calibration", text, *CALIBRATION]
    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "outside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert quantize(source, target, *arguments) == 130
    before = contents(target)
    other = tmp_path / "other.txt"
    other.write_text("another text, " * 100)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    os.utime(moved / "model.safetensors", (1, 1))
    for run, what in [
        ([source, target, *arguments, "--bits", 8], "bits 4, now 8"),
        ([source, target, *arguments, "--asymmetric"], "symmetric True, now False"),
        ([source, target, *arguments, "--skip", "q_proj"], "skip"),
        ([source, target, *arguments[:3], other, *CALIBRATION], "calibration text"),
        ([moved, target, *arguments], "checkpoint"),
        ([source, target], "method 'gptq', now 'rtn'"),
    ]:
        capsys.readouterr()
        assert quantize(*run) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(r"tilewright: error: .*\.partial: this run was begun differently \(.*\n", error)
        assert what in error
        assert contents(target) == before
    assert quantize(source, target, *arguments) == 0


def test_one_process_at_a_time(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tilewright.models.partial import PartialFolder

    with PartialFolder(tmp_path / "new", {}):
        assert quantize(source, tmp_path / "new") == 1
    assert "another process is at work" in capsys.readouterr().err


# Refusals: one line on stderr.


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["only-source"], ["a", "b", "--bits", "3"], ["a", "b", "--group-size", "48"],
        ["a", "b", "--method", "best"],
        ["a", "b", "--symmetric", "--asymmetric"], ["a", "b", "--method", "gptq"], ["a", "b", "--method", "awq"],
        ["a", "b", "--calibration", "c"], ["a", "b", "--samples", "0"], ["a", "b", "--seq-len", "x"],
        ["a", "b", "--json", "no/such/folder/file.json"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        quantize(*arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: tilewright quantize" in captured.err
    if "--method" in arguments and "best" not in arguments:
        assert "--calibration FILE" in captured.err


def fails(message: str, capsys: pytest.CaptureFixture, *arguments: object) -> None:
    assert quantize(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in re.split(r"[\r\n]", captured.err) if line and "layer/s]" not in line]  # the bar
    assert len(lines) == 1 and lines[0].startswith("tilewright: error: "), captured.err
    assert re.search(message, lines[0]), lines[0]


def test_bad_texts(source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"empty": b"", "blank": b" \n\n", "short": b"too short", "latin1": b"\xe9t\xe9 " * 300, "one": b"x"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    gptq = [source, tmp_path / "new", "--method", "gptq", "--calibration"]
    fails("empty: expected a text, the file is empty", capsys, *gptq, tmp_path / "empty")
    fails("blank: expected a text, the file is empty", capsys, *gptq, tmp_path / "blank")
    fails("short: expected at least 1024 tokens for 1 windows of 512 and a rest", capsys, *gptq, tmp_path / "short")
    fails("latin1: expected text in UTF-8", capsys, *gptq, tmp_path / "latin1")
    fails("No such file", capsys, *gptq, tmp_path / "missing")
    fails("tokens for 900 windows of 24", capsys, *gptq, text, "--samples", 900, "--seq-len", 24)
    fails("one: expected at least 2 tokens to compare on, got 1", capsys, source, tmp_path / "new", "--eval",
          tmp_path / "one")  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_bad_targets(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    fails("expected a new or empty folder, got a file", capsys, source, tmp_path / "file")
    fails("expected a new or empty folder, got one with files in it", capsys, source, tmp_path / "full")
    fails("new or empty folder, got one with files", capsys, source, source)
    fails("Not a directory", capsys, source, tmp_path / "file" / "below")
    assert (tmp_path / "full" / "config.json").read_text() == "{}"


def test_bad_sources(source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fails("no-such-model", capsys, "no-such-model", tmp_path / "new")
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = load_file(source / "model.safetensors")
    for name, value in (("model.layers.1.mlp.up_proj.weight", torch.nan), ("model.norm.weight", torch.inf),
                        ("lm_head.weight", torch.nan)):  # fmt: skip
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[3] = value
        save_file(changed, broken / "model.safetensors")
        fails("expected finite numbers", capsys, broken, tmp_path / f"nan-{name}")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, broken / "model.safetensors")
    fails("model.norm.weight: expected a tensor", capsys, broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (broken / "tokenizer.json").unlink()
    fails("tokenizer.json", capsys, broken, tmp_path / "new", "--method", "awq", "--calibration", text)


def test_quantised_source(source: Path, tmp_path: Path) -> None:
    """A quantised folder is dequantised, and quantised again."""
    quantize_checkpoint(source, tmp_path / "int8", Recipe(bits=8))
    quantize_checkpoint(tmp_path / "int8", tmp_path / "int4", Recipe(bits=8, group_size=16))
    a, b = (SafetensorsFile(tmp_path / name / "model.safetensors").tensors for name in ("int8", "int4"))
    assert a.keys() == b.keys()
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, activation="fp32") for path in (source, tmp_path / "int4")
    )
    ids = tiny.prompts(1, 9)
    assert (before(ids).logits - after(ids).logits).abs().max() < 0.1 * before(ids).logits.abs().max()
