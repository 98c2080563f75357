"""The sandbox that chat templates run in."""

from __future__ import annotations

from datetime import datetime

import pytest

from tilewright.io.tokenizer import Tokenizer

HOSTILE = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.__class__ }}": "unsafe",
    "{{ ''|attr('__class__') }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ self.__init__.__globals__ }}": "unsafe|failed",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe",
    "{{ lipsum.__globals__ }}": "unsafe",
    "{{ raise_exception.__globals__ }}": "unsafe",
    "{{ namespace(__html__=1) }}": "unsafe",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}": "unsafe",
    "{{ '{0.__class__}'.format(1) }}": "unsafe",
    "{% for i in range(10**9) %}x{% endfor %}": "range|Range",
    "{{ 'a' * 10**10 }}": "too large",
    "{{ [0] * 10**9 }}": "too large",
    "{{ 10**(10**10) }}": "too large",
    "{{ (2**9999999)**9999999 }}": "too large",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}": "characters",
    "{% include 'other' %}": "failed",
    "{% import 'os' as os %}": "failed",
    "{{ undefined_function() }}": "failed on this conversation with UndefinedError",
    "{{ messages[0].content + 1 }}": "failed on this conversation with TypeError",
    "{% if %}": "expected valid Jinja, got an error in line 1",
    "{{ raise_exception('only users') }}": "refuses this conversation: only users",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_or_broken_template_is_one_error(smollm2: Tokenizer, source: str) -> None:
    with pytest.raises(ValueError, match=HOSTILE[source]):
        smollm2.apply_chat_template([{"role": "user", "content": "x"}], chat_template=source)


def test_template_functions(smollm2: Tokenizer) -> None:
    def text(source: str) -> str:
        return smollm2.apply_chat_template([{"role": "user", "content": "<é>"}], tokenize=False, chat_template=source)

    assert text("{{ messages | tojson }}") == '[{"role": "user", "content": "<é>"}]'
    assert text("{{ messages[0] | tojson(indent=1, sort_keys=true) }}") == '{\n "content": "<é>",\n "role": "user"\n}'
    assert text("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert text("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert text("  {% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"  # trim_blocks and lstrip_blocks
    assert text("{{ dict(a=1).a }}{{ '%s' % 2 }}{{ 2 ** 3 }}{{ 'ab' * 2 }}{{ 3 * 4 }}") == "128abab12"
    assert text("{{ bos_token }}{{ missing }}{% generation %}g{% endgeneration %}") == "<|im_start|>g"
