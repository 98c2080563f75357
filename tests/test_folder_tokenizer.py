"""Tokenizers and chat templates from folders, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from smollm2 import GPL, TEXTS
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tilewright.io.errors import FormatError
from tilewright.io.tokenizer import AutoTokenizer, Tokenizer

CHAT = """{{ bos_token }}{% if tools %}
[TOOLS] {{ tools | tojson }}
{% endif %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("no role " ~ message.role) }}
    {%- endif %}
<|{{ message.role }}|>
{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{% if documents %}{% for d in documents %}{{ loop.index }}. {{ d.title }}{% endfor %}{% endif %}
{% set ns = namespace(count=0) %}{% for m in messages %}{% if m.role == "system" %}{% continue %}{% endif %}
{% set ns.count = ns.count + 1 %}{% endfor %}({{ ns.count }} {{ note }})
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [GPL.read_text(), *TEXTS] * 2


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A byte-level pair-merging tokenizer in the manner of Llama 3."""
    folder = tmp_path_factory.mktemp("byte")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    tok.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    tok.enable_padding(pad_id=2, pad_token="<|pad|>", length=100)  # must not show
    tok.enable_truncation(10)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "normalized": False},
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|user|>"],
        "added_tokens_decoder": {
            "0": {"content": "<|begin|>", "special": True, "normalized": False},
            "600": {"content": "<|tool|>", "special": False, "normalized": False},
            "601": {"content": "<|call|>", "special": True, "lstrip": True, "rstrip": True},
        },
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    return folder


@pytest.fixture(scope="module")
def score_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A SentencePiece-like tokenizer with byte fallback in the manner of Llama 2, with an old configuration."""
    folder = tmp_path_factory.mktemp("score")
    tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tok.train_from_iterator(
        [word for text in corpus[:1] for word in text.split()],
        trainers.BpeTrainer(vocab_size=600, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)]),
    )
    data = json.loads(tok.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": true, "add_eos_token": false}'
    )
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false, "rstrip": false, '
        '"normalized": false, "single_word": false}, "unk_token": "<unk>"}'
    )
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="module", params=["byte_folder", "score_folder"])
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(request.param)
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


SPECIAL_TEXTS = ["a<|begin|>b", "<|user|>hi <|call|> there<|tool|>", "<s>a</s> <unk>", "x <s> y", " <s>"]


def test_folder_encodes_and_decodes_like_transformers(both: tuple[Tokenizer, Any]) -> None:
    mine, theirs = both
    for text in TEXTS + SPECIAL_TEXTS:
        for special in (True, False):
            ids = mine.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
        for count in range(len(ids)):  # cut anywhere, also inside a character
            assert mine.decode(ids[:count]) == theirs.decode(ids[:count])
        assert mine.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    rows = [theirs.encode(text) for text in TEXTS]
    assert mine.batch_decode(rows, skip_special_tokens=True) == theirs.batch_decode(rows, skip_special_tokens=True)


def test_folder_special_tokens_like_transformers(both: tuple[Tokenizer, Any]) -> None:
    mine, theirs = both
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(mine, name) == getattr(theirs, name), name
        assert getattr(mine, f"{name}_id") == getattr(theirs, f"{name}_id"), name
    assert (mine.vocab_size, len(mine)) == (theirs.vocab_size, len(theirs))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_like_transformers(both: tuple[Tokenizer, Any], side: str) -> None:
    mine, theirs = both
    texts = ["one", "one two three", ""]
    if mine.pad_token is None:
        with pytest.raises(ValueError, match=r"set tok.pad_token = tok.eos_token"):
            mine(texts, padding=True)
        mine.pad_token = mine.eos_token
        theirs.pad_token = theirs.eos_token
    a = mine(texts, padding=True, padding_side=side, return_tensors="pt")
    b = theirs(texts, padding=True, padding_side=side, return_tensors="pt")
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a["attention_mask"], b["attention_mask"])
    assert a.input_ids.dtype == torch.int64
    assert mine(texts, padding="longest", padding_side=side).input_ids == a.input_ids.tolist()
    array = mine(texts, padding=True, padding_side=side, return_tensors="np").input_ids
    assert isinstance(array, np.ndarray) and array.tolist() == a.input_ids.tolist()


