"""Chat templates: the Jinja program by which a checkpoint turns messages into a prompt, run in a sandbox.

The names a template can use (raise_exception, strftime_now, tojson, the generation tag, break and continue)
and the whitespace rules are those of transformers, for which templates are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

# A long conversation has 100,000 characters; a template that makes more than this is broken or hostile.
_MAX_CHARS = 1 << 24
_MARK = "\ue0f1\ue0f2"  # private-use characters that no message holds


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The prompt that the template `source` makes of `variables`, which hold plain data (see `plain`).

    ValueError when the template cannot be read, fails, refuses the conversation or leaves the sandbox. A
    template cannot reach files or Python's internals, but it is a program: nested loops can still waste time.
    """
    parts, size = [], 0
    try:
        for part in _compile(source).generate(dict(variables)):
            parts.append(part)
            size += len(part)
            if size > _MAX_CHARS:
                raise SecurityError(f"more than {_MAX_CHARS} characters of output")
    except jinja2.TemplateSyntaxError as err:
        raise ValueError(f"chat template: expected valid Jinja, got an error in line {err.lineno}: {err}") from err
    except _Refusal as err:
        raise ValueError(f"chat template: the model's template refuses this conversation: {err}") from err
    except SecurityError as err:
        raise ValueError(f"chat template: stopped, the template does something unsafe: {err}") from err
    except Exception as err:  # whatever the template's own operations raise
        raise ValueError(
            f"chat template: failed on this conversation with {type(err).__name__}: {err}; does it have the "
            "roles and fields that the template wants?"
        ) from err
    return "".join(parts)


def render_chat(source: str, messages: Any, variables: Mapping[str, Any], continue_final_message: bool = False) -> str:
    """The prompt for one conversation: a list of message objects, whose None entries count as absent.

    continue_final_message: end where the last message's text ends, without what the template puts after it.
    """
    chat = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if not continue_final_message:
        return render(source, {**variables, "messages": chat})
    block, field = chat[-1] if chat else {}, "content"
    if isinstance(block.get(field), list):  # text and other things: the last block that has text
        blocks = [item for item in block[field] if isinstance(item, dict) and "text" in item]
        block, field = blocks[-1] if blocks else {}, "text"
    if not isinstance(block.get(field), str):
        raise ValueError("apply_chat_template: continue_final_message needs text in the last message, got none")
    # The space behind the mark shows whether the template strips text: then it would have before the mark.
    block[field] += _MARK + " "
    text = render(source, {**variables, "messages": chat})
    end = text.rfind(_MARK)
    if end < 0:
        raise ValueError(
            "apply_chat_template: continue_final_message needs a template that writes out the last message"
        )
    return text[:end] if text[end + len(_MARK) :].startswith(" ") else text[:end].rstrip()


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(
            f"apply_chat_template: {where} must be a dict with role and content, got {type(message).__name__}"
        )
    # Some APIs write content=None or tool_calls=None, on which templates fail or print "None".
    return plain({key: value for key, value in message.items() if value is not None}, where)


def plain(value: Any, where: str) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None only.

    A template may call the methods of what it is given, so anything else is refused with a TypeError.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(
        f"apply_chat_template: {where} must be JSON data (dict, list, str, number, bool, None), got "
        f"{type(value).__name__}; pass tools as JSON schemas"
    )


class _Refusal(jinja2.TemplateError):
    """What raise_exception raises on the template's behalf."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise at once where jinja2 would print nothing for what it hides."""
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse products that would fill the memory, such as 'a' * 10**10."""
        if operator == "**":
            size = _bits(left) * max(_int(right), 1)
        else:
            size = max(_length(left) * _int(right), _length(right) * _int(left), _bits(left) + _bits(right))
        if size > _MAX_CHARS:
            raise SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


def _int(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return _int(value).bit_length()


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant wrote; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _SafeNamespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    attributes = dict(*args, **kwargs)
    for name in attributes:
        _refuse_private(name)
    return _SafeNamespace(attributes)


def _refuse_private(name: Any) -> None:
    # Attributes like __html__ would be called by code outside the sandbox.
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold the private name {name!r}")


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(*args, **kwargs)


_GLOBALS: dict[str, Callable[..., Any]] = {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "namespace": _namespace,
    "dict": _dict,
}


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(_GLOBALS)
    return environment.from_string(source)
