"""Results as a table for the terminal, as JSON, and as a web page drawn from that JSON.

The JSON's schema, version 1 (`check` enforces it):
    schema    1
    time      when it began, ISO 8601, UTC
    machine   cpu, isa, isa_found, cores, threads, system, versions {name: version}, commit (or null),
              gpu (where the benches ran on one): name, capability, multiprocessors, memory (bytes), l2 (bytes), cuda
    load      before, after: each load1, stolen, jitter, quiet (see machine.Load)
    ceilings  by thread count as a string, or by device: read, of a GPU copy (bytes/s), fp32, bf16, int8 (operations/s)
    skipped   {what: why}
    results   a list; in each: op, case, cache ("cold", "warm"), name, library,
              nbytes, operations, unit: the least that a call has to do; items: tokens a call handles, or 0
              resident_bytes: memory that the calls walked through; limit: seconds that the ceilings allow, or null
              samples: seconds a call, a list for each round; median, min, max of them all, or null
              error: relative, against the float64 reference, or null; problem: why there are no samples, or null
              speedups: {library: its fastest median here / this median}, for our own results
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import ceilings
from .harness import OURS, Result

SCHEMA = 1
_FIELDS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "case": (str,),
    "cache": (str,),
    "name": (str,),
    "library": (str,),
    "nbytes": (int,),
    "operations": (int,),
    "unit": (str,),
    "items": (int,),
    "resident_bytes": (int,),
    "limit": (float, type(None)),
    "samples": (list,),
    "median": (float, type(None)),
    "min": (float, type(None)),
    "max": (float, type(None)),
    "error": (float, type(None)),
    "problem": (str, type(None)),
    "speedups": (dict,),
}
_TOP: dict[str, type] = {
    "schema": int,
    "time": str,
    "machine": dict,
    "load": dict,
    "ceilings": dict,
    "skipped": dict,
    "results": list,
}


def entries(results: Sequence[Result], limits: ceilings.Ceilings) -> list[dict[str, Any]]:
    """One case's results, as the JSON has them, against the ceilings of what they ran on."""
    return [_entry(result, results, limits) for result in results]


def _entry(result: Result, results: Sequence[Result], limits: ceilings.Ceilings) -> dict[str, Any]:
    times, work = result.times, result.work
    limit = 0.0
    if work.nbytes:
        limit = work.nbytes / limits.bandwidth(result.resident_bytes)
    if work.operations:
        limit = max(limit, work.operations / limits.peak(work.unit))
    rivals: dict[str, float] = {}
    for other in results:
        same = (other.case, other.cache) == (result.case, result.cache)
        if same and other.times and other.library != OURS:
            rivals[other.library] = min(rivals.get(other.library, other.median), other.median)
    return {
        "op": result.op,
        "case": result.case,
        "cache": result.cache,
        "name": result.name,
        "library": result.library,
        "nbytes": work.nbytes,
        "operations": work.operations,
        "unit": work.unit,
        "items": result.items,
        "resident_bytes": result.resident_bytes,
        "limit": limit or None,
        "samples": result.samples,
        "median": result.median if times else None,
        "min": min(times, default=None),
        "max": max(times, default=None),
        # JSON has no NaN.
        "error": result.error if result.error is None or result.error == result.error else None,
        "problem": result.problem,
        "speedups": {k: v / result.median for k, v in rivals.items()} if times and result.library == OURS else {},
    }


def check(report: Any) -> dict[str, Any]:
    """`report` if it follows the schema, else a ValueError that names the field."""
    if not isinstance(report, dict):
        raise ValueError(f"bench report: expected an object, got {type(report).__name__}")
    for name, kind in _TOP.items():
        if not isinstance(report.get(name), kind):
            raise ValueError(f"bench report: {name} must be {kind.__name__}, got {report.get(name)!r}")
    if report["schema"] != SCHEMA:
        raise ValueError(f"bench report: schema must be {SCHEMA}, got {report['schema']!r}")
    for index, entry in enumerate(report["results"]):
        for name, kinds in _FIELDS.items():
            if name not in entry or not isinstance(entry[name], kinds):
                raise ValueError(
                    f"bench report: results[{index}].{name} must be {' or '.join(k.__name__ for k in kinds)}, got "
                    f"{entry.get(name)!r}"
                )
        if bool(entry["samples"]) == (entry["problem"] is not None):
            raise ValueError(f"bench report: results[{index}] must have either samples or a problem")
    return report


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write `report` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(check(report), indent=1) + "\n", encoding="utf-8")


class Table:
    """Rows for the terminal, one at a time. `libraries` get a column each for how far we are ahead; width: of the
    names of the cases; items: whether to give tokens a second."""

    def __init__(self, libraries: Iterable[str], width: int, *, items: bool = False) -> None:
        self.libraries = [name for name in libraries if name != OURS]
        self.width, self.items = width, items

    def header(self) -> str:
        ratios = "".join(f"{'x ' + name:>14}" for name in self.libraries)
        return (
            f"{'case':{self.width}} {'cache':5} {'candidate':18} {'time':>8} {'min .. max':>20} {'GB/s':>6} "
            f"{'GFLOP/s':>8}{'   tok/s' * self.items} {'% limit':>7}{ratios}"
        )

    def row(self, entry: dict[str, Any]) -> str:
        """One line. The limit is the larger of bytes / measured bandwidth and operations / measured peak."""
        head = f"{entry['case']:{self.width}} {entry['cache']:5} {entry['name']:18}"
        if entry["problem"] is not None:
            return f"{head} {entry['problem']}"
        bandwidth, speed, tokens, share = (_three(value) if value else "" for value in _rates(entry))
        spread = f"{duration(entry['min'])} .. {duration(entry['max'])}"
        ahead = entry["speedups"]
        ratios = (f"{f'{ahead[name]:.2f}' if name in ahead else '':>14}" for name in self.libraries)
        return (
            f"{head} {duration(entry['median']):>8} {spread:>20} {bandwidth:>6} {speed:>8}"
            f"{tokens.rjust(8 * self.items)} {share:>7}{''.join(ratios)}"
        ).rstrip()


