"""The command line: generate, chat, bench, pull, info.

Text goes to stdout as it is generated, everything else to stderr. Exit status: 0 success, 1 failure (one line
on stderr), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tilewright.models.decoder import CausalLM

_DEFAULT_MODEL = "smollm2"
# bf16 rather than int8 activations: 15 times closer to the exact model (KL divergence, SmolLM2 on GPL text), and
# a small model's answer can hang on that. Asked for the capital of France, the default model begins with "The"
# (probability 0.152) or "L" (0.140); with int8 activations the order is the other way round.
_ACTIVATION = "bf16"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's arguments) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough. Nothing more may be written, not even by Python's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"tilewright: error: {message}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:
        from tilewright import bench

        return bench.main(arguments[1:])
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tilewright", description="Run language models on this machine.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="answer one prompt")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.set_defaults(command=_generate)
    chat = commands.add_parser("chat", help="talk to a model; Ctrl-C stops an answer, Ctrl-D ends the chat")
    chat.set_defaults(command=_chat)
    for command in (generate, chat):
        command.add_argument(
            "--model",
            metavar="PATH|NAME",
            default=_DEFAULT_MODEL,
            help="a Hugging Face folder, a .gguf file, or a known name (default: %(default)s)",
        )
        command.add_argument(
            "--quantization", choices=["int4", "int8"], help="quantise a model that is not quantised yet"
        )
        command.add_argument("--max-new-tokens", type=_count, default=512, metavar="N")
        command.add_argument(
            "--temperature", type=_temperature, default=0.0, metavar="T", help="sample; default: greedy"
        )
        command.add_argument("--threads", type=_count, metavar="N")
        command.add_argument("--stats", action="store_true", help="print speeds to stderr")

    commands.add_parser("bench", help="measure the kernels and models; see `tilewright bench --help`", add_help=False)
    pull = commands.add_parser("pull", help="download a model")
    pull.add_argument("name", metavar="NAME", help=f"for example {_DEFAULT_MODEL}")
    pull.set_defaults(command=_pull)
    info = commands.add_parser("info", help="print what this machine has and what is used of it")
    info.set_defaults(command=_info)
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _generate(options: argparse.Namespace) -> int:
    model, tokenizer = _load(options)
    output = _Output(tokenizer)
    _answer(model, _encode(tokenizer, [{"role": "user", "content": options.prompt}]), output, options)
    if options.stats:
        _print_stats(model, output)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from tilewright.cache.dynamic import DynamicCache

    model, tokenizer = _load(options)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    messages: list[dict[str, str]] = []
    cache, cached = DynamicCache(), []
    while (line := _read(interactive)) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        ids = _encode(tokenizer, messages)
        # The template may write earlier turns differently from how they were generated: keep what agrees.
        row = ids[0].tolist()
        same = next((i for i, (a, b) in enumerate(zip(cached, row, strict=False)) if a != b), len(cached))
        cache.crop(min(same, len(row) - 1))
        output = _Output(tokenizer)
        try:
            _answer(model, ids, output, options, cache)
        except KeyboardInterrupt:
            print(flush=True)
            if not interactive:
                raise
        if options.stats and len(output.times) > 1:
            _print_stats(model, output)
        cached = (row + output.ids)[: cache.get_seq_length()]
        messages.append({"role": "assistant", "content": tokenizer.decode(output.ids, skip_special_tokens=True)})
    return 0


def _read(interactive: bool) -> str | None:
    """The next message, None at the end of the input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401  (gives input() a history and editing)

    try:
        return input("> ")
    except EOFError:
        print(flush=True)
        return None


def _load(options: argparse.Namespace) -> tuple[CausalLM, Any]:
    import tilewright

    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
        tilewright.set_num_threads(options.threads)
    model = tilewright.AutoModelForCausalLM.from_pretrained(
        options.model, quantization=options.quantization, activation=_ACTIVATION
    )
    return model, tilewright.AutoTokenizer.from_pretrained(options.model)


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> Tensor:
    """The conversation as int64 (1, n): through the chat template, or the last message alone without one."""
    if tokenizer.chat_template:
        batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    else:
        batch = tokenizer(messages[-1]["content"], return_tensors="pt")
    return batch["input_ids"]


def _answer(model: CausalLM, ids: Tensor, output: _Output, options: argparse.Namespace, cache: Any = None) -> None:
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    model.generate(ids, streamer=output, past_key_values=cache, max_new_tokens=options.max_new_tokens, **sampling)


class _Output:
    """A streamer that writes text to stdout and keeps ids and times for the statistics."""

    def __init__(self, tokenizer: Any) -> None:
        from tilewright.generation.streamers import IncrementalDecoder

        self.decoder = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        self.prompt_length = 0
        self.ids: list[int] = []
        self.times: list[float] = []  # after the prompt was taken, after each token

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token at a time."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.prompt_length = value.shape[1]
            return
        self.ids.extend(value.tolist())
        self._write(self.decoder.push(value.tolist()))

    def end(self) -> None:
        """The rest of the text, and a newline."""
        self._write(self.decoder.finish() + "\n")

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)


def _print_stats(model: CausalLM, output: _Output) -> None:
    """Speeds, and what share of the memory bandwidth (measured now, 0.1 s) the decoding steps used."""
    from tilewright import get_num_threads
    from tilewright.bench import ceilings

    start, first, last = output.times[0], output.times[1], output.times[-1]
    steps = len(output.times) - 2
    rows = {"prompt": f"{output.prompt_length} tokens, {output.prompt_length / (first - start):.1f} tok/s"}
    if steps:
        rate = steps / (last - first)
        config = model.config
        kv_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        # On average a step reads the keys and values of the prompt and half of the answer.
        kv = kv_token * model.cache_dtype.itemsize * (output.prompt_length + steps / 2)
        bandwidth, ceiling = (model.decode_nbytes + kv) * rate / 1e9, ceilings.read(get_num_threads()) / 1e9
        rows["decode"] = (
            f"{steps} tokens, {rate:.1f} tok/s, {bandwidth:.1f} GB/s, {100 * bandwidth / ceiling:.0f}% of the "
            f"measured {ceiling:.1f} GB/s"
        )
    _print_table(rows, sys.stderr)


def _pull(options: argparse.Namespace) -> int:
    from tilewright.io.pull import pull

    print(pull(options.name))
    return 0


def _info(options: argparse.Namespace) -> int:
    import tilewright

    _print_table(tilewright.info(), sys.stdout)
    return 0


def _print_table(rows: Mapping[str, Any], file: Any) -> None:
    """Names and values, as a table on a terminal, as `name: value` lines elsewhere."""
    texts = {name: _text(value) for name, value in rows.items()}
    if file.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for name, text in texts.items():
            table.add_row(f"[bold]{name}[/bold]", text)
        Console(file=file, highlight=False).print(table)
    else:
        for name, text in texts.items():
            print(f"{name}: {text}", file=file)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"tilewright: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
