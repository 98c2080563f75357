"""What quantising costs: perplexity and KL divergence of the default model's weights, rounded by each method.

`python -m bench.bench_quantize [--json FILE] [--work FOLDER]`. The model's GGUF weights, dequantised, are the exact
model; they are quantised into folders that are read back. Calibration text: the language reference that comes with
Python (pydoc_data.topics) without its last 4,096 tokens. Compared on: those, and 4,096 tokens of the GPL, a text of
another kind. With --work a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright import _C, AutoTokenizer
from tilewright.io.pull import resolve
from tilewright.models.calibration import windows
from tilewright.models.divergence import divergence
from tilewright.models.layer_quantizer import CALIBRATED, Recipe
from tilewright.models.quantize import quantize_checkpoint, sizes
from tilewright.quant.methods.grid import Settings

from . import machine

MODEL = "smollm2"
SAMPLES, SEQ_LEN = 128, 512
COMPARED, WINDOW = 4096, 2048
_GPL = Path("/usr/share/common-licenses/GPL-3")  # as Debian ships it


@dataclass(frozen=True)
class Case:
    """One folder: a method, bits, and columns a scale, symmetric."""

    method: str
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.method} int{self.bits} g{self.group_size}"


CASES = (
    *(Case("rtn", 8, group_size) for group_size in (32, 128)),
    *(Case(method, 4, group_size) for group_size in (32, 128) for method in ("rtn", "hqq", "gptq", "awq")),
)


class WholeGroups(Recipe):
    """Groups of the size that is asked for, the last of a row short where it has to be, as the packed layout has them;
    `tilewright quantize` takes smaller groups there, because compressed-tensors knows no short ones."""

    def settings(self, module: str, columns: int, dtype: torch.dtype) -> Settings | None:
        found = super().settings(module, columns, dtype)
        return found and Settings(found.bits, self.group_size, found.symmetric, found.scale_dtype)


def main(argv: list[str] | None = None) -> int:
    """Measure the cases that `argv` (default: the process's arguments) names and print a table."""
    parser = argparse.ArgumentParser(prog="bench_quantize", description=__doc__)
    parser.add_argument(
        "--cases", default="", metavar="TEXT[,TEXT]", help="only cases whose name contains one of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep folders and results there, and go on from them"
    )
    options = parser.parse_args(argv)
    parts = [part for part in options.cases.split(",") if part]
    cases = [case for case in CASES if not parts or any(part in case.name for part in parts)]
    with tempfile.TemporaryDirectory() as temporary:
        return _run(cases, options.work or Path(temporary), options.json)


def _run(cases: list[Case], work: Path, file: Path | None) -> int:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    calibration, texts = _texts(tokenizer)
    print(f"{'case':>14} {'bits':>5} " + " ".join(f"{f'{name}: ppl':>12} {'KL':>8} {'same':>6}" for name in texts))
    results = [_result(case, path, work, calibration, texts) for case in cases]
    if file is not None:
        document = {
            "schema": 1,
            "time": began,
            "machine": machine.describe(_C.get_num_threads()),
            "model": MODEL,
            "calibration": {"samples": SAMPLES, "seq_len": SEQ_LEN, "text": "pydoc_data.topics"},
            "texts": {
                name: {"tokens": ids.numel(), "window": WINDOW, "sha256": _digest(ids)} for name, ids in texts.items()
            },
            "results": results,
        }
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _texts(tokenizer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Calibration windows, and the windows to compare on by their texts' names."""
    from pydoc_data.topics import topics

    reference = torch.tensor(tokenizer.encode("\n".join(topics.values())))
    found = windows(reference[:-COMPARED], [], SEQ_LEN)
    calibration = found[torch.arange(SAMPLES) * len(found) // SAMPLES]
    gpl = torch.tensor(tokenizer.encode(_GPL.read_text(encoding="utf-8"))[:COMPARED])
    return calibration, {"gpl": windows(gpl, [], WINDOW), "python": windows(reference[-COMPARED:], [], WINDOW)}


def _result(
    case: Case, path: Path, work: Path, calibration: torch.Tensor, texts: dict[str, torch.Tensor]
) -> dict[str, Any]:
    folder, file = work / case.name.replace(" ", "-"), work / f"{case.name.replace(' ', '-')}.json"
    if not file.is_file():
        start = time.perf_counter()
        if not (folder / "config.json").is_file() or (folder / ".partial").is_dir():
            recipe = WholeGroups(case.method, case.bits, case.group_size)
            quantize_checkpoint(path, folder, recipe, calibration=calibration if case.method in CALIBRATED else None)
        seconds = time.perf_counter() - start  # of what was left to do
        found = {name: asdict(divergence(path, folder, ids)) for name, ids in texts.items()}
        result = {"case": case.name, **asdict(case), "bits_per_weight": sizes(folder)[1], "seconds": seconds, **found}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(file.read_text(encoding="utf-8"))
    columns = (
        f"{result[name]['perplexity_after']:>12.3f} {result[name]['kl']:>8.4f} {result[name]['same_choice']:>6.1%}"
        for name in texts
    )
    print(f"{case.name:>14} {result['bits_per_weight']:>5.2f} " + " ".join(columns), flush=True)
    return result


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
