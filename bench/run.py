"""The run behind `tilewright bench`: looks at the machine, measures case by case, prints, writes reports."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewright import _C

from . import OPS, PEERS, ceilings, machine, module, report
from .harness import OURS, ROUNDS, EventTimer, Result, Timer, WallTimer, measure


@dataclass(frozen=True)
class _Place:
    """Where cases run and what they are held against."""

    device: torch.device
    timer: Timer
    limits: ceilings.Ceilings

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 if a result of ours was wrong or could not be had, or no case matched; 2 if there is
    no such device."""
    n_threads = options.threads or _C.get_num_threads()
    device = torch.device(options.device)
    if device.type == "cpu":
        with machine.threads(n_threads):
            return _run(options, _Place(device, WallTimer(), ceilings.Cpu(n_threads)), n_threads)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", device.index or 0)
    if device.index >= count:
        found = f"{count} GPU{'s' * (count > 1)}" if count else "no GPU"
        print(f"tilewright bench: error: --device {options.device}: torch {torch.__version__} finds {found} here; "
              "give --device cpu, or run where torch.cuda.is_available() is true", file=sys.stderr)  # fmt: skip
        return 2
    with machine.threads(n_threads), torch.cuda.device(device):
        timer = EventTimer()
        return _run(options, _Place(device, timer, ceilings.Gpu(device, timer)), n_threads)


def _run(options: argparse.Namespace, place: _Place, n_threads: int) -> int:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    description, before = machine.describe(n_threads, place.device if place.on_gpu else None), machine.load()
    print(_heading(description, before))
    peers, skipped = _peers(options, place)
    limits = _ceilings(place, n_threads)
    collected: list[dict[str, Any]] = []
    for op in OPS:
        if options.op in ("all", op):
            if place.on_gpu and not module(op).GPU_SHAPES:
                skipped[op] = "times calls of the CPU only"
            collected += _kernels(op, options, peers, place)
    if options.op in ("all", "llm") and place.on_gpu:
        skipped["llm"] = "models run on the CPU only"
    elif options.op in ("all", "llm"):
        from . import compare_llm

        if not options.shapes or any(part in name for part in options.shapes for name in compare_llm.CASES):
            found, failed = compare_llm.compare(options.model, peers, options.rounds or 3, n_threads)
            skipped.update(failed)
            collected += _show(found, peers, place.limits)
    for what, why in skipped.items():
        print(f"skipped {what}: {why}")
    after = machine.load()
    if not after.quiet:
        print(f"after: {after}")
    if not collected:
        asked = f" matches --shapes {','.join(options.shapes)}" if options.shapes else ""
        print(f"no case of {options.op}{asked} on {place.device}", file=sys.stderr)
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


def _peers(options: argparse.Namespace, place: _Place) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those that take part, and why the others that were asked for do not."""
    here = machine.installed()
    all_of_them = options.op in ("all", "llm") and not place.on_gpu
    possible = PEERS if all_of_them else _kernel_peers(options.op, PEERS, place)
    asked = possible if options.peers is None else options.peers
    skipped = {name: "not installed" for name in asked if name not in here}
    why = "torch is the one peer on a GPU" if place.on_gpu else "compared end to end only, by `tilewright bench llm`"
    skipped |= {name: why for name in asked if name not in possible}
    return tuple(name for name in asked if name not in skipped), skipped


def _kernel_peers(op: str, peers: Sequence[str], place: _Place) -> tuple[str, ...]:
    """Those of ``peers`` that have something like op by itself."""
    return tuple(n for n in peers if n == "torch" or (n == "llama_cpp" and op == "linear" and not place.on_gpu))


def _heading(description: dict[str, Any], load: machine.Load) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    gpu = description.get("gpu")
    of_gpu = f"{gpu['name']}, compute capability {gpu['capability']}, CUDA {gpu['cuda']}\n" if gpu else ""
    return of_gpu + (
        f"{description['cpu']}, {description['isa']}, {description['threads']} threads, {description['cores']} cores\n"
        f"{versions}, commit {description['commit'] or 'of the package'}\n{load}"
    )


def _ceilings(place: _Place, n_threads: int) -> dict[str, dict[str, float]]:
    found = {}
    for limits in [place.limits] if place.on_gpu else [ceilings.Cpu(n) for n in sorted({1, n_threads})]:
        rates = {limits.memory: limits.bandwidth()} | {unit: limits.peak(unit) for unit in ceilings.UNITS}
        found[limits.name] = rates
        peaks = ", ".join(f"{unit} {rates[unit] / 1e9:.0f} Gop/s" for unit in ceilings.UNITS)
        of = f"of {limits.name}" if place.on_gpu else f"with {limits.name} thread{'s' * (limits.name != '1')}"
        print(f"ceilings {of}: {limits.memory} {rates[limits.memory] / 1e9:.1f} GB/s, {peaks}")
    return found


def _kernels(op: str, options: argparse.Namespace, peers: tuple[str, ...], place: _Place) -> list[dict[str, Any]]:
    bench = module(op)
    shapes = bench.GPU_SHAPES if place.on_gpu else bench.SHAPES
    shapes = [s for s in shapes if not options.shapes or any(part in s.name for part in options.shapes)]
    if not shapes:
        return []
    kernel_peers = _kernel_peers(op, peers, place)
    table = report.Table(kernel_peers, max(len(shape.name) for shape in shapes))
    print(f"\n{op}\n{table.header()}")
    collected = []
    for shape in shapes:
        case = bench.case(shape, kernel_peers, place.device)
        found = measure(case, options.rounds or ROUNDS, timer=place.timer)
        for entry in report.entries(found, place.limits):
            print(table.row(entry), flush=True)
            collected.append(entry)
    return collected


def _show(found: list[Result], peers: tuple[str, ...], limits: ceilings.Ceilings) -> list[dict[str, Any]]:
    collected = report.entries(found, limits)
    libraries = {entry["library"] for entry in collected}
    width = max(len(entry["case"]) for entry in collected)
    table = report.Table([name for name in peers if name in libraries], width, items=True)
    print(f"\nllm\n{table.header()}")
    for entry in collected:
        print(table.row(entry))
    return collected
