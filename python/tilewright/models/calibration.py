"""Texts for calibration and comparison, as windows of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tilewright.io.tokenizer import Tokenizer

_COMPARED = 4096
_SAMPLES = 128


def read_tokens(path: Path, tokenizer: Tokenizer) -> Tensor:
    """The tokens of a text file, int64 (n,), without special ones at its ends. Raises ValueError, OSError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got an error: {error}") from None
    if not text.strip():
        raise ValueError(f"{path}: expected a text, the file is empty")
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)


def windows(tokens: Tensor, prefix: list[int], seq_len: int) -> Tensor:
    """int64 (samples, seq_len): what the model expects before a text, ``prefix``, and the tokens that follow one
    another; a rest that fills no window is left out."""
    fresh = seq_len - len(prefix)
    if fresh < 1:
        raise ValueError(f"expected windows longer than the {len(prefix)} tokens before each text, got {seq_len}")
    filled = tokens[: len(tokens) // fresh * fresh].view(-1, fresh)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(filled), -1), filled], dim=1)


def calibration_windows(
    path: Path, tokenizer: Tokenizer, samples: int | None, seq_len: int, keep_rest: bool
) -> tuple[Tensor, Tensor | None]:
    """(windows spread evenly over the text in `path`, windows of its end to compare models on, or None).

    samples None: 128, or as many as there are; keep_rest: whether the end, an eighth or 4,096 tokens, is kept for the
    comparison. Raises ValueError for a text that is too short.
    """
    tokens, prefix = read_tokens(path, tokenizer), text_prefix(tokenizer)
    rest = max(min(_COMPARED, len(tokens) // 8), seq_len) if keep_rest else 0
    found = windows(tokens[: max(len(tokens) - rest, 0)], prefix, seq_len)
    least = samples or 1
    if len(found) < least:
        purpose = f"{least} windows of {seq_len}{' and a rest to compare on' if keep_rest else ''}"
        raise ValueError(
            f"{path}: expected at least {least * seq_len + rest} tokens for {purpose}, got {len(tokens)}; "
            "give a longer text, or fewer or shorter windows"
        )
    count = min(samples or _SAMPLES, len(found))
    chosen = torch.arange(count) * len(found) // count
    return found[chosen], windows(tokens[len(tokens) - rest :], prefix, seq_len) if keep_rest else None


def evaluation_windows(path: Path, tokenizer: Tokenizer, seq_len: int) -> Tensor:
    """Windows over the whole text in `path`; a shorter text is one window. Raises ValueError below 2 tokens."""
    tokens, prefix = read_tokens(path, tokenizer), text_prefix(tokenizer)
    if len(tokens) < 2:
        raise ValueError(f"{path}: expected at least 2 tokens to compare on, got {len(tokens)}")
    return windows(tokens, prefix, min(seq_len, len(prefix) + len(tokens)))


def text_prefix(tokenizer: Tokenizer) -> list[int]:
    """The token that the tokenizer puts before a text, if it does."""
    return [index for index in tokenizer.encode("")[:1] if index == tokenizer.bos_token_id]
