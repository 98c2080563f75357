"""Text to token ids and back: `AutoTokenizer.from_pretrained` and the `Tokenizer` it returns.

A thin layer over the tokenizers library with the call signatures of transformers. The pipeline comes from a
folder's tokenizer.json or from a GGUF file's metadata; chat templates are in `chat_template`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import tokenizers_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from .gguf import GGUFFile


class AutoTokenizer:
    """Finds out what kind of model a path holds and loads its tokenizer."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, a .gguf file, or a name that `tilewright pull` knows.

        Raises FormatError for files that break their format and ValueError for a path that does not exist.
        """
        from .folder_tokenizer import build
        from .gguf import GGUFFile
        from .pull import resolve

        path = resolve(path)
        if path.is_dir():
            return Tokenizer(**build(path))
        with GGUFFile(path) as file:
            return Tokenizer.from_gguf(file)


class BatchEncoding(dict[str, Any]):
    """A dict of `input_ids` and `attention_mask` whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}, only {', '.join(self)}") from None

    def to(self, device: Any) -> BatchEncoding:
        """Its tensors on `device`; entries that are lists stay as they are."""
        return BatchEncoding({key: value.to(device) if hasattr(value, "to") else value for key, value in self.items()})


class Tokenizer:
    """Encodes and decodes text.

    `bos_token`, `eos_token`, `pad_token` and `unk_token` are the special tokens (str or None; assignable, as
    in `tok.pad_token = tok.eos_token`), each with its `..._id`. `eos_token_ids` is the set of all ids that
    end a turn. `chat_template` holds the named Jinja sources, the usual one under "default".
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: Mapping[str, str] | None = None,
        unused_ids: frozenset[int] = frozenset(),
    ) -> None:
        # A tokenizer.json may ask for both; here the caller does.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._unused_ids = unused_ids
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.unk_token = unk_token
        self.eos_token_ids = set(eos_token_ids)
        self.chat_template = dict(chat_template or {})

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer in an open GGUF file's metadata; for a caller that has the file open anyway."""
        from .gguf_tokenizer import build

        return cls(**build(file))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder (created if need be), for `from_pretrained` here
        and in transformers. Which ids beside `eos_token_id` end a turn is for generation_config.json to say."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        templates = self.chat_template
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_tokens(),
        }
        if templates.keys() == {"default"}:
            config["chat_template"] = templates["default"]
        elif templates:
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        self._backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # --- vocabulary ---

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary proper, without those added on top of it."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, bos={self.bos_token!r}, eos={self.eos_token!r})"

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        return self._id(self.unk_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the list of ids of several; unk_token_id for what is no token."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of an id or the tokens of several, as the vocabulary spells them; None for no token."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(index) for index in _ids(ids)]

    # --- text to ids ---

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens spelled out in the text become their ids.

        add_special_tokens: also put the model's BOS and EOS tokens where it wants them.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: expected text to be str, got {type(text).__name__}")
        with tokenizers_errors(lambda err: _encode_error(text, err)):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        padding_side: str = "left",
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask` of one text or of several.

        padding: True or "longest" fills up to the longest text with pad_token_id (mask 0), on padding_side.
        return_tensors: None for lists, "pt" for int64 tensors (batch, seq), "np" for arrays; one text makes
        a flat list or a batch of one.
        """
        if isinstance(text, str):
            rows = [self.encode(text, add_special_tokens)]
        elif isinstance(text, (list, tuple)) and text:
            rows = [self.encode(item, add_special_tokens) for item in text]
        else:
            raise ValueError(f"tokenizer: expected text to be str or a list of at least one str, got {text!r}")
        return self._batch(rows, isinstance(text, str), padding, padding_side, return_tensors)

    def _batch(
        self,
        rows: list[list[int]],
        single: bool,
        padding: bool | str,
        padding_side: str,
        return_tensors: str | None,
    ) -> BatchEncoding:
        if padding not in (True, False, "longest", "do_not_pad"):
            raise ValueError(f"tokenizer: padding must be True, 'longest', False or 'do_not_pad', got {padding!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"tokenizer: padding_side must be 'left' or 'right', got {padding_side!r}")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"tokenizer: return_tensors must be None, 'pt' or 'np', got {return_tensors!r}")
        masks = [[1] * len(row) for row in rows]
        longest = max(map(len, rows))
        if padding in (True, "longest") and any(len(row) < longest for row in rows):
            pad = self.pad_token_id
            if pad is None:
                raise ValueError(
                    "tokenizer: padding needs a pad token, there is none; set tok.pad_token = tok.eos_token"
                )
            left = padding_side == "left"
            rows = [_filled(row, longest, pad, left) for row in rows]
            masks = [_filled(mask, longest, 0, left) for mask in masks]
        if return_tensors is None:
            return BatchEncoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)
        if len(set(map(len, rows))) > 1:
            raise ValueError(
                f"tokenizer: return_tensors={return_tensors!r} needs rows of one length; pass padding=True"
            )
        make = _tensor if return_tensors == "pt" else _array
        return BatchEncoding(input_ids=make(rows), attention_mask=make(masks))

    # --- ids to text ---

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids (an int, a sequence, or a one-dimensional tensor).

        Bytes that do not make UTF-8 become U+FFFD, so a text that ends in U+FFFD may just lack a token. Ids
        without a token are left out, as are those that the file marks as unused.
        """
        ids = [index for index in _ids(ids) if index not in self._unused_ids]
        with tokenizers_errors(lambda err: ValueError(f"decode: the tokenizer failed on these ids: {err}")):
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    # --- conversations ---

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        padding: bool | str = False,
        padding_side: str = "left",
        return_tensors: str | None = None,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """The prompt for a list of messages ({"role": ..., "content": ...}), or for a batch of such lists.

        Returns a BatchEncoding; its input_ids alone with return_dict=False; the text with tokenize=False.
        add_generation_prompt: end with the header of the assistant's answer. continue_final_message: leave
        the last message open, for the model to go on with. chat_template: a name among those of the model, or
        a Jinja source. tools, documents: lists of JSON objects for the template, as are further `variables`.
        Raises ValueError without a template, or when the template fails or refuses the conversation.
        """
        from .chat_template import plain, render_chat

        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"apply_chat_template: expected a list of messages, got {conversation!r}")
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "apply_chat_template: continue_final_message and add_generation_prompt exclude each other; "
                "the one goes on with the last message, the other begins a new one"
            )
        source = self._template(chat_template, tools is not None)
        single = not isinstance(conversation[0], (list, tuple))
        shared = self._special_tokens() | plain(variables, "variables")
        shared |= {"tools": plain(tools, "tools"), "documents": plain(documents, "documents")}
        shared["add_generation_prompt"] = add_generation_prompt
        texts = [
            render_chat(source, chat, shared, continue_final_message)
            for chat in ([conversation] if single else conversation)
        ]
        if not tokenize:
            return texts[0] if single else texts
        rows = [self.encode(text, add_special_tokens=False) for text in texts]
        batch = self._batch(rows, single, padding, padding_side, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def _template(self, wanted: str | None, with_tools: bool) -> str:
        if wanted is not None:
            return self.chat_template.get(wanted, wanted)
        if with_tools and "tool_use" in self.chat_template:
            return self.chat_template["tool_use"]
        if "default" in self.chat_template:
            return self.chat_template["default"]
        names = ", ".join(self.chat_template) or "none"
        raise ValueError(
            f"apply_chat_template: expected a default chat template, the model brings {names}; pass "
            "chat_template=NAME or a Jinja source, or encode a prompt that you have written out yourself"
        )

    def _special_tokens(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _ids(ids: Any) -> list[int]:
    """A flat list of ints from an int, a sequence, a tensor or an array."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, int):
        ids = [ids]
    ids = [item.__index__() if hasattr(item, "__index__") else item for item in ids]
    for item in ids:
        if not isinstance(item, int):
            raise TypeError(f"decode: expected a flat list of ids, got {item!r} in it; see batch_decode for rows")
        if not 0 <= item < 1 << 32:
            raise ValueError(f"decode: expected ids from 0 to 2^32 - 1, got {item}")
    return ids


def _encode_error(text: str, err: BaseException) -> ValueError:
    for index, char in enumerate(text):
        if "\ud800" <= char <= "\udfff":
            return ValueError(
                f"encode: expected text that UTF-8 can hold, got the surrogate {char!r} at {index}; decode the input "
                "with errors='replace'"
            )
    return ValueError(f"encode: the tokenizer failed on this text: {err}")


def _filled(row: list[int], length: int, value: int, left: bool) -> list[int]:
    padding = [value] * (length - len(row))
    return padding + row if left else row + padding


def _tensor(rows: list[list[int]]) -> Any:
    import torch

    return torch.tensor(rows, dtype=torch.int64)


def _array(rows: list[list[int]]) -> Any:
    import numpy as np

    return np.array(rows, dtype=np.int64)
