"""The tokenizer of the default model: against llama.cpp (pinned, and live where it is installed), and its arguments."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import GPL, TEXTS, shared_smollm2
from tokenizers import pre_tokenizers

from tilewright.io.gguf import GGUFFile
from tilewright.io.pretokenizers import PRE_TOKENIZERS
from tilewright.io.pull import pull
from tilewright.io.tokenizer import AutoTokenizer, Tokenizer

# Obtained from llama.cpp: llama_cpp.Llama(path, vocab_only=True).tokenize(text, add_bos=False, special=True)
PINNED = [
    ("", []),
    ("Hello, world!", [19556, 28, 905, 17]),
    ("\n\n  0.", [39892, 32, 30]),
    ("The year 2024, and 3.14159.", [504, 713, 216, 34, 32, 34, 36, 28, 284, 216, 35, 30, 33, 36, 33, 37, 41, 30]),
    ("  leading and   inner   spaces ", [216, 2899, 284, 256, 6210, 256, 5600, 216]),
    ("tabs\tand\r\nlines\n\n\n", [100, 7366, 197, 397, 201, 198, 5110, 16506]),
    ("don't DON'T we'll", [12420, 982, 422, 2154, 23, 68, 392, 3060]),
    (
        "def f(x):\n    return x**2 + 1  # ok",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 1232, 216, 33, 216, 907, 10907],
    ),
    ("naïve Straße Ωμέγα", [3546, 46494, 19144, 34878, 85, 5664, 119, 16674, 34075, 23098, 8998]),
    (
        "日本語 한국어 中文",
        [23274, 115, 40993, 179, 120, 248, 216, 33085, 246, 181, 130, 251, 183, 240, 129, 216, 28589, 29184],
    ),
    (
        "हिन्दी العربية",
        [4300, 134, 27011, 30658, 16525, 44757, 37189, 27819, 34966, 20602, 31462, 23339, 43463],
    ),
    (
        "👍🏽 👩\u200d👩\u200d👧 e\u0301",
        [
            10813,
            235,
            231,
            10813,
            233,
            138,
            15107,
            235,
            119,
            321,
            231,
            10813,
            235,
            119,
            321,
            231,
            10813,
            235,
            117,
            297,
            151,
            219,
        ],
    ),
    ("a\u00a0b\u3000c\u2028d", [81, 15442, 82, 12109, 218, 83, 321, 118, 84]),
    ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
    ("<|endoftext|><repo_name>x", [0, 3, 104]),
    ("HTTPServer __init__ ==", [8049, 33635, 10740, 2758, 2563, 890, 1758]),
    ("½ ⅷ ٣ ४ 一", [16738, 216, 173, 223, 132, 216, 164, 113, 216, 9310, 120, 216, 22924]),
    ("\x00\x7f\ufffd", [190, 217, 24211]),
]


@pytest.mark.parametrize(("text", "ids"), PINNED)
def test_smollm2_gives_the_ids_of_llama_cpp(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids) == text


def test_smollm2_on_a_long_text(smollm2: Tokenizer) -> None:
    text = GPL.read_text()
    if hashlib.sha256(text.encode()).hexdigest()[:16] != "3972dc9744f6499f":
        pytest.skip(f"{GPL} is not the copy whose ids are pinned")
    ids = smollm2.encode(text)
    assert len(ids) == 7639
    # from llama.cpp, as above
    assert hashlib.sha256(str(ids).encode()).hexdigest()[:16] == "ab93d973bcec225f"
    assert smollm2.decode(ids) == text


# SmolLM2's vocabulary lacks a few bytes, which every implementation then drops: control characters, and those that
# begin the planes from U+40000 on.
HELD = st.characters(codec="utf-8", exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF)


@settings(max_examples=200, deadline=None)
@given(text=st.text(HELD))
def test_smollm2_decodes_what_it_encodes(text: str) -> None:
    tok = shared_smollm2()
    assert tok.decode(tok.encode(text)) == text


def test_smollm2_special_tokens(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token, smollm2.bos_token_id) == ("<|im_start|>", 1)
    assert (smollm2.eos_token, smollm2.eos_token_id) == ("<|im_end|>", 2)
    assert (smollm2.pad_token_id, smollm2.unk_token_id) == (2, 0)
    assert smollm2.eos_token_ids == {0, 2}  # <|endoftext|> ends a text too
    assert smollm2.vocab_size == len(smollm2) == 49152
    assert smollm2.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert smollm2.convert_tokens_to_ids(["<|im_end|>", "Ġthe", "nonsense!"]) == [2, 260, 0]
    assert smollm2.convert_ids_to_tokens([2, 260, 60000]) == ["<|im_end|>", "Ġthe", None]
    assert smollm2.convert_ids_to_tokens(260) == "Ġthe"


def test_smollm2_chat(smollm2: Tokenizer) -> None:
    text = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert batch.input_ids == smollm2.encode(text)


def test_an_incomplete_character_decodes_to_u_fffd_until_its_last_byte_comes(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("ab👍🏽")
    shown = [smollm2.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    assert shown[-1] == "ab👍🏽"
    for text in shown[:-1]:
        assert "ab👍🏽".startswith(text.rstrip("\ufffd"))
    assert any(text.endswith("\ufffd") for text in shown)


# --- against llama.cpp where it is installed ---


def with_pre(folder: Path, pre: str) -> Path:
    """SmolLM2's vocabulary, without its weights, under another pre-tokenizer."""
    data = pull("smollm2", progress=False).read_bytes()
    end = data.index(struct.pack("<Q", 17) + b"token_embd.weight")
    old = struct.pack("<Q", 18) + b"tokenizer.ggml.pre" + struct.pack("<IQ", 8, 6)
    head, tail = data[:end].split(old + b"smollm")
    new = old[:-8] + struct.pack("<Q", len(pre)) + pre.encode()
    path = folder / f"{pre}.gguf"
    path.write_bytes(head[:8] + struct.pack("<Q", 0) + head[16:] + new + tail)
    return path


