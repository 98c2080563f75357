"""Typed reads from one file's key-value pairs; every complaint names the file and the field."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from tilewright.io.errors import FormatError

REQUIRED: Any = object()


class Fields:
    """`values` of the file at `path`, read under names that begin with `prefix`.

    A field that is absent takes its value from `defaults`, then from the default of the call; an explicit
    null goes straight to the latter, as in transformers. Without a default, absence is a FormatError.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        path: str | os.PathLike[str],
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.values, self.path, self.prefix, self.defaults = values, path, prefix, defaults or {}

    def get(self, name: str) -> Any:
        """The value as it stands in the file, None if it is absent."""
        return self.values.get(self.prefix + name)

    def error(self, name: str, expected: str, got: object) -> FormatError:
        """The error to raise for a field that is not what was expected."""
        text = repr(got)
        text = text if len(text) <= 80 else text[:77] + "..."
        return FormatError(self.path, self.prefix + name, f"expected {expected}, got {text}")

    def unsupported(self, name: str, problem: str) -> NotImplementedError:
        """The error to raise for a field whose value is legal but not supported."""
        return NotImplementedError(f"{self.path}: {self.prefix}{name}: {problem}")

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer in [least, most]. The upper bounds keep a lying file from costing memory."""
        expected = f"an integer from {least} to {most}"
        value = self._value(name, default, expected)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(name, expected, value)
        return value

    def same_everywhere(self, name: str, default: Any = REQUIRED) -> int:
        """An integer that GGUF may also give once for each layer; different entries are refused."""
        value = self.get(name)
        if not isinstance(value, list):
            return self.integer(name, default)
        if not value:
            raise self.error(name, "an integer, or one for each layer", value)
        if any(entry != value[0] for entry in value):
            raise self.unsupported(name, "a different value for each layer is not supported")
        return Fields({self.prefix + name: value[0]}, self.path, self.prefix).integer(name)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A positive finite number."""
        expected = "a positive finite number"
        value = self._value(name, default, expected)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, expected, value)
        # Not float(value) first: an integer of 400 digits would raise OverflowError.
        if not 0 < value < math.inf or value > 1e300:
            raise self.error(name, expected, value)
        return float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> bool:
        """True or False, nothing that merely counts as one."""
        value = self._value(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string (or the default, which may be None)."""
        value = self._value(name, default, "a string")
        if value is not default and not isinstance(value, str):
            raise self.error(name, "a string", value)
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; empty where the field is absent or null."""
        value = self._value(name, {}, "an object")
        if not isinstance(value, Mapping):
            raise self.error(name, "an object", value)
        return value

    def section(self, name: str) -> Fields:
        """The object of that name (empty where absent), whose complaints name both it and the field."""
        prefix = f"{self.prefix}{name}."
        return Fields({prefix + str(key): value for key, value in self.mapping(name).items()}, self.path, prefix)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where the field is absent or null."""
        value = self._value(name, [], "a list of strings")
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(name, "a list of strings", value)
        return tuple(value)

    def token(self, name: str) -> int | None:
        """A token id. Old checkpoints write -1 for none."""
        value = self.get(name)
        return None if value is None or value == -1 else self.integer(name, least=0)

    def tokens(self, name: str) -> int | list[int] | None:
        """A token id, or a list of them."""
        value = self.get(name)
        if not isinstance(value, list):
            return self.token(name)
        if not value or any(not isinstance(entry, int) or isinstance(entry, bool) for entry in value):
            raise self.error(name, "a token id or a list of token ids", value)
        return list(value)

    def _value(self, name: str, default: Any, expected: str) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if self.prefix + name not in self.values:
            default = self.defaults.get(name, default)
        if default is REQUIRED:
            raise FormatError(self.path, self.prefix + name, f"expected {expected}, the field is missing")
        return default
