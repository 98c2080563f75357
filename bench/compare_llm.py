"""Prefill and decode speed of Tilewright and its peers on the same GGUF file, in alternation in one run.

`python -m bench.compare_llm`, or `tilewright bench llm`. See llm_engines.py for how one measurement is made.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import main
from .harness import OURS, Result, Work

PROMPT_TOKENS, NEW_TOKENS = 512, 128
CASES = (f"prefill {PROMPT_TOKENS} tokens", f"decode {NEW_TOKENS} tokens")
_REPEATS = 2  # prompts timed in each process
_STRIDE = 151  # tokens between the prompts' beginnings in the text; prime, so that none begins as another
_TIMEOUT = 600  # seconds for one process, loading included
_TEXT = Path("/usr/share/common-licenses/GPL-3")  # as Debian ships it


def compare(model: str, peers: Sequence[str], rounds: int, n_threads: int) -> tuple[list[Result], dict[str, str]]:
    """Results of `CASES` for us and `peers`, and {peer: why it is left out}.

    model: a .gguf file or a name that `tilewright pull` knows. Raises ValueError for another kind of model.
    """
    from tilewright.io.pull import resolve

    path = resolve(model)
    if path.suffix != ".gguf":
        raise ValueError(f"bench llm: the model must be a .gguf file, which all engines read; got {path}")
    works = _works(path)
    names = [OURS, *(name for name in ("llama_cpp", "openvino", "transformers") if name in peers)]
    results = {
        name: [
            Result("llm", CASES[0], "cold", name, name, works[0], works[1].nbytes, items=PROMPT_TOKENS),
            Result("llm", CASES[1], "cold", name, name, works[1], works[1].nbytes, items=1),
        ]
        for name in names
    }
    starts = iter(range(0, 1 << 30, _STRIDE))
    text = _token_ids(path)
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in names:
            if name in failed:
                continue
            prompts = [_prompt(text, next(starts)) for _ in range(1 + _REPEATS)]
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            try:
                times = _measure(name, path, n_threads, prompts)
            except RuntimeError as e:
                failed[name] = str(e)
                continue
            prefill, decode = results[name]
            prefill.samples.append(times["prefill"])
            decode.samples.append([seconds / NEW_TOKENS for seconds in times["decode"]])
    for name, problem in failed.items():
        for result in results[name]:
            result.samples, result.problem = [], problem
    kept = [name for name in names if name == OURS or name not in failed]
    by_case = [results[name][index] for index in range(len(CASES)) for name in kept]
    return by_case, {name: problem for name, problem in failed.items() if name != OURS}


def _measure(engine: str, model: Path, n_threads: int, prompts: list[list[int]]) -> dict[str, list[float]]:
    """One process. Raises RuntimeError with the last line of what it said."""
    request = {
        "engine": engine,
        "model": str(model),
        "threads": n_threads,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
    }
    environment = os.environ | {"OMP_NUM_THREADS": str(n_threads), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.llm_engines"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {_TIMEOUT} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1]}")
    return json.loads(done.stdout)


def _works(path: Path) -> tuple[Work, Work]:
    """What a prefill and a decoding step have to do at least: every matrix once for each token, or for each step;
    the head once a call; the cache in 16 bits."""
    from tilewright.io.gguf import GGUFFile

    with GGUFFile(path) as file:
        tensors, metadata = file.tensors, file.metadata
        arch = metadata["general.architecture"]
        matrices = {name: t for name, t in tensors.items() if len(t.shape) == 2 and name != "token_embd.weight"}
        head = matrices.pop("output.weight", None) or tensors["token_embd.weight"]
        layers, heads = int(metadata[f"{arch}.block_count"]), int(metadata[f"{arch}.attention.head_count"])
        kv_heads = int(metadata.get(f"{arch}.attention.head_count_kv", heads))
        head_dim = int(metadata.get(f"{arch}.attention.key_length", metadata[f"{arch}.embedding_length"] // heads))
        elements = sum(math.prod(t.shape) for t in matrices.values())
        nbytes = sum(t.nbytes for t in matrices.values()) + head.nbytes
        once = 2 * math.prod(head.shape)
    attention = 2 * layers * heads * head_dim * PROMPT_TOKENS**2  # causal: half of two products
    prefill = Work(nbytes, 2 * PROMPT_TOKENS * elements + attention + once, "int8")
    kv_bytes = 2 * layers * kv_heads * head_dim * 2 * (PROMPT_TOKENS + NEW_TOKENS // 2)
    return prefill, Work(nbytes + kv_bytes, 2 * elements + once, "int8")


def _token_ids(path: Path) -> list[int]:
    """A long text: the GPL where it lies, else the documentation that comes with Python."""
    import tilewright

    if _TEXT.exists():
        text = _TEXT.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())[:40_000]
    return tilewright.AutoTokenizer.from_pretrained(path).encode(text)


def _prompt(text: list[int], start: int) -> list[int]:
    begin = start % (len(text) - PROMPT_TOKENS)
    return text[begin : begin + PROMPT_TOKENS]


if __name__ == "__main__":
    sys.exit(main(["llm", *sys.argv[1:]]))