# Where llama.cpp itself only approximates the model's rule, texts it gets right: ASCII for the rules that look at
# letter case, no wide spaces for those whose list of CJK characters holds them.
APPROXIMATED = {"tekken": str.isascii, "gpt-4o": str.isascii}
APPROXIMATED |= dict.fromkeys(("deepseek-llm", "deepseek-coder"), lambda text: "\u3000" not in text)
RULES = list({rule: pre for pre, rule in reversed(PRE_TOKENIZERS.items())}.values())


@pytest.mark.parametrize("pre", RULES)
def test_every_pre_tokenizer_against_llama_cpp(tmp_path: Path, pre: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the second opinion, is not installed")
    path = with_pre(tmp_path, pre)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    mine = AutoTokenizer.from_pretrained(path)
    code = Path(__file__).read_text()
    for text in filter(APPROXIMATED.get(pre, bool), [*TEXTS, code, "".join(TEXTS), " \n \r\n \t  x" * 9]):
        assert mine.encode(text, False) == theirs.tokenize(text.encode(), add_bos=False, special=True), text[:80]


def test_smollm2_against_llama_cpp() -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, the second opinion, is not installed")
    path = pull("smollm2", progress=False)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    mine = AutoTokenizer.from_pretrained(path)
    for text in (*TEXTS, Path(__file__).read_text(), "".join(map(chr, range(1, 0xD800, 7)))):
        assert mine.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=True), text[:80]


# Pieces of one text under each rule; checked against llama.cpp by the tests above.
SAMPLE = "He's  HTTPServer x=123456\n\n 3.14 (e\u0301日本)"
PIECES = {
    "minicpm5": "He|'s| | HTTPServer| x|=|123|456|\n\n| |3|.|14| (|e|\u0301日本|)",
    "seed-coder": "He|'s| | HTTPServer| x|=|1|2|3|4|5|6|\n\n| |3|.|1|4| (|e|\u0301日本|)",
    "bailingmoe": "He|'s| | HTTPServer| x|=|1|2|3|4|5|6|\n\n| |3|.|1|4| (|e|\u0301日本|)",
    "viking": "He's| | HTTPServer| x=|1|2|3|4|5|6|\n\n| |3|.|1|4| (|e\u0301日本|)",
    "poro-chat": "He's| | HTTPServer| x=123456|\n\n| 3|.|14| (|e\u0301日本|)",
    "falcon": "He|'|s| | HTTPServer| x|=|123|456|\n\n| 3|.|14| |(|e|\u0301|日本|)",
    "deepseek-v3": "He|'s| | HTTPServer| x|=|123|456|\n\n| |3|.|14| (|e\u0301|日本|)",
    "deepseek-coder": "He|'|s| | HTTPServer| x|=|1|2|3|4|5|6|\n|\n| |3|.|1|4| (|e|\u0301|日本|)",
    "deepseek-llm": "He|'|s| | HTTPServer| x|=|123456|\n|\n| |3|.|14| (|e|\u0301|日本|)",
    "gpt-4o": "He's| | HTTPServer| x|=|123|456|\n\n| |3|.|14| (|e\u0301日本|)",
    "tekken": "He|'s| | HTTPServer| x|=|1|2|3|4|5|6|\n\n| |3|.|1|4| (|e\u0301日本|)",
    "qwen35": "He|'s| | HTTPServer| x|=|1|2|3|4|5|6|\n\n| |3|.|1|4| (|e\u0301日本|)",
    "qwen2": "He|'s| | HTTPServer| x|=|1|2|3|4|5|6|\n\n| |3|.|1|4| (|e|\u0301日本|)",
    "glm4": "He|'s| | HTTPServer| x|=|123|456|\n\n| |3|.|14| (|e|\u0301日本|)",
    "dbrx": "He|'s| | HTTPServer| x|=|123|456|\n\n| |3|.|14| (|e|\u0301日本|)",
    "llama3": "He|'s| | HTTPServer| x|=|123|456|\n\n| |3|.|14| (|e|\u0301日本|)",
    "smollm": "He|'s| | HTTPServer| x|=|1|2|3|4|5|6|\n\n |3|.|1|4| (|e|\u0301|日本|)",
    "gpt-2": "He|'s| | HTTPServer| x|=|123456|\n\n| 3|.|14| (|e|\u0301|日本|)",
    "default": "He|'|s| | HTTPServer| x|=|123|456|\n\n| |3|.|14| |(|e|\u0301|日本|)",
}


