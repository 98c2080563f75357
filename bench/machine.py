"""What a measurement ran on, and whether the machine was quiet."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tilewright
from tilewright import _C

# Above these a neighbour is at work, and medians say little: peers whose pools spin fall by 2 to 20 times.
_STOLEN_LIMIT, _JITTER_LIMIT = 0.03, 0.05
_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "llama_cpp": "llama-cpp-python",
    "openvino": "openvino-genai",
}


@dataclass(frozen=True)
class Load:
    """load1: the system's load average; stolen: part of the cores' time that a spinning team did not get;
    jitter: how much longer than the fastest of equal spins the median one took."""

    load1: float
    stolen: float
    jitter: float

    @property
    def quiet(self) -> bool:
        """Whether figures taken now can be trusted. The load average lags a minute behind and does not count."""
        return self.stolen <= _STOLEN_LIMIT and self.jitter <= _JITTER_LIMIT

    def __str__(self) -> str:
        verdict = "quiet" if self.quiet else "NOT QUIET: do not trust these figures"
        return (
            f"load {self.load1:.2f}, {100 * self.stolen:.1f}% of the time stolen, "
            f"{100 * self.jitter:.1f}% jitter: {verdict}"
        )


def load(seconds: float = 0.3) -> Load:
    """Spin on every usable core for about `seconds` and see what others take from it."""
    cores = _C.usable_cpus()
    with threads(cores):
        iterations = 1_000_000  # a few ms
        _C.ceiling("fp32", None, iterations)
        rates = []
        wall, busy = time.perf_counter(), time.process_time()
        while not rates or time.perf_counter() - wall < seconds:
            rates.append(_C.ceiling("fp32", None, iterations))
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
    stolen = max(0.0, 1 - busy / (wall * cores))
    return Load(os.getloadavg()[0], stolen, max(rates) / statistics.median(rates) - 1)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch and Tilewright both use `n` threads inside."""
    torch_before, before = torch.get_num_threads(), _C.get_num_threads()
    torch.set_num_threads(n)
    tilewright.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(torch_before)
        # 0 follows torch, which is what gave the number before unless someone had set one.
        _C.set_num_threads(0)
        if _C.get_num_threads() != before:
            _C.set_num_threads(before)


def describe(n_threads: int, device: torch.device | None = None) -> dict[str, Any]:
    """CPU, ISA, threads, versions and commit, ready for JSON, and the GPU where ``device`` is one."""
    info = tilewright.info()
    return {
        **({} if device is None else {"gpu": gpu(device)}),
        "cpu": info["cpu"],
        "isa": info["isa"],
        "isa_found": list(info["isa_found"]),
        "cores": _C.usable_cpus(),
        "threads": n_threads,
        "system": platform.platform(),
        "versions": {"tilewright": tilewright.__version__, "python": platform.python_version(), **installed()},
        "commit": commit(),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """What torch says of it."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "l2": found.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def installed() -> dict[str, str]:
    """Versions of the libraries that benches compare with, for those that are here."""
    versions = {}
    for name, package in _PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    """The checkout's commit, "-dirty" appended where files differ from it; None in an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "csrc").is_dir():
        return None
    git = ["git", "-C", str(root)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def as_dict(before: Load, after: Load) -> dict[str, Any]:
    """Both looks at the load, for the report."""
    return {when: {**asdict(found), "quiet": found.quiet} for when, found in (("before", before), ("after", after))}
