"""The default model's tokenizer, shared by the tests of tokenizers."""

from __future__ import annotations

import functools
from pathlib import Path

from tilewright.io.pull import pull
from tilewright.io.tokenizer import AutoTokenizer, Tokenizer

GPL = Path("/usr/share/common-licenses/GPL-3")
TEXTS = [
    "",
    "Hello, world!",
    "\n\n  0.",
    "  leading and   inner   spaces ",
    "tabs\tand\r\nlines\n\n\n",
    "don't DON'T we'll",
    "def f(x):\n    return x**2 + 1  # ok",
    "naïve Straße Ωμέγα",
    "日本語 한국어 中文",
    "हिन्दी العربية",
    "👍🏽 👩\u200d👩\u200d👧 e\u0301",
    "a\u00a0b\u3000c\u2028d",
    "½ ⅷ ٣ ४ 一 12345 3.14",
    "\x00\x7f\ufffd",
]


@functools.cache
def shared_smollm2() -> Tokenizer:
    return AutoTokenizer.from_pretrained(pull("smollm2", progress=False))
