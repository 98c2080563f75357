"""The bench harness: what it times and in which order, what it makes of the times, and its reports."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright import _C, QuantizedKV, bench
from tilewright.bench import ceilings, compare_llm, harness, machine, report
from tilewright.bench.harness import OURS, Candidate, Case, Result, Work


def candidate(run: Callable[..., Any], name: str = OURS, operands: tuple[Any, ...] = ()) -> Candidate:
    return Candidate(name, name.split()[0], run, operands, Work(nbytes=100, operations=200))


def result(name: str, *turns: list[float], work: Work | None = None, **options: Any) -> Result:
    work = work or Work(100, 200)
    return Result("norm", "1x4", "warm", name, name.split()[0], work, 1 << 20, list(turns), **options)


@pytest.fixture
def fixed_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GB/s and 1000 Gop/s, without measuring."""
    monkeypatch.setattr(ceilings, "read", lambda n_threads, nbytes=0: 100e9)
    monkeypatch.setattr(ceilings, "peak", lambda unit, n_threads: 1000e9)


@pytest.fixture
def document(fixed_ceilings: None) -> dict[str, Any]:
    """A report with everything that may be in one."""
    found = [
        result(OURS, [2e-9, 4e-9], [3e-9], error=1e-7),
        result("torch <b>one", [9e-9]),
        result("torch two", [6e-9], items=512),
        result("llama_cpp", problem="not supported: & so on"),
    ]
    return {
        "schema": report.SCHEMA,
        "time": "2026-01-02T03:04:05+00:00",
        "machine": machine.describe(2),
        "load": machine.as_dict(machine.Load(0.1, 0.0, 0.0), machine.Load(3.0, 0.5, 0.2)),
        "ceilings": {"1": {"read": 1e10, "fp32": 1e11, "bf16": 2e11, "int8": 4e11}},
        "skipped": {"openvino": "not installed"},
        "results": report.entries(found, ceilings.Cpu(2)),
    }


def test_candidates_alternate() -> None:
    calls: list[str] = []

    def noting(name: str) -> Callable[[], None]:
        def run() -> None:
            if not calls or calls[-1] != name:
                calls.append(name)

        return run

    case = Case("norm", "x", [candidate(noting("a")), candidate(noting("b"), "torch")], cold_bytes=0)
    found = harness.measure(case, rounds=3, turn=1e-4)
    # Once to check and once to calibrate, then three rounds.
    assert calls == ["a", "b"] * 5
    assert [r.cache for r in found] == ["warm", "warm"]
    assert all(len(r.samples) == 3 and all(turn for turn in r.samples) for r in found)
    assert all(0 < min(r.times) <= r.median <= max(r.times) for r in found)


def test_cold_walks_through_copies_warm_does_not() -> None:
    seen: list[int] = []

    def run(t: torch.Tensor) -> None:
        seen.append(t.data_ptr())

    megabyte = torch.ones(1 << 18)
    case = Case("norm", "x", [candidate(run, operands=(megabyte,))], cold_bytes=4 << 20)
    cold, warm = harness.measure(case, rounds=1, turn=1e-4)
    assert (cold.cache, cold.resident_bytes) == ("cold", 4 << 20)
    assert (warm.cache, warm.resident_bytes) == ("warm", 1 << 20)
    assert len(set(seen)) == len(set(seen[1:5])) == 4  # the first call was the check
    assert seen[1:5] == seen[5:9]


def not_supported() -> None:
    raise NotImplementedError("no such unit")


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (lambda: torch.tensor([1.0, 2.1]), "wrong: relative error 0.05"),
        (lambda: torch.tensor([1.0, float("nan")]), "wrong: relative error nan"),
        (not_supported, "not supported: no such unit"),
    ],
)
def test_wrong_results_are_not_timed(run: Callable[[], Any], problem: str) -> None:
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    case = Case(
        "norm",
        "x",
        [candidate(run), candidate(reference.float, "torch")],
        lambda out: harness.relative_error(out, reference),
        tolerance=0.01,
        cold_bytes=0,
    )
    bad, good = harness.measure(case, rounds=1, turn=1e-4)
    assert bad.problem is not None and bad.problem.startswith(problem) and not bad.samples
    assert good.problem is None and good.samples and good.error == 0


def test_operand_bytes() -> None:
    weight = type("Weight", (), {"nbytes": 24})()
    nested = (torch.ones(3), [torch.ones(2, dtype=torch.bfloat16)], weight, None, "x")
    assert harness.operand_bytes(nested) == 12 + 4 + 24
    assert harness.operand_bytes(torch.ones(1).expand(1000)) == 4


