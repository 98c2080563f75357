"""GenerationConfig: transformers' generation parameters, their defaults, and which of them work here."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.io.errors import FormatError

FILE_NAME = "generation_config.json"


class _Rule(NamedTuple):
    """A parameter that works: its default, and which values are allowed."""

    default: Any
    types: tuple[type, ...]
    allowed: Callable[[Any], bool]
    expected: str


def _flag(default: bool) -> _Rule:
    return _Rule(default, (bool,), lambda value: True, "True or False")


def _integer(default: int | None, least: int) -> _Rule:
    return _Rule(default, (int,), lambda value: value >= least, f"an integer of at least {least}")


def _number(default: float | None, allowed: Callable[[Any], bool], expected: str) -> _Rule:
    return _Rule(default, (float, int), allowed, expected)


def _ids(value: Any) -> bool:
    entries = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0 for entry in entries)


def _strings(value: Any) -> bool:
    entries = [value] if isinstance(value, str) else value
    return len(entries) > 0 and all(isinstance(entry, str) and entry for entry in entries)


_POSITIVE = (lambda value: 0 < value < float("inf"), "a positive number")
_RULES: dict[str, _Rule] = {
    "max_length": _integer(20, 1),
    "max_new_tokens": _integer(None, 1),
    "min_length": _integer(0, 0),
    "min_new_tokens": _integer(None, 0),
    "max_time": _number(None, *_POSITIVE),
    "stop_strings": _Rule(None, (str, list, tuple), _strings, "a non-empty string or a list of them"),
    "do_sample": _flag(False),
    "use_cache": _flag(True),
    "temperature": _number(1.0, _POSITIVE[0], "a positive number (for greedy decoding leave do_sample=False instead)"),
    "top_k": _integer(50, 0),
    "top_p": _number(1.0, lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "min_p": _number(None, lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "repetition_penalty": _number(1.0, *_POSITIVE),
    "num_return_sequences": _integer(1, 1),
    "output_scores": _flag(False),
    "output_logits": _flag(False),
    "return_dict_in_generate": _flag(False),
    "pad_token_id": _integer(None, 0),
    "bos_token_id": _integer(None, 0),
    "eos_token_id": _Rule(None, (int, list, tuple), _ids, "a token id or a list of token ids"),
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

# What transformers knows and this library does not do yet -> the values that ask for nothing, as None does.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "num_beams": (1,),
    "use_mtp": (False,),
    "cache_implementation": ("dynamic",),
    "cache_config": (),
    "max_cache_len": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "decoder_start_token_id": (),
    "is_assistant": (False,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (),
    "assistant_early_exit": (),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "compile_config": (),
    "disable_compile": (False, True),
    "continuous_batching_config": (),
    "low_memory": (False,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "prefill_chunk_size": (),
}
PARAMETERS = frozenset(_RULES) | frozenset(_NOT_YET)


class GenerationConfig:
    """Parameters of `generate`, under transformers' names; None stands for "not set".

    What is not set is taken from the model's own configuration, then from transformers' defaults. Values are
    checked here and again by `generate`, since attributes may be assigned in between. `extra` keeps entries
    of a generation_config.json that are not parameters, so that saving writes them back.

    Raises TypeError for an unknown name or a wrong type, ValueError for a value out of range.
    """

    def __init__(self, **parameters: Any) -> None:
        for name in parameters:
            if name not in PARAMETERS:
                close = difflib.get_close_matches(name, PARAMETERS, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"GenerationConfig: unknown parameter {name!r}{hint}")
        for name in PARAMETERS:
            setattr(self, name, parameters.get(name))
        self.extra: dict[str, Any] = {}
        self.validate()

    def validate(self, *, sampling: bool = True) -> None:
        """Check every parameter that is set; with `sampling` False, skip those that only sampling reads."""
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is None or (name in _SAMPLING and not sampling):
                continue
            if not isinstance(value, rule.types) or (isinstance(value, bool) and bool not in rule.types):
                raise TypeError(
                    f"GenerationConfig: {name} must be {rule.expected}, got {value!r} of type {type(value).__name__}"
                )
            if not rule.allowed(value):
                raise ValueError(f"GenerationConfig: {name} must be {rule.expected}, got {value!r}")

    def check_supported(self) -> None:
        """Raise NotImplementedError for the first parameter that is set and does nothing here yet."""
        for name, neutral in _NOT_YET.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise NotImplementedError(
                    f"generate: {name}={value!r} is not supported yet; supported: {', '.join(sorted(_RULES))}"
                )

    def ignored_without_sampling(self) -> list[str]:
        """The names of the set parameters that have no effect because do_sample is not True."""
        if self.do_sample:
            return []
        return [name for name in _SAMPLING if getattr(self, name) not in (None, _RULES[name].default)]

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """A new config: this one's values where set, else `base`'s. Nothing is checked."""
        merged = GenerationConfig()
        for name in PARAMETERS:
            value = getattr(self, name)
            setattr(merged, name, getattr(base, name) if value is None else value)
        return merged

    def complete(self) -> GenerationConfig:
        """A new config: what is not set has transformers' default."""
        merged = GenerationConfig()
        for name in PARAMETERS:
            value = getattr(self, name)
            default = _RULES[name].default if name in _RULES else None
            setattr(merged, name, default if value is None else value)
        return merged

    def to_dict(self) -> dict[str, Any]:
        """The parameters that are set, and `extra`."""
        values = {name: getattr(self, name) for name in sorted(PARAMETERS)}
        return {**self.extra, **{name: value for name, value in values.items() if value is not None}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str | os.PathLike[str] = FILE_NAME) -> GenerationConfig:
        """From the dict of a generation_config.json at `path`; FormatError names a field of a wrong type.

        Ranges are left to `generate`: a published file may hold a temperature of 0 that nothing reads.
        """
        config = cls()
        config.extra = {name: value for name, value in values.items() if name not in PARAMETERS}
        for name in PARAMETERS & values.keys():
            value = values[name]
            if name in _RULES and value is not None:
                rule = _RULES[name]
                if not isinstance(value, rule.types) or (isinstance(value, bool) and bool not in rule.types):
                    raise FormatError(path, name, f"expected {rule.expected}, got {value!r:.80}")
            setattr(config, name, value)
        return config

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **parameters: Any) -> GenerationConfig:
        """Read the generation_config.json in the folder `path` (or the JSON file `path`).

        `parameters` override the file's. Raises FileNotFoundError without a file, FormatError for a bad one.
        """
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(file, "file", f"expected JSON, got {error}") from None
        if not isinstance(values, dict):
            raise FormatError(file, "file", f"expected an object, got {type(values).__name__}")
        config = cls.from_dict(values, file)
        for name, value in cls(**parameters).to_dict().items():
            setattr(config, name, value)
        return config

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write generation_config.json into `directory` (created if need be), replacing it in one step."""
        self.validate(sampling=bool(self.do_sample))
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{FILE_NAME}.{os.getpid()}"
        try:
            partial.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(folder / FILE_NAME)
        finally:
            partial.unlink(missing_ok=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = {name: value for name, value in self.to_dict().items() if name not in self.extra}
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in values.items())})"