def test_call_shapes_like_transformers(both: tuple[Tokenizer, Any]) -> None:
    mine, theirs = both
    for text in ("one two", ["one two"], ["one", "two three"]):
        a, b = mine(text), theirs(text)
        assert dict(a) == {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}
    assert torch.equal(mine("one two", return_tensors="pt").input_ids, theirs("one two", return_tensors="pt").input_ids)
    assert mine("", return_tensors="pt", add_special_tokens=False).input_ids.shape == (1, 0)
    assert mine("a", return_tensors="pt").to("cpu").input_ids.device.type == "cpu"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"note": "n<b>", "tools": [{"type": "function", "function": {"name": "f", "description": "<&'é>"}}]},
        {"documents": [{"title": "T", "text": "x"}]},
        {"bos_token": "<other>"},
        {"chat_template": "{{ messages[0].content }}{{ eos_token }}"},
        {"continue_final_message": True},
        {
            "continue_final_message": True,
            "chat_template": "{% for m in messages %}{{ m.content.strip() }};{% endfor %}",
        },
    ],
)
def test_chat_templates_like_transformers(both: tuple[Tokenizer, Any], options: dict[str, Any]) -> None:
    mine, theirs = both
    chats: list[Any] = [
        [{"role": "user", "content": " Hi <there> "}],
        [
            {"role": "system", "content": "S", "name": None},
            {"role": "user", "content": "日本"},
            {"role": "assistant", "content": "An answer "},
        ],
    ]
    for chat in (*chats, chats):
        text = mine.apply_chat_template(chat, tokenize=False, **options)
        assert text == theirs.apply_chat_template(chat, tokenize=False, **options)
        batch = mine.apply_chat_template(chat, **options)
        other = theirs.apply_chat_template(chat, **options)
        assert dict(batch) == {"input_ids": other["input_ids"], "attention_mask": other["attention_mask"]}
        plain = mine.apply_chat_template(chat, return_dict=False, **options)
        assert plain == batch.input_ids
    tensors = mine.apply_chat_template(chats[0], return_tensors="pt", **options)
    assert tensors.input_ids.shape == (1, len(mine.apply_chat_template(chats[0], return_dict=False, **options)))


def test_folder_turn_ends(byte_folder: Path, score_folder: Path) -> None:
    assert AutoTokenizer.from_pretrained(byte_folder).eos_token_ids == {1, 5}
    assert AutoTokenizer.from_pretrained(score_folder).eos_token_ids == {2}


def test_the_configuration_rules_where_tokenizer_json_is_silent(tmp_path: Path, byte_folder: Path) -> None:
    data = json.loads((byte_folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    keys = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for bos, eos in ((False, False), (True, False), (True, True)):
        config = keys | {"add_bos_token": bos, "add_eos_token": eos}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tok = AutoTokenizer.from_pretrained(tmp_path)
        body = tok.encode("hello", add_special_tokens=False)
        assert tok.encode("hello") == [0] * bos + body + [1] * eos


def test_named_templates(tmp_path: Path, byte_folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_folder / "tokenizer.json").read_bytes())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    tok = AutoTokenizer.from_pretrained(tmp_path)

    def text(**options: Any) -> str:
        return tok.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, **options)

    assert (text(), text(tools=[{}]), text(chat_template="rag"), text(chat_template="{{1+1}}")) == ("D", "T", "R", "2")
    (tmp_path / "chat_template.jinja").write_text("F")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {"default": "F", "tool_use": "T", "rag": "R"}


BAD_FOLDERS: dict[str, tuple[dict[str, str | None], str]] = {
    "missing": ({"tokenizer.json": None}, r"tokenizer.json: expected a tokenizer in this file, it is missing"),
    "not JSON": ({"tokenizer.json": "{"}, r"tokenizer.json: file: expected a tokenizer.json, got an error"),
    "other JSON": ({"tokenizer.json": "[]"}, r"tokenizer.json: file: expected a tokenizer.json, got an error"),
    "model": ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, r"tokenizer.json: file: expected a tokenizer.json"),
    "config": ({"tokenizer_config.json": "nothing"}, r"tokenizer_config.json: file: expected valid JSON"),
    "token": ({"tokenizer_config.json": '{"eos_token": {"x": 1}}'}, r"eos_token: expected a token as a string or"),
    "empty token": (
        {"tokenizer_config.json": '{"eos_token": {"content": ""}}'},
        r"eos_token: expected a token as a string or",
    ),
    "added": ({"tokenizer_config.json": '{"added_tokens_decoder": [1]}'}, r"added_tokens_decoder: expected an object"),
    "added entry": (
        {"tokenizer_config.json": '{"added_tokens_decoder": {"7": {}}}'},
        r"added_tokens_decoder\[7\]: expected a token",
    ),
    "extra": ({"tokenizer_config.json": '{"extra_special_tokens": 3}'}, r"extra_special_tokens: expected a list"),
    "template": ({"tokenizer_config.json": '{"chat_template": 3}'}, r"chat_template: expected a string or a list"),
    "generation": ({"generation_config.json": '{"eos_token_id": "x"}'}, r"eos_token_id: expected an id or a list"),
}


def test_a_crash_inside_the_tokenizers_library_is_one_error(tmp_path: Path, byte_folder: Path) -> None:
    data = json.loads((byte_folder / "tokenizer.json").read_text())
    data["model"]["continuing_subword_prefix"] = "longer than any token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"tokenizer.json: file: expected a tokenizer.json, got an error"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_broken_folder_is_one_error(tmp_path: Path, byte_folder: Path, case: str) -> None:
    changes, message = BAD_FOLDERS[case]
    for file in byte_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, content in changes.items():
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(FormatError, match=message) as caught:
        AutoTokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
