"""Stop strings, text as it comes, and streamers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright import AutoTokenizer, TextStreamer
from tilewright.generation.stopping import StopStrings
from tilewright.generation.streamers import IncrementalDecoder
from tilewright.io.pull import pull


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pull("smollm2"))


def test_stop_strings(tokenizer: Any) -> None:
    def stops(strings: list[str], text: str) -> int | None:
        criterion = StopStrings(strings, tokenizer)
        ids = tokenizer.encode(text)
        for end in range(1, len(ids) + 1):
            if criterion(torch.tensor([ids[:end]]), None)[0]:
                return end
        return None

    for strings, text in [
        (["stop"], "please stop here"),
        (["top"], "a stopper"),
        (["e, i"], "wait here, inside"),
        (["\n\n"], "one\n\ntwo"),
        (["没有"], "这里没有人"),
        (["😀"], "smile 😀 now"),
        (["<|im_end|>"], "bye<|im_end|>\n"),
    ]:
        end = stops(strings, text)
        assert end is not None, (strings, text)
        ids = tokenizer.encode(text)
        assert strings[0] in tokenizer.decode(ids[:end])
        assert strings[0] not in tokenizer.decode(ids[: end - 1])
    assert stops(["absent"], "nothing of the kind") is None


def test_stop_strings_agree_with_transformers(tokenizer: Any) -> None:
    import transformers

    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    text = Path(__file__).read_text()[:1500]
    ids = tokenizer.encode(text)
    for strings in (["the"], ["import t", "def "], ["):\n"]):
        theirs = transformers.StopStringCriteria(wrapped, strings)
        ours = StopStrings(strings, tokenizer)
        for end in range(1, len(ids), 3):
            row = torch.tensor([ids[:end]])
            assert ours(row, None).item() == theirs(row, None).item(), (strings, tokenizer.decode(ids[:end][-5:]))


def test_stop_strings_in_generate(models: tuple[Any, Any], tokenizer: Any) -> None:
    model, _ = models
    ids = tiny.prompts(2, 4)
    free = model.generate(ids, max_new_tokens=10, min_new_tokens=10)
    stop = tokenizer.decode(free[0, 6:8])
    out = model.generate(ids[:1], max_new_tokens=10, stop_strings=stop, tokenizer=tokenizer)
    assert out.shape[1] <= 8
    assert stop in tokenizer.decode(out[0])


class Bytes:
    """A tokenizer whose ids are bytes: every character of several bytes comes in pieces."""

    @staticmethod
    def decode(ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


class Fallback:
    """Like byte fallback in the tokenizers library: a run of bytes is one text, or all of it is undecodable."""

    @staticmethod
    def decode(ids: list[int], **_: Any) -> str:
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.integers(1, 3))
def test_incremental_decoding_keeps_characters_whole(text: str, step: int) -> None:
    data = list(text.encode())
    # Byte fallback has one byte a token, so each character is complete once.
    for tokenizer, stride in ((Bytes, step), (Fallback, 1)):
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.push(data[i : i + stride]) for i in range(0, len(data), stride)]
        assert "".join(pieces) + decoder.finish() == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_incremental_decoding_of_any_bytes(data: bytes) -> None:
    decoder = IncrementalDecoder(Bytes)
    text = "".join(decoder.push([byte]) for byte in data) + decoder.finish()
    assert text == data.decode(errors="replace")


def test_incremental_decoding_of_the_real_tokenizer(tokenizer: Any) -> None:
    for text in ("Grüße, 世界! 👩‍👩‍👧 naïve", "  two  spaces\n\n\ttab", "<|im_start|>user\nhi<|im_end|>", ""):
        ids = tokenizer.encode(text)
        for skip in (True, False):
            decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
            pieces = [decoder.push([token]) for token in ids]
            assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_streamers(models: tuple[Any, Any], tokenizer: Any, capsys: pytest.CaptureFixture) -> None:
    model, _ = models
    ids = tiny.prompts(1, 4)
    out = model.generate(ids, max_new_tokens=9, min_new_tokens=9)[0]

    model.generate(ids, max_new_tokens=9, min_new_tokens=9, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(out) + "\n"
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    for _ in range(2):  # a streamer can be used again
        model.generate(ids, max_new_tokens=9, min_new_tokens=9, streamer=streamer)
        assert capsys.readouterr().out == tokenizer.decode(out[4:]) + "\n"

    received: list[Any] = []
    model.generate(ids, max_new_tokens=9, min_new_tokens=9, streamer=received.append)
    assert received == [[token] for token in out[4:].tolist()]
    received.clear()
    model.generate(ids, max_new_tokens=9, min_new_tokens=9, streamer=received.append, tokenizer=tokenizer)
    assert "".join(received) == tokenizer.decode(out[4:], skip_special_tokens=True)
    received.clear()
    batch = model.generate(tiny.prompts(3, 4), max_new_tokens=3, min_new_tokens=3, streamer=received.append)
    assert received == batch[:, 4:].T.tolist()
    with pytest.raises(ValueError, match="one sequence"):
        model.generate(tiny.prompts(3, 4), max_new_tokens=3, streamer=TextStreamer(tokenizer))


def test_transformers_streamer(models: tuple[Any, Any], tokenizer: Any, capsys: pytest.CaptureFixture) -> None:
    import transformers

    model, _ = models
    model.generate(tiny.prompts(1, 4), max_new_tokens=5, streamer=transformers.TextStreamer(tokenizer))
    assert capsys.readouterr().out.endswith("\n")
