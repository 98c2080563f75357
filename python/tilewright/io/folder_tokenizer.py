"""The tokenizer of a Hugging Face folder: tokenizer.json for the pipeline, the files beside it for the rest.

tokenizer_config.json names the special tokens and may hold chat templates; special_tokens_map.json counts
where an old tokenizer_config.json lacks `added_tokens_decoder`; chat_template.jinja and
additional_chat_templates/ override the configuration. These are transformers' rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, tokenizers_errors
from .folder import read_json
from .gguf_tokenizer import set_template

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def build(folder: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer` from a folder. FormatError names the file that is missing or wrong."""
    backend = _pipeline(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").is_file():
        config |= read_json(folder / "special_tokens_map.json")

    special = {key: _text(path, key, value) for key, value in config.items() if _is_special(key, value)}
    backend.add_tokens(_added_tokens(path, config))
    backend.add_special_tokens([*special.values(), *_extra_tokens(path, config)])
    if backend.post_processor is None:
        # Where tokenizer.json says it, that counts; these keys are what is left when it does not.
        bos = special.get("bos_token") if config.get("add_bos_token") is True else None
        eos = special.get("eos_token") if config.get("add_eos_token") is True else None
        set_template(backend, bos, eos)
    return {
        "backend": backend,
        "bos_token": special.get("bos_token"),
        "eos_token": special.get("eos_token"),
        "pad_token": special.get("pad_token"),
        "unk_token": special.get("unk_token"),
        "eos_token_ids": _ends(folder, backend, special.get("eos_token")),
        "chat_template": _chat_templates(folder, path, config),
    }


def _pipeline(path: Path) -> Backend:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise FormatError(
            path.parent,
            path.name,
            "expected a tokenizer in this file, it is missing; transformers writes it: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIR)",
        )
    with tokenizers_errors(lambda err: FormatError(path, "file", f"expected a tokenizer.json, got an error: {err}")):
        backend = Tokenizer.from_file(str(path))
        # Parts that do not fit each other show when they are used.
        backend.decode(backend.encode("Say 1 é\n👍").ids)
        return backend


def _is_special(key: str, value: Any) -> bool:
    return key.endswith("_token") and isinstance(value, (str, dict)) and bool(value)


def _text(path: Path, key: str, value: Any) -> str:
    """The text of a token that a configuration gives as a string or as an object with flags."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise FormatError(path, key, f"expected a token as a string or an object with content, got {value!r:.80}")
    return text


def _added_tokens(path: Path, config: dict[str, Any]) -> list[AddedToken]:
    from tokenizers import AddedToken

    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise FormatError(path, "added_tokens_decoder", "expected an object of tokens by id, got something else")
    tokens = []
    for index in sorted(entries, key=lambda index: int(index) if index.isdecimal() else 0):
        entry = entries[index]
        flags = {flag: entry[flag] is True for flag in _FLAGS if flag in entry}
        tokens.append(AddedToken(_text(path, f"added_tokens_decoder[{index}]", entry), **flags))
    return tokens


def _extra_tokens(path: Path, config: dict[str, Any]) -> list[str]:
    key = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    extra = config.get(key) or []
    if not isinstance(extra, (list, dict)):
        raise FormatError(path, key, f"expected a list or an object of tokens, got {extra!r:.80}")
    return [_text(path, key, value) for value in (extra.values() if isinstance(extra, dict) else extra)]


def _ends(folder: Path, backend: Backend, eos_token: str | None) -> set[int]:
    """The ids that end a turn: the EOS token and what generation_config.json lists."""
    path = folder / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = listed if isinstance(listed, list) else [listed]
    ids = [*ids, None if eos_token is None else backend.token_to_id(eos_token)]
    if not all(index is None or type(index) is int for index in ids):
        raise FormatError(path, "eos_token_id", f"expected an id or a list of ids, got {listed!r:.80}")
    return {index for index in ids if index is not None}


def _chat_templates(folder: Path, path: Path, config: dict[str, Any]) -> dict[str, str]:
    templates = config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if isinstance(templates, list):
        templates = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    if not isinstance(templates, dict) or not all(
        isinstance(text, str) for entry in templates.items() for text in entry
    ):
        raise FormatError(path, "chat_template", "expected a string or a list of {name, template}, got something else")
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            try:
                templates[name] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as err:
                raise FormatError(file, "file", f"expected UTF-8 text, got an error: {err}") from None
    return templates
