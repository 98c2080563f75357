"""The tokenizer that a GGUF file describes in its metadata, as a pipeline of the tokenizers library.

Two kinds: `gpt2`, byte-level pair merging with the word rule that `tokenizer.ggml.pre` names, and `llama`,
SentencePiece's merging by score with single bytes for what the vocabulary lacks. The choices follow
llama.cpp, which defines the keys: with special tokens parsed, both give the same ids.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import FormatError, tokenizers_errors
from .pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from .gguf import GGUFFile

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # SentencePiece's mark for a space
# Tokens that end a turn whatever the metadata says: it names at most three, and some converters left them
# with the type of ordinary text. From llama.cpp's list.
_TURN_ENDS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
}


def build(file: GGUFFile) -> dict[str, Any]:
    """The arguments of `Tokenizer` from an open file's metadata; FormatError names a missing or wrong key."""
    keys = _Keys(file)
    model = keys.get("model", str)
    if model not in ("gpt2", "llama"):
        raise keys.error("model", f"expected 'gpt2' or 'llama', the kinds supported so far, got {model!r}")
    tokens = keys.strings("tokens")
    if not tokens:
        raise keys.error("tokens", "expected at least one token, got none")
    # A few converters leave gaps; llama.cpp names them like this.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise keys.error("tokens", f"expected {len(tokens)} different tokens, got {len(vocab)}")
    types = keys.numbers("token_type", len(tokens), _NORMAL)
    turn_ends = {vocab[token] for token in _TURN_ENDS & vocab.keys()}
    types = [_CONTROL if index in turn_ends else kind for index, kind in enumerate(types)]

    make = _byte_level if model == "gpt2" else _by_score
    with (
        tokenizers_errors(
            lambda err: keys.error("merges", f"expected merges that fit the vocabulary, got an error: {err}")
        ),
        _collector_paused(),
    ):
        backend, add_bos = make(keys, vocab, tokens, types)
    _add_tokens(backend, tokens, types)

    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {name: keys.token_id(name, len(tokens), defaults.get(name)) for name in _SPECIAL}
    add_bos = keys.get("add_bos_token", bool, add_bos) and ids["bos"] is not None
    add_eos = keys.get("add_eos_token", bool, False) and ids["eos"] is not None

    def text(name: str) -> str | None:
        index = ids[name]
        return None if index is None else tokens[index]

    set_template(backend, text("bos") if add_bos else None, text("eos") if add_eos else None)
    return {
        "backend": backend,
        "bos_token": text("bos"),
        "eos_token": text("eos"),
        "unk_token": text("unknown"),
        "pad_token": text("padding"),
        "eos_token_ids": turn_ends | {ids[name] for name in ("eos", "eot", "eom")} - {None},
        "chat_template": _chat_templates(keys),
        "unused_ids": frozenset(index for index, kind in enumerate(types) if kind == _UNUSED),
    }


_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """The pairs of the merges are so many new tuples that the collector would walk torch's heap: 70 ms of 160."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def set_template(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Make the pipeline put `bos` before and `eos` after each text; None leaves that end alone."""
    from tokenizers.processors import TemplateProcessing

    # The template's own names, because a token's text may hold the template's punctuation.
    ends = {name: token for name, token in (("bos", bos), ("eos", eos)) if token is not None}
    backend.post_processor = TemplateProcessing(
        single=["bos"] * ("bos" in ends) + ["$A"] + ["eos"] * ("eos" in ends),
        special_tokens=[
            {"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]} for name, token in ends.items()
        ],
    )


def _byte_level(keys: _Keys, vocab: dict[str, int], tokens: list[str], types: list[int]) -> tuple[Backend, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = keys.get("pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise keys.error("pre", f"expected one of {', '.join(PRE_TOKENIZERS)}, got the unknown {name!r}")
    rule = PRE_TOKENIZERS[name]
    # The separator is the first space after the first character, since a token may begin with one.
    merges = []
    for line in keys.strings("merges"):
        left, space, right = line[1:].partition(" ")
        if not space:
            raise keys.error("merges", f"expected two tokens with a space between them, got {line[:80]!r}")
        merges.append((line[0] + left, right))
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


def _by_score(keys: _Keys, vocab: dict[str, int], tokens: list[str], types: list[int]) -> tuple[Backend, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = keys.numbers("scores", len(tokens), 0.0)
    if not all(map(math.isfinite, scores)):
        raise keys.error("scores", "expected finite numbers, got an infinity or NaN")
    unk = tokens[keys.token_id("unknown", len(tokens), 0) or 0]
    merges = _merges(vocab, tokens, types, scores)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = keys.get("add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend, True


def _merges(vocab: dict[str, int], tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges two neighbours whenever their union is a token, the best score first.

    The library wants that as ranked pairs: every way to cut a token into two tokens, by falling score.
    """
    words = [index for index, kind in enumerate(types) if kind not in (_UNKNOWN, _CONTROL, _BYTE)]
    words.sort(key=lambda index: -scores[index])
    return [
        (token[:cut], token[cut:])
        for token in map(tokens.__getitem__, words)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def _add_tokens(backend: Backend, tokens: list[str], types: list[int]) -> None:
    """Tokens that are cut out of the text before all else; a decode can leave the control tokens out."""
    from tokenizers import AddedToken

    special = (_UNKNOWN, _CONTROL)
    backend.add_tokens(
        [
            AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in special or kind == _USER_DEFINED
        ]
    )


def _chat_templates(keys: _Keys) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    return {
        key[len(prefix) + 1 :] or "default": value
        for key, value in keys.metadata.items()
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
    }


class _Keys:
    """Typed access to the `tokenizer.ggml.` keys of one file."""

    def __init__(self, file: GGUFFile) -> None:
        self.path, self.metadata = file.path, file.metadata

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise self.error(key, "expected this key, the file lacks it")
        if type(value) is not kind:
            raise self.error(key, f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not all(type(value) is str for value in values):
            raise self.error(key, "expected a list of strings, got a list of something else")
        return values

    def numbers(self, key: str, count: int, default: float) -> list[Any]:
        values = self.get(key, list, [default] * count)
        if len(values) != count or not all(type(value) in (int, float) for value in values):
            raise self.error(key, f"expected {count} numbers, one for each token, got {len(values)} values")
        return values

    def token_id(self, name: str, count: int, default: int | None) -> int | None:
        key = f"{name}_token_id"
        if f"tokenizer.ggml.{key}" not in self.metadata:
            return default if default is not None and default < count else None
        value = self.get(key, int)
        if not 0 <= value < count:
            raise self.error(key, f"expected a token id below {count}, got {value}")
        return value

    def error(self, key: str, problem: str) -> FormatError:
        return FormatError(self.path, f"tokenizer.ggml.{key}", problem)
