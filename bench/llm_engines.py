"""One measurement of one engine in a process of its own: `compare_llm` starts it and reads one JSON object.

Engines keep thread pools that spin, so two in one process disturb each other. Every engine gets the same token
ids: it takes in a prompt, then chooses 128 tokens greedily. Loading and a first, shorter run are not timed. Each
prompt is new, because OpenVINO answers a repeated one from its prefix cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# (prompt ids, new tokens) -> seconds to the first token, seconds from the first to the last
Run = Callable[[list[int], int], tuple[float, float]]
_WARM_UP_TOKENS = 8


class _Clock:
    """A streamer that notes when the prompt went in and when each token came out."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def intervals(self, new_tokens: int) -> tuple[float, float]:
        """To the first token from when the clock was made, and from there on until `new_tokens` more were out."""
        begin, _prompt, first, *later = self.times
        _expect(len(later), new_tokens)
        return first - begin, later[-1] - first


def _expect(tokens: int, new_tokens: int) -> None:
    if tokens != new_tokens:
        raise RuntimeError(f"expected {new_tokens} tokens after the first, got {tokens}")


def _torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _tilewright(model: str, threads: int) -> Run:
    import torch

    import tilewright

    _torch_threads(threads)
    tilewright.set_num_threads(threads)
    lm = tilewright.AutoModelForCausalLM.from_pretrained(model)
    lm.generation_config.eos_token_id = None

    def run(ids: list[int], new_tokens: int) -> tuple[float, float]:
        prompt = torch.tensor([ids])
        clock = _Clock()
        lm.generate(prompt, streamer=clock, max_new_tokens=new_tokens + 1, do_sample=False)
        return clock.intervals(new_tokens)

    return run


def _transformers(model: str, threads: int) -> Run:
    import torch
    import transformers

    _torch_threads(threads)
    transformers.logging.set_verbosity_error()
    folder, file = os.path.split(os.path.abspath(model))
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0

    def run(ids: list[int], new_tokens: int) -> tuple[float, float]:
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        clock = _Clock()
        lm.generate(prompt, attention_mask=mask, streamer=clock, max_new_tokens=new_tokens + 1, do_sample=False)
        return clock.intervals(new_tokens)

    return run


def _llama_cpp(model: str, threads: int) -> Run:
    import llama_cpp
    import numpy as np

    lm = llama_cpp.Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)

    def best() -> int:
        return int(np.ctypeslib.as_array(lm._ctx.get_logits(), shape=(lm.n_vocab(),)).argmax())

    def run(ids: list[int], new_tokens: int) -> tuple[float, float]:
        lm.reset()
        begin = time.perf_counter()
        lm.eval(ids)
        token = best()
        first = time.perf_counter()
        for _ in range(new_tokens):
            lm.eval([token])
            token = best()
        return first - begin, time.perf_counter() - first

    return run


def _openvino(model: str, threads: int) -> Run:
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(ids: list[int], new_tokens: int) -> tuple[float, float]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens + 1, True, False
        prompt = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        _expect(metrics.get_num_generated_tokens() - 1, new_tokens)
        # Milliseconds. The time per token is a mean over those after the first.
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 * new_tokens

    return run


ENGINES: dict[str, Callable[[str, int], Run]] = {
    "tilewright": _tilewright,
    "llama_cpp": _llama_cpp,
    "openvino": _openvino,
    "transformers": _transformers,
}


def main() -> int:
    """Read {engine, model, threads, prompts, new_tokens} from stdin, write {prefill, decode} to stdout: lists of
    seconds, one for each prompt but the first, which warms up."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not mix with the result
    request = json.load(sys.stdin)
    run = ENGINES[request["engine"]](request["model"], request["threads"])
    warm_up, *prompts = request["prompts"]
    run(warm_up, _WARM_UP_TOKENS)
    times = [run(prompt, request["new_tokens"]) for prompt in prompts]
    with os.fdopen(out, "w") as file:
        json.dump({"prefill": [t[0] for t in times], "decode": [t[1] for t in times]}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