def _rates(entry: dict[str, Any]) -> tuple[float, float, float, float]:
    """GB/s, GFLOP/s, tokens/s, and percent of the limit; 0 where it has none."""
    median = entry["median"]
    return (
        entry["nbytes"] / median / 1e9,
        entry["operations"] / median / 1e9,
        entry["items"] / median,
        100 * (entry["limit"] or 0) / median,
    )


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds * 1e9)} ns"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.15em .7em;text-align:right;white-space:nowrap}
td:first-child,th:first-child,td.l{text-align:left}tr.ours{font-weight:600}tbody tr:nth-child(even){background:#f4f4f4}
.warning{background:#fdd;padding:.5em 1em}svg{display:block}text{font:12px system-ui,sans-serif}"""


def page(report: dict[str, Any]) -> str:
    """A self-contained HTML page: what it ran on, then for each op and case a table and bars of the times."""
    check(report)
    machine, load = report["machine"], report["load"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Tilewright bench</title><style>{_STYLE}</style>",
        "<h1>Tilewright bench</h1>",
        f"<p>{_safe(machine['cpu'])}, {_safe(machine['isa'])}, {machine['threads']} of {machine['cores']} cores; "
        f"{_safe(versions)}; commit {_safe(machine['commit'] or 'of the package')}; {_safe(report['time'])}</p>",
    ]
    if gpu := machine.get("gpu"):
        parts.append(f"<p>On {_safe(gpu['name'])}, compute capability {_safe(gpu['capability'])}</p>")
    if not all(load[when]["quiet"] for when in ("before", "after")):
        parts.append("<p class=warning>The machine was not quiet: do not trust these figures.</p>")
    units = list(ceilings.UNITS)
    parts.append("<h2>Measured ceilings</h2><table><thead><tr><th>threads or device<th>memory GB/s")
    parts.extend(f"<th>{unit} Gop/s" for unit in units)
    parts.append("<tbody>")
    for n, found in report["ceilings"].items():
        cells = "".join(f"<td>{found[unit] / 1e9:.0f}" for unit in units)
        parts.append(f"<tr><td>{_safe(n)}<td>{found.get('read', found.get('copy')) / 1e9:.1f}{cells}")
    parts.append("</table>")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in report["results"]:
        groups.setdefault((entry["op"], entry["case"], entry["cache"]), []).append(entry)
    last_op = None
    for (op, case, cache), group in groups.items():
        if op != last_op:
            parts.append(f"<h2>{_safe(op)}</h2>")
            last_op = op
        parts.append(f"<h3>{_safe(case)}, {_safe(cache)}</h3>{_bars(group)}{_table(group)}")
    if report["skipped"]:
        parts.append("<h2>Skipped</h2><ul>")
        parts.extend(f"<li>{_safe(what)}: {_safe(why)}" for what, why in report["skipped"].items())
        parts.append("</ul>")
    return "\n".join(parts) + "\n"


def _safe(text: Any) -> str:
    return html.escape(str(text))


def _bars(group: list[dict[str, Any]]) -> str:
    """Bars as long as the median times; a line marks the limit of each."""
    timed = [entry for entry in group if entry["median"] is not None]
    if not timed:
        return ""
    longest = max(entry["median"] for entry in timed)
    label, width, height = 190, 480, 22
    lines = [f'<svg width="{label + width + 110}" height="{height * len(timed) + 4}" role="img">']
    for i, entry in enumerate(timed):
        y, length = i * height + 3, max(1.0, width * entry["median"] / longest)
        colour = "#2f7d4f" if entry["library"] == OURS else "#9aa5b1"
        lines.append(f'<text x="{label - 8}" y="{y + 13}" text-anchor="end">{_safe(entry["name"])}</text>')
        lines.append(f'<rect x="{label}" y="{y}" width="{length:.1f}" height="{height - 5}" fill="{colour}"/>')
        if entry["limit"]:
            x = label + min(width, width * entry["limit"] / longest)
            lines.append(f'<path d="M{x:.1f} {y - 2}v{height - 1}" stroke="#b00020" stroke-width="2"/>')
        lines.append(f'<text x="{label + length + 6:.1f}" y="{y + 13}">{duration(entry["median"])}</text>')
    return "".join([*lines, "</svg>"])


def _table(group: list[dict[str, Any]]) -> str:
    columns = ("candidate", "median", "min", "max", "GB/s", "GFLOP/s", "tok/s", "% of limit", "ahead of")
    rows = [f"<table><thead><tr><th>{'<th>'.join(columns)}<tbody>"]
    for entry in group:
        name = f"<tr{' class=ours' if entry['library'] == OURS else ''}><td>{_safe(entry['name'])}"
        if entry["problem"] is not None:
            rows.append(f"{name}<td class=l colspan=8>{_safe(entry['problem'])}")
            continue
        times = "".join(f"<td>{duration(entry[k])}" for k in ("median", "min", "max"))
        rates = "".join(f"<td>{_three(value) if value else ''}" for value in _rates(entry))
        ahead = ", ".join(f"{_safe(k)} {v:.2f} x" for k, v in entry["speedups"].items())
        rows.append(f"{name}{times}{rates}<td>{ahead}")
    rows.append("</table>")
    return "".join(rows)
