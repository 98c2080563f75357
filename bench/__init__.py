"""Benchmarks: `tilewright bench`, or `python -m bench.bench_<op>` in a checkout. See NOTES.md.

The kernels' benches are modules with a table SHAPES, a table GPU_SHAPES of what `--device cuda` runs, and a function
`case(shape, peers, device) -> harness.Case`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

OPS = ("attention", "linear", "rope", "norm", "kv", "call")
PEERS = ("torch", "llama_cpp", "openvino", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benches that `argv` (default: the process's arguments) names; 1 if one of our results was wrong."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    from .run import run  # torch is imported only once the usage is right

    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tilewright bench",
        description="Time Tilewright's kernels and models beside other libraries and this machine's measured limits.",
    )
    parser.add_argument("op", nargs="?", default="all", choices=[*OPS, "llm", "all"], help="default: %(default)s")
    parser.add_argument(
        "--shapes", type=_names, default=(), metavar="TEXT[,TEXT]", help="only cases whose name contains one of these"
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        metavar="NAME[,NAME]",
        help=f"compare with these, where installed: {', '.join(PEERS)} (default: all; 'none' for none)",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="cpu",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N: the kernels that tensors there get (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with tables and bars there")
    parser.add_argument("--threads", type=_count, metavar="N", help="default: what Tilewright would use")
    parser.add_argument("--rounds", type=_count, metavar="N", help="turns of each candidate (default: 7; llm: 3)")
    parser.add_argument(
        "--model", default="smollm2", metavar="PATH|NAME", help="for llm: a .gguf file (default: %(default)s)"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _peers(text: str) -> tuple[str, ...]:
    names = () if text == "none" else _names(text)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(PEERS)}, none")
    return names


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1024, got {text!r}")
    return int(text)


def module(op: str) -> ModuleType:
    """The bench of one op."""
    return importlib.import_module(f".bench_{op}", __package__)
