"""Text while it is being generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# Undecodable text at the end is held back, since the next token may complete its character. When this many
# characters or tokens pile up the bytes are simply invalid, and holding them any longer would only hide them.
_MAX_HELD = 16
_UNFINISHED = 3  # replacement characters that one unfinished character of 4 bytes can show


class IncrementalDecoder:
    """Turns token ids into text piece by piece, never through the middle of a character.

    The pieces joined are `tokenizer.decode` of all ids: each piece is what new tokens add to the decoded text
    of a short window, because a token's text can depend on the tokens before it.
    """

    def __init__(self, tokenizer: Any, **decode_kwargs: Any) -> None:
        self.tokenizer, self.decode_kwargs = tokenizer, decode_kwargs
        self.window: list[int] = []  # tokens whose text is out, for context, then the pending ones
        self.context = 0  # how many of the window's tokens are context
        self.sent = ""  # the window's text as far as it is out

    def push(self, ids: list[int]) -> str:
        """The text that `ids` complete; "" while a character is unfinished."""
        self.window.extend(ids)
        text = self._decode()
        held = len(text) - len(text.rstrip("\ufffd"))
        stuck = max(held, len(self.window) - self.context) > _MAX_HELD
        held = min(held, _UNFINISHED) if stuck else held
        # Bytes that follow a finished character may garble it until they are complete.
        if not text.startswith(self.sent) and not stuck:
            return ""
        piece = text[len(self.sent) : len(text) - held]
        if held:
            self.sent += piece
        elif piece:
            self.window = self.window[self.context :]
            self.context, self.sent = len(self.window), self._decode()
        return piece

    def finish(self) -> str:
        """What is still held back, as it is."""
        piece = self._decode()[len(self.sent) :]
        self.window, self.context, self.sent = [], 0, ""
        return piece

    def _decode(self) -> str:
        return self.tokenizer.decode(self.window, **self.decode_kwargs) if self.window else ""


class TextStreamer:
    """Prints text as it is generated; for `generate(..., streamer=)` with one prompt.

    tokenizer: anything with `decode(ids, **decode_kwargs)`; skip_prompt: leave the prompt out. Override
    `on_finalized_text(text, stream_end)` to do something else with the text than to print it.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self.decoder = IncrementalDecoder(tokenizer, **decode_kwargs)
        self.next_tokens_are_prompt = True

    def put(self, value: Tensor) -> None:
        """Take token ids, int64 (n,) or (1, n); the first call brings the prompt."""
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(
                f"TextStreamer: one sequence at a time, got a batch of {value.shape[0]}; "
                "pass a callable to receive the ids of a batch"
            )
        skip = self.skip_prompt and self.next_tokens_are_prompt
        self.next_tokens_are_prompt = False
        if not skip:
            text = self.decoder.push(value.flatten().tolist())
            if text:
                self.on_finalized_text(text)

    def end(self) -> None:
        """Print what is left, and a newline."""
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self.decoder.finish(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each new piece of text, once more with stream_end=True."""
        print(text, flush=True, end="\n" if stream_end else "")


class CallbackStreamer:
    """What `generate` makes of a plain callable: new ids go to it as list[int], one per row.

    With a tokenizer it gets str pieces instead (one sequence only). The prompt is not passed on.
    """

    def __init__(self, callback: Callable[[Any], Any], tokenizer: Any) -> None:
        self.callback = callback
        self.decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, skip_special_tokens=True)
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token per row, int64 (batch,)."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        ids = value.tolist()
        if self.decoder is None:
            self.callback(ids)
        elif len(ids) > 1:
            raise ValueError(
                f"generate: a callable streamer with tokenizer= streams one sequence, got {len(ids)}; "
                "leave tokenizer= out to receive token ids"
            )
        elif text := self.decoder.push(ids):
            self.callback(text)

    def end(self) -> None:
        """Pass on what is left."""
        if self.decoder is not None and (text := self.decoder.finish()):
            self.callback(text)


def as_streamer(streamer: Any, tokenizer: Any) -> Any:
    """An object with put and end, from the same or from a callable. Raises TypeError for anything else."""
    if streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end")):
        return streamer
    if callable(streamer):
        return CallbackStreamer(streamer, tokenizer)
    raise TypeError(f"generate: streamer must have put() and end(), or be callable, got {type(streamer).__name__}")
