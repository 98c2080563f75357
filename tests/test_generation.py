"""generate: whole runs, parameters and caches, against transformers where it has the same."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright import DynamicCache, GenerationConfig
from tilewright.generation.config import PARAMETERS
from tilewright.io.errors import FormatError

# --- parity of whole runs ---

RUNS = [
    {"max_new_tokens": 12},
    {"max_length": 15},
    {"max_new_tokens": 25, "repetition_penalty": 1.4},
    {"max_new_tokens": 25, "eos_token_id": list(range(3, 40))},
    {"max_new_tokens": 25, "eos_token_id": list(range(3, 40)), "pad_token_id": 77},
    {"max_new_tokens": 25, "eos_token_id": list(range(3, 40)), "min_new_tokens": 9},
    {"max_new_tokens": 25, "eos_token_id": list(range(3, 40)), "min_length": 18, "repetition_penalty": 0.8},
    {"max_new_tokens": 8, "use_cache": False},
]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_equals_transformers(models: tuple[Any, Any], run: dict, padded: bool) -> None:
    model, reference = models
    ids = tiny.prompts(3, 10, seed=4)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
        mask[2, :2] = 0
        ids = ids.masked_fill(mask == 0, 0)
    expected = reference.generate(ids, attention_mask=mask, do_sample=False, **run)
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, **run), expected)
    if padded and run.get("eos_token_id") is None:
        # Leading pad tokens are padding also without a mask.
        assert torch.equal(model.generate(ids, do_sample=False, **run), expected)


def test_default_length_and_bos(models: tuple[Any, Any]) -> None:
    model, reference = models
    with pytest.warns(UserWarning, match="max_new_tokens"):
        ours = model.generate()
    assert torch.equal(ours, reference.generate())
    assert ours[0, 0] == 1
    near_the_end = tiny.prompts(1, 250)
    with pytest.warns(UserWarning, match="default"):
        assert model.generate(near_the_end, eos_token_id=210).shape[1] <= 256


def test_warns_beyond_the_context(models: tuple[Any, Any]) -> None:
    model, reference = models
    ids = tiny.prompts(1, 250)
    with pytest.warns(UserWarning, match="longer than the model's context of 256"):
        ours = model.generate(ids, max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(ours, reference.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False))


def test_custom_processors_and_criteria(models: tuple[Any, Any]) -> None:
    from transformers import LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor

    model, reference = models
    ids = tiny.prompts(2, 4)
    free = model.generate(ids, max_new_tokens=6)
    barred = LogitsProcessorList([SuppressTokensLogitsProcessor([int(free[0, 4]), int(free[1, 4])])])
    expected = reference.generate(ids, logits_processor=barred, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, logits_processor=barred, max_new_tokens=6), expected)
    stop = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 7, ids.shape[1] >= 6])])
    assert model.generate(ids, stopping_criteria=stop, max_new_tokens=20).shape == (2, 7)
    assert model.generate(ids, max_time=1e-9, max_new_tokens=200).shape[1] < 30
    with pytest.raises(TypeError, match="logits_processor must hold callables"):
        model.generate(ids, logits_processor=["x"], max_new_tokens=1)
    with pytest.raises(TypeError, match="stopping_criteria must hold callables"):
        model.generate(ids, stopping_criteria=["x"], max_new_tokens=1)


# --- parameters ---


def test_knows_every_parameter_of_transformers() -> None:
    import transformers

    names = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert names - {"transformers_version"} <= PARAMETERS
    defaults = transformers.GenerationConfig._get_default_generation_params()
    complete = GenerationConfig().complete()
    for name, value in defaults.items():
        ours = getattr(complete, name)
        # What is not supported yet stays unset, which asks for the same.
        assert ours == value or ours is None, name
    assert all(getattr(GenerationConfig(), name) is None for name in PARAMETERS)


REJECTED = [
    ({"temperature": 0.0}, ValueError, "temperature must be a positive number .*do_sample=False"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"temperature": math.nan}, ValueError, "temperature"),
    ({"temperature": math.inf}, ValueError, "temperature"),
    ({"temperature": "hot"}, TypeError, "temperature"),
    ({"temperature": True}, TypeError, "temperature"),
    ({"top_k": -1}, ValueError, "top_k"),
    ({"top_k": 2.5}, TypeError, "top_k"),
    ({"top_p": 0.0}, ValueError, "top_p"),
    ({"top_p": 1.1}, ValueError, "top_p"),
    ({"min_p": -0.1}, ValueError, "min_p"),
    ({"min_p": 1.5}, ValueError, "min_p"),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": -3}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens"),
    ({"max_length": 3}, ValueError, "input_ids has 4 tokens"),
    ({"min_new_tokens": -1}, ValueError, "min_new_tokens"),
    ({"num_return_sequences": 0}, ValueError, "num_return_sequences"),
    ({"num_return_sequences": 2}, ValueError, "num_return_sequences=2 needs do_sample=True"),
    ({"eos_token_id": "x"}, TypeError, "eos_token_id"),
    ({"eos_token_id": [1, -2]}, ValueError, "eos_token_id"),
    ({"pad_token_id": -1}, ValueError, "pad_token_id"),
    ({"stop_strings": ""}, ValueError, "stop_strings"),
    ({"stop_strings": []}, ValueError, "stop_strings"),
    ({"stop_strings": "x"}, ValueError, "tokenizer"),
    ({"do_sample": 1}, TypeError, "do_sample"),
    ({"max_time": 0}, ValueError, "max_time"),
    ({"num_beams": 2}, NotImplementedError, "num_beams=2 is not supported yet; supported: "),
    ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, "penalty_alpha"),
    ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "prompt_lookup_num_tokens"),
    ({"typical_p": 0.5}, NotImplementedError, "typical_p"),
    ({"bad_words_ids": [[1]]}, NotImplementedError, "bad_words_ids"),
    ({"no_repeat_ngram_size": 2}, NotImplementedError, "no_repeat_ngram_size"),
    ({"guidance_scale": 2.0}, NotImplementedError, "guidance_scale"),
    ({"cache_implementation": "static"}, NotImplementedError, "cache_implementation"),
    ({"output_attentions": True}, NotImplementedError, "output_attentions"),
    ({"assistant_model": object()}, NotImplementedError, "assistant_model"),
    ({"prefix_allowed_tokens_fn": print}, NotImplementedError, "prefix_allowed_tokens_fn"),
    ({"inputs_embeds": torch.zeros(1)}, NotImplementedError, "inputs_embeds"),
    ({"max_new_token": 3}, TypeError, "'max_new_token'; did you mean 'max_new_tokens'"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
    ({"generation_config": {"top_k": 3}}, TypeError, "generation_config must be"),
    ({"past_key_values": [()]}, TypeError, "past_key_values must be"),
    ({"past_key_values": DynamicCache(), "use_cache": False}, ValueError, "use_cache=False contradicts"),
    ({"streamer": 3}, TypeError, "streamer must have put"),
    ({"inputs": torch.ones(1, 1)}, ValueError, "inputs and input_ids"),
]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "error", "message"), REJECTED, ids=lambda value: str(value)[:50])
def test_generate_rejects(models: tuple[Any, Any], kwargs: dict, error: type, message: str) -> None:
    model, _ = models
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(tiny.prompts(1, 4), **{"max_new_tokens": None if "max_length" in kwargs else 2, **kwargs})


def test_neutral_values_and_warnings(models: tuple[Any, Any]) -> None:
    model, _ = models
    ids = tiny.prompts(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=1, num_beams=1, synced_gpus=False, typical_p=1.0, assistant_model=None,
                       temperature=1.0, top_k=50, cache_implementation="dynamic", inputs_embeds=None)  # fmt: skip
    with pytest.warns(UserWarning, match="temperature=0.5 has no effect without do_sample=True"):
        model.generate(ids, max_new_tokens=1, temperature=0.5)
    with pytest.warns(UserWarning, match="takes precedence over max_length=9"):
        assert model.generate(ids, max_new_tokens=1, max_length=9).shape[1] == 5
    with pytest.warns(UserWarning, match="generation stops at 6"):
        model.generate(ids, max_new_tokens=2, min_new_tokens=5)


def test_precedence(models: tuple[Any, Any]) -> None:
    model, _ = models
    ids = tiny.prompts(1, 4)
    saved = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=7, min_new_tokens=7, eos_token_id=2)
    try:
        assert model.generate(ids).shape[1] == 11
        assert model.generate(ids, GenerationConfig(max_new_tokens=8, min_new_tokens=8)).shape[1] == 12
        given = GenerationConfig(max_new_tokens=8, min_new_tokens=8)
        assert model.generate(ids, given, max_new_tokens=9, min_new_tokens=9).shape[1] == 13
        assert given == GenerationConfig(max_new_tokens=8, min_new_tokens=8)
    finally:
        model.generation_config = saved


def test_config_files(tmp_path: Path) -> None:
    import transformers

    config = GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=[3, 4], stop_strings=["x"])
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_config.json"]
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert GenerationConfig.from_pretrained(tmp_path, top_k=3).top_k == 3
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.temperature, theirs.eos_token_id) == (0.5, [3, 4])

    transformers.GenerationConfig(top_p=0.5, do_sample=True, num_beams=3).save_pretrained(tmp_path)
    ours = GenerationConfig.from_pretrained(tmp_path)
    assert (ours.top_p, ours.num_beams) == (0.5, 3)
    assert "transformers_version" in ours.extra
    ours.save_pretrained(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).top_p == 0.5

    for text, message in [
        ('{"temperature": "x"}', "temperature: expected a positive number"),
        ("[1]", "expected an object"),
        ("{", "expected JSON"),
        ('{"top_k": true}', "top_k"),
    ]:
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        GenerationConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="unknown parameter 'temprature'; did you mean 'temperature'"):
        GenerationConfig(temprature=1.0)
    assert repr(GenerationConfig(top_k=3)) == "GenerationConfig(top_k=3)"


def test_a_file_s_unused_temperature_is_harmless(models: tuple[Any, Any]) -> None:
    model, _ = models
    saved = model.generation_config
    model.generation_config = GenerationConfig.from_dict({"temperature": 0.0, "eos_token_id": 2})
    try:
        model.generate(tiny.prompts(1, 3), max_new_tokens=1)
        with pytest.raises(ValueError, match="temperature"):
            model.generate(tiny.prompts(1, 3), max_new_tokens=1, do_sample=True)
    finally:
        model.generation_config = saved


# --- cache ---


def test_next_turn_reuses_the_cache(models: tuple[Any, Any]) -> None:
    model, reference = models
    cache = DynamicCache()
    first = model.generate(tiny.prompts(1, 8), past_key_values=cache, max_new_tokens=5, min_new_tokens=5)
    assert cache.get_seq_length() == 12
    turn = torch.cat([first, tiny.prompts(1, 4, seed=1)], dim=1)
    expected = reference.generate(turn, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(turn, past_key_values=cache, max_new_tokens=9), expected)

    cache.crop(12)
    only_new = turn[:, 12:]
    mask = torch.ones_like(turn)
    out = model.generate(only_new, attention_mask=mask, past_key_values=cache, max_new_tokens=9)
    assert torch.equal(out, expected[:, 12:])
    cache.crop(-(cache.get_seq_length() - 12))
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="input_ids has 12 tokens and past_key_values already holds 12"):
        model.generate(turn[:, :12], past_key_values=cache, max_new_tokens=1)


def test_padded_turns(models: tuple[Any, Any]) -> None:
    model, _ = models
    ids = tiny.prompts(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = DynamicCache()
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    turn = torch.cat([out, tiny.prompts(2, 3, seed=1)], dim=1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=6, min_new_tokens=6)
    alone = model.generate(turn[:1, 4:], max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(second[0, 4:], alone[0])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_interruption_leaves_the_cache_usable(models: tuple[Any, Any], error: type) -> None:
    model, _ = models
    ids = tiny.prompts(1, 6)
    expected = model.generate(ids, max_new_tokens=10, min_new_tokens=10)
    cache, seen = DynamicCache(), []

    def stop(tokens: list[int]) -> None:
        seen.extend(tokens)
        if len(seen) == 4:
            raise error

    with pytest.raises(error):
        model.generate(ids, past_key_values=cache, streamer=stop, max_new_tokens=10, min_new_tokens=10)
    assert cache.get_seq_length() == 6 + 3
    so_far = torch.cat([ids, torch.tensor([seen])], dim=1)
    out = model.generate(so_far, past_key_values=cache, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(out, expected)


def test_cache_survives_a_broken_forward(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models
    ids = tiny.prompts(1, 300)
    cache = DynamicCache()
    expected = model(ids).logits[:, -1]
    model(ids[:, :200], past_key_values=cache)
    layers = model._bound
    calls = []

    def fail(x: torch.Tensor, *, residual: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        raise Interrupted

    good, layers[1].output = layers[1].output, fail
    try:
        with pytest.raises(Interrupted):
            model(ids[:, 200:], past_key_values=cache)  # grows the buffers, too
    finally:
        layers[1].output = good
    assert calls
    assert cache.get_seq_length() == 200
    again = model(ids[:, 200:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_dynamic_cache_alone() -> None:
    cache = DynamicCache()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    cache.crop(3)
    cache.reserve(5, 2, 3, 2, 8, torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == 2
    cache.keys[0][:, :, :5] = 1
    cache.advance(5)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 5 * 8 * 2
    cache.reserve(1000, 2, 3, 2, 8, torch.bfloat16)
    assert cache.keys[0].shape[2] >= 1005
    assert (cache.keys[0][:, :, :5] == 1).all()
    cache.set_starts(torch.tensor([0, 2, 4]))
    cache.batch_repeat_interleave(2)
    assert cache.keys[1].shape[0] == 6
    assert cache.starts.tolist() == [0, 0, 2, 2, 4, 4]
    cache.crop(3)
    assert cache.starts.tolist() == [0, 0, 2, 2, 3, 3]
    cache.crop(0)
    cache.reserve(1, 2, 1, 2, 8, torch.bfloat16)  # an emptied cache serves any batch
    assert cache.keys[0].shape[0] == 1


def test_outputs(models: tuple[Any, Any]) -> None:
    model, reference = models
    ids = tiny.prompts(2, 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "output_scores": True}
    ours = model.generate(ids, return_dict_in_generate=True, **options)
    theirs = reference.generate(ids, return_dict_in_generate=True, do_sample=False, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(ours.scores) == 4
    for a, b in zip(ours.logits + ours.scores, theirs.logits + theirs.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == 8
    assert ours.keys() == ["sequences", "scores", "logits", "past_key_values"]
    bare = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, use_cache=False)
    assert (bare.scores, bare.logits, bare.past_key_values) == (None, None, None)
    assert json.loads(json.dumps(list(bare.keys()))) == ["sequences"]
