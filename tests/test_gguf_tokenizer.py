"""Tokenizers from GGUF metadata: token types, merges by rank and by score, metadata that is wrong."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tilewright.io.errors import FormatError
from tilewright.io.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


class Meta:
    """Stands for an open GGUF file: only its path and its tokenizer keys."""

    path = Path("model.gguf")

    def __init__(self, **keys: Any) -> None:
        self.metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def byte_level(**changes: Any) -> Meta:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<pad>", "<tool>", "[gap]", *alphabet, "ab", "Ġab"]
    types = [CONTROL, CONTROL, CONTROL, USER, UNUSED] + [NORMAL] * (len(tokens) - 5)
    keys: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types}
    keys |= {"merges": ["a b", "Ġ ab"], "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2}
    return Meta(**(keys | changes))


def by_score(**changes: Any) -> Meta:
    words = ["\u2581", "a", "b", "c", "ab", "abc", "bc", "\u2581a", "\u2581ab", "\u2581\u2581", "日"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<user>", "  "]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words) + [USER, USER]
    scores = [0.0] * 259 + [-9, -9, -9, -9, -2, -4, -1, -3, -5, -6, -9, 0, 0]
    keys: dict[str, Any] = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    return Meta(**(keys | changes))


def made(meta: Meta) -> Tokenizer:
    return Tokenizer.from_gguf(meta)  # type: ignore[arg-type]


def test_byte_level_token_types() -> None:
    tok = made(byte_level())
    assert tok.convert_ids_to_tokens(tok.encode("ab ab")) == ["ab", "Ġab"]
    assert tok.convert_ids_to_tokens(tok.encode("a<s>b<tool>[gap]")) == ["a", "<s>", "b", "<tool>", *"[gap]"]
    ids = tok.convert_tokens_to_ids(["<s>", "a", "<tool>", "[gap]"])
    assert tok.decode(ids) == "<s>a<tool>"
    assert tok.decode(ids, skip_special_tokens=True) == "a<tool>"


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({}, [260]),
        ({"add_bos_token": True}, [0, 260]),
        ({"add_eos_token": True}, [260, 1]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 260, 1]),
        ({"pre": "llama-bpe"}, [0, 260]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [260]),
        ({"pre": None}, [260]),
        ({"add_bos_token": True, "bos_token_id": None}, [260]),
    ],
)
def test_bos_and_eos(keys: dict[str, Any], ids: list[int]) -> None:
    tok = made(byte_level(**keys))
    first = tok.convert_tokens_to_ids("ab") - 260
    assert tok.encode("ab") == [index + first if index == 260 else index for index in ids]
    assert tok.encode("ab", add_special_tokens=False) == [260 + first]


def test_turn_ends() -> None:
    tokens = byte_level().metadata["tokenizer.ggml.tokens"]
    tok = made(byte_level(tokens=["<s>", "</s>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", *tokens[5:]]))
    assert tok.eos_token_ids == {1, 2, 3, 4}
    assert made(byte_level(eot_token_id=3, eom_token_id=2)).eos_token_ids == {1, 2, 3}


def test_invalid_utf8_decodes_to_u_fffd() -> None:
    tok = made(byte_level())
    ids = tok.convert_tokens_to_ids(["a", "Ã", "b", "ð", "Ł"])  # bytes 61 C3 62 F0 9F
    assert tok.decode(ids) == "a\ufffdb\ufffd"


def twin(text: str, meta: Meta) -> list[int]:
    """SentencePiece's merging, slow and plain: join the pair with the best score, the leftmost of equals, and again."""
    tokens, scores = meta.metadata["tokenizer.ggml.tokens"], meta.metadata["tokenizer.ggml.scores"]
    index = {token: position for position, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [(scores[index[a + b]], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in index]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [index[part]] if part in index else [index[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("aabbc日本é👍\n "), max_size=30).filter(lambda text: "  " not in text))
def test_scores_merge_as_in_sentencepiece(text: str) -> None:
    tok = made(by_score())
    assert tok.encode(text, add_special_tokens=False) == twin(text, by_score())
    assert tok.decode(tok.encode(text), skip_special_tokens=True) == text


def test_by_score_details() -> None:
    tok = made(by_score())
    assert (tok.bos_token, tok.eos_token, tok.unk_token) == ("<s>", "</s>", "<unk>")  # the ids of the original
    assert tok.encode("") == [1]
    tokens = tok.convert_ids_to_tokens
    assert tokens(tok.encode("abc")) == ["<s>", "\u2581a", "bc"]
    assert tokens(tok.encode("é", add_special_tokens=False)) == ["\u2581", "<0xC3>", "<0xA9>"]
    # User-defined tokens are cut out first, and each piece of text between gets its space.
    assert tokens(tok.encode("a<user>a  a", False)) == ["\u2581a", "<user>", "\u2581a", "  ", "\u2581a"]
    assert tokens(made(by_score(add_space_prefix=False)).encode("ab", False)) == ["ab"]
    assert made(by_score(add_bos_token=False, add_eos_token=True)).encode("a") == [*tok.encode("a", False), 2]
    ids = tok.convert_tokens_to_ids(["\u2581a", "<0xE6>", "<0x97>", "b"])
    assert tok.decode(ids) == "a\ufffd\ufffdb"
    assert tok.decode(tok.convert_tokens_to_ids(["<0xE6>", "<0x97>", "<0xA5>"])) == "日"
    # "<0x41>" spelled out in a text is text.
    assert tok.decode(tok.encode("<0x41>", False)) == "<0x41>"
    assert len(tok.encode("<0x41>", False)) == 7


BAD_KEYS: dict[str, tuple[Meta, str]] = {
    "no model": (Meta(), r"tokenizer.ggml.model: expected this key"),
    "other model": (byte_level(model="t5"), r"model: expected 'gpt2' or 'llama', .* got 't5'"),
    "model type": (byte_level(model=3), r"model: expected str, got int"),
    "unknown pre": (byte_level(pre="newest"), r"pre: expected one of default, .*got the unknown 'newest'"),
    "no tokens": (byte_level(tokens=None), r"tokens: expected this key"),
    "empty tokens": (byte_level(tokens=[]), r"tokens: expected at least one token"),
    "tokens not text": (byte_level(tokens=[1, 2]), r"tokens: expected a list of strings"),
    "token twice": (byte_level(tokens=["a", "b", "a"]), r"tokens: expected 3 different tokens, got 2"),
    "types too short": (byte_level(token_type=[1]), r"token_type: expected 263 numbers, .* got 1"),
    "types not numbers": (byte_level(token_type=["1"] * 263), r"token_type: expected 263 numbers"),
    "no merges": (byte_level(merges=None), r"merges: expected this key"),
    "merge of one": (byte_level(merges=["ab"]), r"merges: expected two tokens with a space"),
    "merge unknown": (byte_level(merges=["x y"]), r"merges: expected merges that fit the vocabulary"),
    "bos beyond": (byte_level(bos_token_id=263), r"bos_token_id: expected a token id below 263, got 263"),
    "eos negative": (byte_level(eos_token_id=-1), r"eos_token_id: expected a token id below 263, got -1"),
    "eos text": (byte_level(eos_token_id="1"), r"eos_token_id: expected int, got str"),
    "add_bos number": (byte_level(add_bos_token=1), r"add_bos_token: expected bool, got int"),
    "scores too short": (by_score(scores=[1.0]), r"scores: expected 272 numbers"),
    "scores not finite": (by_score(scores=[float("nan")] * 272), r"scores: expected finite numbers"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_metadata_is_one_error(case: str) -> None:
    meta, message = BAD_KEYS[case]
    with pytest.raises(FormatError, match=message) as caught:
        made(meta)
    assert str(caught.value).startswith("model.gguf: tokenizer.ggml.")


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 7), st.text(max_size=3), st.floats()), max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(base=st.sampled_from([byte_level, by_score]), data=st.data())
def test_random_metadata(base: Any, data: st.DataObject) -> None:
    keys = [key.removeprefix("tokenizer.ggml.") for key in base().metadata]
    meta = base(**{data.draw(st.sampled_from(keys)): data.draw(ANYTHING) for _ in range(data.draw(st.integers(1, 2)))})
    try:
        tok = made(meta)
    except FormatError as err:
        assert str(err).startswith("model.gguf: tokenizer.ggml.")
    else:
        assert isinstance(tok.decode(tok.encode("ab <s>é")), str)


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"expected a default chat template, the model brings none; pass chat_template"
    ):
        made(byte_level()).apply_chat_template([{"role": "user", "content": "x"}])
