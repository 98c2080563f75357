"""The run behind `tilewright bench`: looks at the machine, measures case by case, prints, writes reports."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from typing import Any

from tilewright import _C

from . import OPS, PEERS, ceilings, machine, module, report
from .harness import OURS, ROUNDS, Result, measure


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 if a result of ours was wrong or could not be had, or no case matched."""
    n_threads = options.threads or _C.get_num_threads()
    with machine.threads(n_threads):
        return _run(options, n_threads)


def _run(options: argparse.Namespace, n_threads: int) -> int:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    description, before = machine.describe(n_threads), machine.load()
    print(_heading(description, before))
    peers, skipped = _peers(options)
    limits = _ceilings(n_threads)
    collected: list[dict[str, Any]] = []
    for op in OPS:
        if options.op in ("all", op):
            collected += _kernels(op, options, peers, n_threads)
    if options.op in ("all", "llm"):
        from . import compare_llm

        if not options.shapes or any(part in name for part in options.shapes for name in compare_llm.CASES):
            found, failed = compare_llm.compare(options.model, peers, options.rounds or 3, n_threads)
            skipped.update(failed)
            collected += _show(found, peers, n_threads)
    for what, why in skipped.items():
        print(f"skipped {what}: {why}")
    after = machine.load()
    if not after.quiet:
        print(f"after: {after}")
    if not collected:
        print(f"no case of {options.op} matches --shapes {','.join(options.shapes)}", file=sys.stderr)
        return 1
    document = {
        "schema": report.SCHEMA,
        "time": began,
        "machine": description,
        "load": machine.as_dict(before, after),
        "ceilings": limits,
        "skipped": skipped,
        "results": collected,
    }
    if options.json:
        report.write_json(document, options.json)
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(report.page(document), encoding="utf-8")
    return int(any(entry["problem"] is not None for entry in collected if entry["library"] == OURS))


def _peers(options: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those that take part, and why the others that were asked for do not."""
    here = machine.installed()
    possible = PEERS if options.op in ("all", "llm") else _kernel_peers(options.op, PEERS)
    asked = possible if options.peers is None else options.peers
    skipped = {name: "not installed" for name in asked if name not in here}
    skipped |= {name: "compared end to end only, by `tilewright bench llm`" for name in asked if name not in possible}
    return tuple(name for name in asked if name not in skipped), skipped


def _kernel_peers(op: str, peers: Sequence[str]) -> tuple[str, ...]:
    """Those of ``peers`` that have something like op by itself."""
    return tuple(name for name in peers if name == "torch" or (name == "llama_cpp" and op == "linear"))


def _heading(description: dict[str, Any], load: machine.Load) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    return (
        f"{description['cpu']}, {description['isa']}, {description['threads']} threads, {description['cores']} cores\n"
        f"{versions}, commit {description['commit'] or 'of the package'}\n{load}"
    )


def _ceilings(n_threads: int) -> dict[str, dict[str, float]]:
    limits = {}
    for n in sorted({1, n_threads}):
        limits[str(n)] = {"read": ceilings.read(n)} | {unit: ceilings.peak(unit, n) for unit in ceilings.UNITS}
        rates = ", ".join(f"{unit} {limits[str(n)][unit] / 1e9:.0f} Gop/s" for unit in ceilings.UNITS)
        print(f"ceilings with {n} thread{'s' * (n > 1)}: read {limits[str(n)]['read'] / 1e9:.1f} GB/s, {rates}")
    return limits


def _kernels(op: str, options: argparse.Namespace, peers: tuple[str, ...], n_threads: int) -> list[dict[str, Any]]:
    bench = module(op)
    shapes = [s for s in bench.SHAPES if not options.shapes or any(part in s.name for part in options.shapes)]
    if not shapes:
        return []
    kernel_peers = _kernel_peers(op, peers)
    table = report.Table(kernel_peers, max(len(shape.name) for shape in shapes))
    print(f"\n{op}\n{table.header()}")
    collected = []
    for shape in shapes:
        found = measure(bench.case(shape, kernel_peers), options.rounds or ROUNDS)
        for entry in report.entries(found, n_threads):
            print(table.row(entry), flush=True)
            collected.append(entry)
    return collected


def _show(found: list[Result], peers: tuple[str, ...], n_threads: int) -> list[dict[str, Any]]:
    collected = report.entries(found, n_threads)
    libraries = {entry["library"] for entry in collected}
    width = max(len(entry["case"]) for entry in collected)
    table = report.Table([name for name in peers if name in libraries], width, items=True)
    print(f"\nllm\n{table.header()}")
    for entry in collected:
        print(table.row(entry))
    return collected