def test_entries(document: dict[str, Any]) -> None:
    ours, one, two, failed = document["results"]
    assert (ours["median"], ours["min"], ours["max"]) == (3e-9, 2e-9, 4e-9)
    assert ours["limit"] == pytest.approx(1e-9)  # 100 bytes at 100 GB/s; 200 operations take a fifth of that
    assert ours["speedups"] == {"torch": pytest.approx(2.0)}  # the faster spelling counts
    assert one["speedups"] == two["speedups"] == failed["speedups"] == {}
    assert failed["median"] is None and failed["samples"] == []


def test_limit_is_the_larger_one(fixed_ceilings: None) -> None:
    found = [result(OURS, [1e-6], work=Work(100, 20_000)), result("torch", [1e-6], work=Work())]
    by_arithmetic, none = report.entries(found, ceilings.Cpu(1))
    assert by_arithmetic["limit"] == pytest.approx(2e-8) and none["limit"] is None


def test_json_round_trip(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "norm.json"
    report.write_json(document, path)
    assert report.check(json.loads(path.read_text())) == document


def broken(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "expected an object", []
    for name in ("schema", "machine", "results"):
        yield name, {k: v for k, v in document.items() if k != name}
    yield "schema must be 1", {**document, "schema": 2}
    for name, value in (("median", "fast"), ("samples", None), ("library", 3), ("nbytes", 1.5)):
        changed = copy.deepcopy(document)
        changed["results"][1][name] = value
        yield rf"results\[1\].{name}", changed
    changed = copy.deepcopy(document)
    changed["results"][0]["problem"] = "slow"
    yield "either samples or a problem", changed


def test_check_names_the_field(document: dict[str, Any]) -> None:
    for message, changed in broken(document):
        with pytest.raises(ValueError, match=message):
            report.check(changed)


def test_table(document: dict[str, Any]) -> None:
    table = report.Table(["torch"], 8)
    ours, *_, failed = (table.row(entry) for entry in document["results"])
    assert "x torch" in table.header() and "tok/s" not in table.header()
    assert ours.split()[:3] == ["1x4", "warm", OURS]
    assert ours.split()[-2:] == ["33.3", "2.00"]
    assert len(ours) == len(table.header())
    assert failed.endswith("not supported: & so on")


class PageReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_escaped_and_self_contained(document: dict[str, Any]) -> None:
    reader = PageReader()
    reader.feed(report.page(document))
    reader.close()
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "b"}
    assert not any({"src", "href"} & set(attributes) for _, attributes in reader.tags)
    for text in ("torch <b>one", "not supported: & so on", "not quiet", "torch 2.00 x", "openvino: not installed"):
        assert text in reader.text
    assert sum(tag == "rect" for tag, _ in reader.tags) == 3


def test_duration() -> None:
    times = (2.5, 0.0123, 4.56e-5, 7.89e-7)
    assert [report.duration(t) for t in times] == ["2.50 s", "12.3 ms", "45.6 us", "789 ns"]


def test_load_and_threads() -> None:
    before = torch.get_num_threads(), _C.get_num_threads()
    with machine.threads(3):
        assert (torch.get_num_threads(), _C.get_num_threads()) == (3, 3)
        found = machine.load(0.02)
        assert (torch.get_num_threads(), _C.get_num_threads()) == (3, 3)
    assert (torch.get_num_threads(), _C.get_num_threads()) == before
    assert 0 <= found.stolen <= 1 and found.jitter >= 0
    assert machine.Load(9.0, 0.0, 0.01).quiet and not machine.Load(0.0, 0.2, 0.0).quiet


@pytest.mark.parametrize("unit", ceilings.UNITS)
def test_ceiling_of_arithmetic(unit: str) -> None:
    assert _C.ceiling(unit, None, 10_000) > 1e6


def test_ceiling_of_reading() -> None:
    data = torch.ones(3 << 10, dtype=torch.uint8)
    assert _C.ceiling("read", data, 100) > 1e6
    for bad in (None, data[:-1], data.float(), data.view(3, -1), data[::2]):
        with pytest.raises(ValueError, match="ceiling: data must be"):
            _C.ceiling("read", bad, 1)
    with pytest.raises(ValueError, match=r'kind must be .* got "fp8"'):
        _C.ceiling("fp8", None, 1)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        _C.ceiling("fp32", None, 0)


def test_read_measures_four_sizes_an_octave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_read", lambda n_threads, size: size)
    assert ceilings.read(1, 1) == 1 << 16
    assert ceilings.read(1, 1 << 20) == 1 << 20
    assert ceilings.read(1, (1 << 20) + 1) == 5 << 18
    assert ceilings.read(1, 1 << 40) == ceilings.MEMORY == ceilings.read(1)


# --- on a GPU, as far as there need not be one ---

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: no bench runs on one")


class StandInEvent:
    """Of torch.cuda.Event: the stream's time is a count of what was recorded and called."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None
        self.over = False

    def record(self) -> None:
        self.at, self.over = StandInEvent.now, False

    def synchronize(self) -> None:
        self.over = True

    def elapsed_time(self, end: StandInEvent) -> float:
        assert end.over, "the end was not waited for"
        return (end.at - self.at) * 1e3


def test_event_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds come from the events, whatever the CPU's clock says, and cold sizes exceed an L2."""
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    seen: list[int] = []

    def takes(seconds: float) -> Callable[[torch.Tensor], None]:
        def run(t: torch.Tensor) -> None:
            seen.append(t.data_ptr())
            StandInEvent.now += seconds

        return run

    data = torch.ones(48 << 18)  # 48 MB
    case = Case("norm", "x", [candidate(takes(0.5), operands=(data,))], cold_bytes=1)
    timer = harness.EventTimer()
    cold, warm = harness.measure(case, rounds=2, turn=0.0, timer=timer)
    assert cold.times == pytest.approx([0.5] * 2) and warm.times == pytest.approx([0.5] * 2)
    assert cold.resident_bytes == 6 * data.nbytes >= harness.COLD_BYTES
    assert len(set(seen[1:7])) == 6  # every copy was used before the clock ran
    assert timer.cold_bytes(0) == 0 and harness.WallTimer().cold_bytes(5) == 5


def test_ceilings_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 1 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    calls: list[str] = []

    class Timer(harness.WallTimer):
        def seconds(self, run: Callable[[], None]) -> float:
            calls.append("timed")
            run()
            return 2.0

    found = ceilings.Gpu(torch.device("cpu"), Timer(), side=32, memory_bytes=1 << 22)
    assert found.bandwidth() == (1 << 22) / 2.0 and len(calls) == 10
    assert found.bandwidth(1 << 30) == found.bandwidth((1 << 19) + 1) == found.bandwidth() and len(calls) == 10
    assert found.bandwidth(5) == (1 << 19) * 8 / 2.0  # eight passes within half of the L2
    for unit in ceilings.UNITS:
        assert found.peak(unit) == found.peak(unit) == 2 * 32**3 / 2.0
    assert len(calls) == 50
    by_copy = report.entries([result(OURS, [1e-6], work=Work(1 << 20, 0))], found)
    assert by_copy[0]["limit"] == (1 << 20) / found.bandwidth()


@pytest.mark.parametrize("op", bench.OPS)
def test_cases_are_made_on_the_device(op: str) -> None:
    """A meta tensor stands for one on a GPU: nothing that a candidate gets is left on the CPU."""

    def devices(value: Any) -> set[str]:
        if isinstance(value, tuple | list):
            return set().union(*map(devices, value))
        if isinstance(value, QuantizedKV):
            return devices(value.tensors())
        value = getattr(value, "packed", value)
        return {value.device.type} if isinstance(value, torch.Tensor) else set()

    module = bench.module(op)
    shapes = [s for s in module.GPU_SHAPES if getattr(s, "seq_k", 0) <= 1024 and getattr(s, "n", 0) <= 4096]
    for shape in shapes[:: max(1, len(shapes) // 4)]:
        for made in module.case(shape, ("torch",), torch.device("meta")).candidates:
            assert devices(made.operands) == {"meta"}, (shape.name, made.name)
    assert bool(shapes) == (op != "call")


@pytest.mark.parametrize(
    ("gpus", "device", "message"), [(0, "cuda", "finds no GPU here"), (0, "cuda:3", "no GPU"), (2, "cuda:2", "2 GPUs")]
)
def test_without_the_gpu(
    gpus: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert bench.main(["norm", "--device", device]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"--device {device}" in err and message in err


@NEEDS_GPU
def test_main_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "norm.json"
    assert bench.main(["norm", "--device", "cuda", "--shapes", "1x576", "--rounds", "1", "--json", str(path)]) == 0
    found = report.check(json.loads(path.read_text()))
    assert found["machine"]["gpu"]["name"] in capsys.readouterr().out
    assert found["ceilings"]["cuda:0"]["copy"] > 1e9
    assert all(e["median"] and e["limit"] for e in found["results"])


@NEEDS_GPU
@pytest.mark.parametrize("op", bench.OPS)
def test_cases_are_right_on_a_gpu(op: str) -> None:
    module = bench.module(op)
    for shape in module.GPU_SHAPES:
        case = module.case(shape, ("torch",), torch.device("cuda"))
        found = harness.measure(case, rounds=1, turn=1e-4, timer=harness.EventTimer())
        assert all(r.problem is None and r.samples for r in found), found


# A small shape of each op, with its peer: both must agree with the reference.
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("attention", "decode 1x9(3) 1024 keys bf16"),
        ("attention", "prefill 1x9(3)x512x64 bf16"),
        ("linear", "Q4_1 M=1 576x576"),
        ("norm", "rms+res 1x576 fp32"),
        ("rope", "1x9(3)x1x64 fp32"),
        ("kv", "decode 1x3x1x64 into 1024"),
        ("call", "binding of 4 tensors with out"),
    ],
)
def test_cases_are_right(op: str, name: str) -> None:
    module = bench.module(op)
    (shape,) = (s for s in module.SHAPES if s.name == name)
    found = harness.measure(module.case(shape, ("torch",)), rounds=1, turn=1e-4)
    assert {r.library for r in found} >= {OURS, "torch"}
    assert all(r.problem is None and r.samples for r in found)


@pytest.mark.parametrize("op", bench.OPS)
def test_shapes_have_names_of_their_own(op: str) -> None:
    names = [shape.name for shape in bench.module(op).SHAPES]
    assert len(set(names)) == len(names)


def test_main_writes_reports(fixed_ceilings: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "norm.json", tmp_path / "norm.html"
    arguments = ["--rounds", "1", "--threads", "1", "--json", str(files[0]), "--html", str(files[1])]
    assert bench.main(["norm", "--shapes", "1x576", "--peers", "torch", *arguments]) == 0
    found = report.check(json.loads(files[0].read_text()))
    assert {(e["case"], e["cache"], e["library"]) for e in found["results"]} == {
        ("rms+res 1x576 fp32", cache, library) for cache in ("cold", "warm") for library in (OURS, "torch")
    }
    assert found["machine"]["threads"] == 1 and found["machine"]["versions"]["torch"]
    assert "rms+res 1x576 fp32" in files[1].read_text()
    assert "x torch" in capsys.readouterr().out
    assert bench.main(["norm", "--shapes", "1x576", "--rounds", "1", "--peers", "openvino"]) == 0
    out = capsys.readouterr().out
    assert "skipped openvino: " in out and "x openvino" not in out
    assert bench.main(["norm", "--shapes", "no such shape", "--peers", "none"]) == 1
    assert "no case of norm matches --shapes no such shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attn"], "invalid choice"),
        (["--peers", "onnx"], "unknown onnx"),
        (["--threads", "0"], "expected a whole number"),
        (["--rounds", "x"], "expected a whole number"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_compare_llm(monkeypatch: pytest.MonkeyPatch, fixed_ceilings: None) -> None:
    order: list[str] = []
    begun: list[int] = []

    def measured(engine: str, model: Path, n_threads: int, prompts: list[list[int]]) -> dict[str, list[float]]:
        order.append(engine)
        begun.extend(prompt[0] for prompt in prompts)
        assert all(len(prompt) == 512 for prompt in prompts)
        if engine == "openvino":
            raise RuntimeError("exit status 1: no plugin")
        return {"prefill": [1.0, 2.0], "decode": [12.8, 25.6]}

    monkeypatch.setattr("tilewright.io.pull.resolve", Path)
    monkeypatch.setattr(compare_llm, "_works", lambda path: (Work(10, 1000, "int8"), Work(20, 40, "int8")))
    monkeypatch.setattr(compare_llm, "_token_ids", lambda path: list(range(7000)))
    monkeypatch.setattr(compare_llm, "_measure", measured)
    found, failed = compare_llm.compare("m.gguf", ("torch", "openvino", "llama_cpp"), 3, 2)
    assert order == [OURS, "llama_cpp", "openvino"] + [OURS, "llama_cpp"] * 2
    assert len(set(begun)) == len(begun)  # no prompt twice
    assert failed == {"openvino": "exit status 1: no plugin"}
    assert [(r.case, r.library) for r in found] == [(c, n) for c in compare_llm.CASES for n in (OURS, "llama_cpp")]
    assert found[0].samples == [[1.0, 2.0]] * 3 and found[2].samples == [[0.1, 0.2]] * 3
    assert [e["speedups"] for e in report.entries(found, ceilings.Cpu(2))] == [{"llama_cpp": 1.0}, {}] * 2
    with pytest.raises(ValueError, match=r"must be a \.gguf file"):
        compare_llm.compare("folder", (), 1, 1)
