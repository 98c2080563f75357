"""Times implementations of one op against each other on the same inputs, in one run.

Candidates take turns (A B A B ...), because what a neighbour or the clock does to one then happens to all. Each
result is first checked against the float64 reference. Cold: a call finds its operands in memory, not in a cache,
since calls walk through copies that together exceed any cache. Warm: every call has the same operands. On a GPU all of
this is the same but for the clock: `EventTimer` takes the device's own.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

COLD_BYTES = 256 << 20  # eight times the reference machine's L3, twice the largest L2 of a GPU
SMALL_COLD_BYTES = 8 << 20  # for layers of small models, whose weights stay in the L3 between two steps
ROUNDS = 7
_TURN = 0.06  # seconds a candidate is timed before the next one has its turn
_SAMPLE = 0.002  # seconds of calls in one sample, so that the clock's 50 ns do not show
# After an op the workers of torch's pool spin for some ms; nobody's turn begins before they sleep.
_SETTLE = 0.01

OURS = "tilewright"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What a call has to do at least: bytes read and written, and operations of a unit of `ceilings.UNITS`."""

    nbytes: int = 0
    operations: int = 0
    unit: str = "fp32"


@dataclass(frozen=True)
class Candidate:
    """One implementation: `run(*operands)`. Candidates of one library are spellings, of which the fastest counts."""

    name: str
    library: str
    run: Callable[..., Any]
    operands: tuple[Any, ...]
    work: Work


class WallTimer:
    """Seconds by the clock of the CPU, whose calls are over when they return."""

    def seconds(self, calls: Callable[[], None]) -> float:
        """What ``calls`` takes."""
        start = time.perf_counter()
        calls()
        return time.perf_counter() - start

    def cold_bytes(self, asked: int) -> int:
        """How much memory calls must walk through so that they find nothing in a cache that should not be there."""
        return asked


class EventTimer:
    """Seconds of a GPU between two events in the current stream of the current device: from the end of what was
    launched before to the end of the last call, pauses included where the CPU launches too slowly."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, calls: Callable[[], None]) -> float:
        """What ``calls`` takes."""
        self.start.record()
        calls()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def cold_bytes(self, asked: int) -> int:
        """The CPU's small sizes, for what stays in its L3, would stay in an L2 that a whole model does not fit into."""
        return COLD_BYTES if asked else 0


Timer = WallTimer | EventTimer


@dataclass(frozen=True)
class Case:
    """One shape of one op. `error` gives a result's relative error against the reference; None: nothing to check.
    Copies of the operands worth `cold_bytes` make the cold run; 0: there is only a warm one."""

    op: str
    name: str
    candidates: Sequence[Candidate]
    error: Callable[[Any], float] | None = None
    tolerance: float = 0.02
    cold_bytes: int = COLD_BYTES


@dataclass
class Result:
    """Times of one candidate: `samples[round][i]` are seconds a call. `problem`: why there are none."""

    op: str
    case: str
    cache: str  # "cold" or "warm"
    name: str
    library: str
    work: Work
    resident_bytes: int  # what the calls walked through
    samples: list[list[float]] = field(default_factory=list)
    error: float | None = None
    problem: str | None = None
    items: int = 0  # tokens a call handles, where that is what one asks for

    @property
    def times(self) -> list[float]:
        """All samples."""
        return [seconds for turn in self.samples for seconds in turn]

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def measure(case: Case, rounds: int = ROUNDS, *, turn: float = _TURN, timer: Timer | None = None) -> list[Result]:
    """Check every candidate of `case`, then time them in turns, cold and warm. Candidates that cannot run or are
    wrong are in the list too, with their problem and without samples. timer: default `WallTimer`."""
    timer = timer or WallTimer()
    with torch.no_grad():
        checked = [_check(case, candidate) for candidate in case.candidates]
        results = []
        for cache in ("cold", "warm"):
            if cache == "cold" and not case.cold_bytes:
                continue
            runners = []
            for candidate, (error, problem) in zip(case.candidates, checked, strict=True):
                sets = [candidate.operands]
                if cache == "cold" and problem is None:
                    sets = _copies(candidate.operands, timer.cold_bytes(case.cold_bytes))
                result = Result(
                    case.op,
                    case.name,
                    cache,
                    candidate.name,
                    candidate.library,
                    candidate.work,
                    len(sets) * operand_bytes(candidate.operands),
                    error=error,
                    problem=problem,
                )
                results.append(result)
                if problem is None:
                    runners.append(_Runner(candidate.run, sets, result, timer))
            _take_turns(runners, rounds, turn)
        return results


