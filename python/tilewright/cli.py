"""The command line: generate, chat, bench, quantize, pull, info.

Text goes to stdout as it is generated, everything else to stderr. Exit status: 0 success, 1 failure (one line
on stderr), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
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
    _add_quantize(commands)
    pull = commands.add_parser("pull", help="download a model")
    pull.add_argument("name", metavar="NAME", help=f"for example {_DEFAULT_MODEL}")
    pull.set_defaults(command=_pull)
    info = commands.add_parser("info", help="print what this machine has and what is used of it")
    info.set_defaults(command=_info)
    return parser


def _add_quantize(commands: Any) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="quantise a checkpoint into a Hugging Face folder",
        description="Write a checkpoint, quantised, as a Hugging Face folder in the compressed-tensors format. A run "
        "that was stopped goes on when the same command is given again.",
    )
    quantize.add_argument("source", metavar="SRC", help="a Hugging Face folder, a .gguf file, or a known name")
    quantize.add_argument("target", metavar="DST", type=Path, help="a new folder")
    quantize.add_argument("--bits", type=int, choices=[4, 8], default=4, help="default: %(default)s")
    quantize.add_argument(
        "--group-size",
        type=int,
        choices=[16, 32, 64, 128, -1],
        default=32,
        help="columns that share a scale, -1: a whole row (default: %(default)s)",
    )
    quantize.add_argument(
        "--method",
        choices=["rtn", "hqq", "gptq", "awq"],
        default="rtn",
        help="round to nearest, HQQ's search, or one of two that calibrate (default: %(default)s)",
    )
    symmetry = quantize.add_mutually_exclusive_group()
    symmetry.add_argument("--symmetric", action="store_true", default=True, help="no zero points (default)")
    symmetry.add_argument("--asymmetric", action="store_false", dest="symmetric", help="a zero point for each scale")
    quantize.add_argument("--calibration", type=Path, metavar="FILE", help="text for gptq and awq")
    quantize.add_argument(
        "--samples", type=_count, metavar="N", help="windows of that text (default: 128 if it has so many)"
    )
    quantize.add_argument(
        "--seq-len", type=_count, default=512, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    quantize.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gptq rounds the columns with the largest inputs first (default: yes)",
    )
    quantize.add_argument(
        "--skip",
        action="append",
        metavar="NAME",
        help="a module to leave dense, by its name or the last part of it; may be repeated (default: lm_head)",
    )
    quantize.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="text to compare both models on (default: the end of the calibration text, kept out of the calibration)",
    )
    quantize.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    quantize.set_defaults(command=_quantize, usage=quantize.error)


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


def _quantize(options: argparse.Namespace) -> int:
    calibrates = options.method in ("gptq", "awq")
    if calibrates and options.calibration is None:
        options.usage(f"--method {options.method} needs a text: --calibration FILE")
    if not calibrates and options.calibration is not None:
        options.usage(f"--method {options.method} does not calibrate; leave --calibration out, or take gptq or awq")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        options.usage(f"--json {options.json}: there is no such folder")
    from tilewright import AutoTokenizer
    from tilewright.io.pull import resolve
    from tilewright.models.calibration import calibration_windows, evaluation_windows
    from tilewright.models.quantize import Recipe, quantize_checkpoint

    source, calibration, evaluation = resolve(options.source), None, None
    if options.calibration is not None or options.eval is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if options.calibration is not None:
            calibration, evaluation = calibration_windows(
                options.calibration, tokenizer, options.samples, options.seq_len, keep_rest=options.eval is None
            )
        if options.eval is not None:
            evaluation = evaluation_windows(options.eval, tokenizer, options.seq_len)
    skip = tuple(options.skip or ("lm_head",))
    recipe = Recipe(options.method, options.bits, options.group_size, options.symmetric, skip, options.act_order)
    report = quantize_checkpoint(source, options.target, recipe, calibration=calibration, evaluation=evaluation)

    _print_table(report.rows(), sys.stdout)
    if options.json is not None:
        settings = {"source": str(options.source), "target": str(options.target), **asdict(recipe)}
        document = {**settings, **asdict(report)}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


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