@pytest.mark.parametrize("pre", RULES)
def test_pieces_of_every_rule(pre: str) -> None:
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in PRE_TOKENIZERS[pre].patterns]
    pieces = [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(SAMPLE)]
    assert "|".join(pieces) == PIECES[pre]


# --- what a caller can get wrong ---


def test_rejected_arguments(smollm2: Tokenizer) -> None:
    for call, message in (
        (lambda: smollm2.encode(3), r"encode: expected text to be str, got int"),
        (
            lambda: smollm2.encode("a\ud800"),
            r"encode: expected text that UTF-8 can hold, got the surrogate '\\ud800' at 1",
        ),
        (lambda: smollm2([]), r"tokenizer: expected text to be str or a list of at least one str"),
        (lambda: smollm2({"a": 1}), r"tokenizer: expected text to be str or a list"),
        (lambda: smollm2("a", padding="max_length"), r"padding must be True, 'longest', False"),
        (lambda: smollm2("a", padding_side="top"), r"padding_side must be 'left' or 'right', got 'top'"),
        (lambda: smollm2("a", return_tensors="tf"), r"return_tensors must be None, 'pt' or 'np', got 'tf'"),
        (lambda: smollm2(["a", "a b c"], return_tensors="pt"), r"needs rows of one length; pass padding=True"),
        (lambda: smollm2.decode([[1, 2]]), r"decode: expected a flat list of ids"),
        (lambda: smollm2.decode("12"), r"decode: expected a flat list of ids"),
        (lambda: smollm2.decode([-1]), r"decode: expected ids from 0"),
        (lambda: smollm2.decode([2**40]), r"decode: expected ids from 0"),
        (lambda: smollm2.apply_chat_template([]), r"expected a list of messages"),
        (lambda: smollm2.apply_chat_template("hi"), r"expected a list of messages"),
        (lambda: smollm2.apply_chat_template(["hi"]), r"messages\[0\] must be a dict with role and content, got str"),
        (
            lambda: smollm2.apply_chat_template([{"role": "user", "content": object()}]),
            r"messages\[0\]\['content'\] must be JSON data .* got object",
        ),
        (
            lambda: smollm2.apply_chat_template([{"role": "user", "content": "x"}], tools=[print]),
            r"tools\[0\] must be JSON data .* pass tools as JSON schemas",
        ),
        (
            lambda: smollm2.apply_chat_template(
                [{"role": "user", "content": "x"}], add_generation_prompt=True, continue_final_message=True
            ),
            r"exclude each other",
        ),
        (
            lambda: smollm2.apply_chat_template([{"role": "user"}], continue_final_message=True),
            r"continue_final_message needs text in the last message",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_decode_takes_what_a_model_gives(smollm2: Tokenizer) -> None:
    for ids in (torch.tensor([19556, 28]), np.array([19556, 28]), (19556, 28), [torch.tensor(19556), 28]):
        assert smollm2.decode(ids) == "Hello,"
    assert smollm2.decode(19556) == smollm2.decode(torch.tensor(19556)) == "Hello"
    assert smollm2.decode([]) == ""
    assert smollm2.decode([49152, 19556, 99999]) == "Hello"  # ids of a padded embedding have no text


# --- cost ---


def test_importing_the_tokenizer_imports_nothing_heavy() -> None:
    code = (
        "import sys, tilewright.io.tokenizer, tilewright.io.pull, tilewright.io.folder, tilewright.io.gguf\n"
        "print([m for m in ('tokenizers', 'transformers', 'jinja2', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_from_gguf_serves_a_file_that_is_open(smollm2: Tokenizer) -> None:
    with GGUFFile(pull("smollm2", progress=False)) as file:
        assert Tokenizer.from_gguf(file).encode("a b") == smollm2.encode("a b")


def test_unknown_path() -> None:
    with pytest.raises(ValueError, match=r"model 'no-such-model': expected an existing file .*\(smollm2\)"):
        AutoTokenizer.from_pretrained("no-such-model")