def _check(case: Case, candidate: Candidate) -> tuple[float | None, str | None]:
    """(relative error, problem)."""
    try:
        out = candidate.run(*candidate.operands)
    except NotImplementedError as e:
        return None, f"not supported: {e}"
    if case.error is None:
        return None, None
    error = case.error(out)
    # A NaN compares false with everything.
    if not error <= case.tolerance:
        return error, f"wrong: relative error {error:.3g}, at most {case.tolerance:.3g} expected"
    return error, None


class _Runner:
    """A candidate with its copies and the number of calls that make a sample."""

    def __init__(self, run: Callable[..., Any], sets: list[tuple[Any, ...]], result: Result, timer: Timer) -> None:
        self.run, self.sets, self.result, self.timer = run, sets, result, timer
        self.next = 0
        for operands in sets:  # what is made once for each, such as a GPU's order of a weight
            run(*operands)
        self.seconds = self.time(1)
        if self.seconds < _SAMPLE:
            self.seconds = self.time(2)
        self.calls = max(1, round(_SAMPLE / self.seconds))

    def time(self, calls: int) -> float:
        """Seconds a call, over `calls` of them."""

        def loop() -> None:
            run, sets, at, n = self.run, self.sets, self.next, len(self.sets)
            for _ in range(calls):
                run(*sets[at])
                at = at + 1 if at + 1 < n else 0
            self.next = at

        return self.timer.seconds(loop) / calls


def _take_turns(runners: list[_Runner], rounds: int, turn: float) -> None:
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for runner in runners:
                time.sleep(_SETTLE)
                if runner.seconds < turn:  # longer calls get over a lost cache within themselves
                    runner.time(1)
                samples: list[float] = []
                end = time.perf_counter() + turn
                while not samples or time.perf_counter() < end:
                    samples.append(runner.time(runner.calls))
                runner.result.samples.append(samples)
    finally:
        if collecting:
            gc.enable()


def _copies(operands: tuple[Any, ...], nbytes: int) -> list[tuple[Any, ...]]:
    """`operands` and as many deep copies as make `nbytes` together."""
    each = operand_bytes(operands)
    count = max(1, -(-nbytes // max(each, 1)))
    return [operands, *(copy.deepcopy(operands) for _ in range(count - 1))]


def operand_bytes(value: Any) -> int:
    """Bytes of memory behind tensors and quantised weights, in any nesting of tuples and lists."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, tuple | list):
        return sum(map(operand_bytes, value))
    return int(getattr(value, "nbytes", 0))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """max|out - reference| / max|reference|, on the reference's device; NaN where either has one."""
    difference = (out.to(reference.device).double() - reference.double()).abs().max()
    return float(difference / reference.double().abs().max().clamp(min=1e-30))


def under_pytest(benchmark: Any, case: Case) -> None:
    """Time our candidate of `case` with pytest-benchmark's fixture, warm: for following one kernel over commits."""
    candidate = next(c for c in case.candidates if c.library == OURS)
    with torch.no_grad():
        _, problem = _check(case, candidate)
        if problem is not None:
            raise RuntimeError(f"{case.op} {case.name}: {problem}")
        benchmark(candidate.run, *candidate.operands)
