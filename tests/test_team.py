"""The thread team: same bits with any number of threads, no hang, and right beside forks, Python threads, exceptions,
torch's own pool and the interpreter's end."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from compare import assert_same_bits
from fresh import run_fresh
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tilewright
from tilewright import _C, QuantizedWeight, attention, quantize_weight, quantized_linear

X = torch.randn(9, 256, generator=torch.Generator().manual_seed(2))


@functools.cache  # not at import: a team that hangs must hang inside a test
def weight() -> QuantizedWeight:
    return quantize_weight(torch.randn(512, 256, generator=torch.Generator().manual_seed(1)))


@functools.cache
def expected_of_x() -> Tensor:
    return quantized_linear(X, weight())


@pytest.fixture(scope="module")
def stderr(request: pytest.FixtureRequest) -> int:
    """The descriptor that stderr has outside of pytest's capturing."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.dup(2)


@pytest.fixture(autouse=True)
def _limits(stderr: int) -> Iterator[None]:
    """A hang ends the run with every thread's stack (no Python handler runs while a kernel waits); and the next test
    follows torch again."""
    threads = torch.get_num_threads()
    faulthandler.dump_traceback_later(90, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(threads)
    _C.set_num_threads(0)


def work(seed: int = 0) -> tuple[Tensor, ...]:
    """Calls that use the team in each of its ways: ranges, tasks, decode and merge, prefill."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 8, 70, 32, generator=g), torch.randn(1, 4, 600, 32, generator=g)
    x = torch.randn(40, 256, generator=g)
    return (
        attention(q, k, k, causal="bottom_right"),
        attention(q[:, :, :2], k, k, causal="bottom_right"),
        quantized_linear(x, weight()),
        quantized_linear(x[:1], weight(), activation="fp32"),
    )


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_any_number_of_threads(same_bits: Callable) -> None:
    first = same_bits(work)
    for threads in (8, 1, 3, 2, 64) * 5:  # growing and shrinking between calls
        tilewright.set_num_threads(threads)
        assert same(work(), first)


def test_many_small_jobs_do_not_hang() -> None:
    """Jobs of a few microseconds, one after the other and with pauses in which workers fall asleep."""
    x, expected = torch.randn(9, 256), None
    for threads in (2, 3, 8):
        tilewright.set_num_threads(threads)
        for i in range(1500):
            out = quantized_linear(x, weight())
            expected = out if expected is None else expected
            if i % 100 == 0:
                assert torch.equal(out, expected)
                time.sleep(0.001)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_many_python_threads_at_once(threads: int) -> None:
    tilewright.set_num_threads(threads)
    expected = [work(seed) for seed in range(4)]
    wrong, start = [], threading.Barrier(6)

    def run(index: int) -> None:
        start.wait()
        for i in range(15):
            seed = (index + i) % 4
            if not same(work(seed), expected[seed]):
                wrong.append((index, i))

    callers = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_python_threads_that_come_and_go() -> None:
    """Each thread leaves its scratch memory and its place behind; the process must not keep what they used."""
    torch.set_num_threads(1)  # torch's pool has workers for each calling thread
    tilewright.set_num_threads(3)
    expected, results = work(), []

    def run(times: int) -> int:
        """Threads of the process once those that ended are gone."""
        for _ in range(times):
            caller = threading.Thread(target=lambda: results.append(same(work(), expected)))
            caller.start()
            caller.join()
        time.sleep(0.3)
        return len(os.listdir("/proc/self/task"))

    few, many = run(5), run(40)
    for _ in range(20):  # the OpenMP runtime's workers of an ended thread spin a little before they leave
        if many <= few:
            break
        time.sleep(0.1)
        many = len(os.listdir("/proc/self/task"))
    assert many <= few, "threads pile up"
    assert results == [True] * 45


def in_fork(function: Callable[[], bool]) -> int:
    """Exit status of a forked child that runs ``function``."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # ends a child that hangs inside a kernel
            status = 0 if function() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_fork() -> None:
    """A child starts its own workers, with any number of threads; so does its own child; the parent goes on."""
    expected = work()
    for threads in (1, 2, 3, 8):
        tilewright.set_num_threads(threads)
        assert same(work(), expected)
        for _ in range(3):
            assert in_fork(lambda: same(work(), expected) and same(work(), expected)) == 0
        assert in_fork(lambda: same(work(), expected) and in_fork(lambda: same(work(), expected)) == 0) == 0
        assert same(work(), expected)


def test_fork_while_other_threads_use_the_team() -> None:
    tilewright.set_num_threads(2)
    expected, alone, stop = work(), expected_of_x(), threading.Event()

    def busy() -> None:
        while not stop.is_set():
            work()

    callers = [threading.Thread(target=busy) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        statuses = [in_fork(lambda: torch.equal(quantized_linear(X, weight()), alone)) for _ in range(10)]
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert statuses == [0] * 10
    assert same(work(), expected)


class Quantised(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return quantized_linear(X + index * 0, weight())


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_workers(workers: int) -> None:
    tilewright.set_num_threads(2)
    expected_of_x()  # the team exists before the fork
    context = multiprocessing.get_context("fork") if workers else None
    timeout = 60 if workers else 0
    loader = DataLoader(Quantised(), 4, num_workers=workers, multiprocessing_context=context, timeout=timeout)
    for batch in loader:
        assert torch.equal(batch, expected_of_x().expand(4, -1, -1))


def test_after_an_exception() -> None:
    """Bad input raises on the calling thread and leaves the team usable, many times over."""
    tilewright.set_num_threads(3)
    expected = work()
    q = torch.randn(1, 2, 40, 16)
    for _ in range(20):
        with pytest.raises(ValueError):
            quantized_linear(torch.randn(3, 255), weight())
        with pytest.raises(ValueError):
            attention(q, q, q, mask=torch.ones(3, 3, dtype=torch.bool))
        with pytest.raises(IndexError):
            weight().rows(torch.tensor([512]))
        with pytest.raises(NotImplementedError):
            attention(*[torch.zeros(1, 1, 1, 600)] * 3)
    assert same(work(), expected)


def test_between_torch_ops() -> None:
    """torch's pool and ours in turn, both with workers that may still spin."""
    torch.set_num_threads(2)
    expected = work()
    a = torch.randn(300, 300)
    product = a @ a
    for _ in range(30):
        assert torch.equal(a @ a, product)
        assert same(work(), expected)
    for threads in (1, 2):  # ours follows
        torch.set_num_threads(threads)
        assert tilewright.get_num_threads() == min(threads, _C.usable_cpus())
        assert same(work(), expected)


def test_calls_from_inside_torch_functions() -> None:
    """A backward runs on autograd's own threads, a hook calls an op inside another op's backward."""
    tilewright.set_num_threads(2)
    x = X.clone().requires_grad_()
    inner = []
    out = quantized_linear(x, weight())
    out.register_hook(lambda grad: inner.append(quantized_linear(X, weight())))
    out.sum().backward()
    assert torch.equal(inner[0], expected_of_x()) and x.grad.shape == x.shape


def test_number_of_threads() -> None:
    usable = _C.usable_cpus()
    assert 1 <= usable <= len(os.sched_getaffinity(0))
    if "TILEWRIGHT_NUM_THREADS" not in os.environ:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            assert tilewright.get_num_threads() == min(threads, usable)
    tilewright.set_num_threads(5)
    torch.set_num_threads(1)
    assert tilewright.get_num_threads() == 5
    for bad in (0, -1, 1025, 2.0, "2", True, None):
        with pytest.raises(ValueError, match="whole number from 1 to 1024"):
            tilewright.set_num_threads(bad)
    assert tilewright.get_num_threads() == 5


SAY = "import tilewright, torch; torch.set_num_threads({}); print(tilewright.get_num_threads())"


def test_environment_variable() -> None:
    good = {"1": 1, "3": 3, "1024": 1024, "": 1}
    bad = ("0", "-1", "1025", "two", "2x", "2.0", " ", "99999999999999999999")
    results = run_fresh(*(({"TILEWRIGHT_NUM_THREADS": value}, SAY.format(1)) for value in (*good, *bad)))
    for value, result in zip(good, results, strict=False):
        assert (result.status, result.output.strip()) == (0, str(good[value])), value
    for value, result in zip(bad, results[len(good) :], strict=True):
        last = result.output.strip().splitlines()[-1]
        assert result.status == 1 and "TILEWRIGHT_NUM_THREADS must be a whole number from 1 to 1024, got " in last, (
            value
        )
        assert f'"{value}"' in last and last.startswith(("ImportError", "ValueError"))


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset (util-linux)")
def test_affinity_bounds_the_threads() -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    code = "from tilewright import _C\nimport tilewright, torch\ntorch.set_num_threads(8)\n" + WORKS
    (result,) = run_fresh(({}, code), prefix=("taskset", "-c", cpu))
    assert (result.status, result.output.split()) == (0, ["1", "1", "True"]), result.output


# Prints the usable cores, the threads in use, and whether two runs agree.
WORKS = """
def run():
    q = torch.ones(1, 4, 100, 16)
    return tilewright.attention(q, q, q)
first = run()
print(_C.usable_cpus(), tilewright.get_num_threads(), torch.equal(first, run()))
"""

# Hides the machine's cgroup files behind its own, in a mount namespace that ends with the process.
_HIDE = 'mount -t tmpfs none /sys/fs/cgroup || exit 77; exec "$@"'
_SET_QUOTA = """
import os
group = next({group})
os.makedirs(group, exist_ok=True)
for name, text in {files}.items():
    open(group + "/" + name, "w").write(text)
from tilewright import _C
import tilewright, torch
torch.set_num_threads(64)
"""
_LINES = '(line.rstrip("\\n").split(":", 2) for line in open("/proc/self/cgroup"))'
_GROUPS = {
    1: f'("/sys/fs/cgroup/" + c + path for _, c, path in {_LINES} if "cpu" in c.split(","))',
    2: f'("/sys/fs/cgroup" + path for _, c, path in {_LINES} if not c)',
}


@pytest.mark.parametrize("version", [1, 2])
def test_cgroup_quota_bounds_the_threads(version: int) -> None:
    command = ("unshare", "-m", "sh", "-c", "mount -t tmpfs none /sys/fs/cgroup")
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount in a namespace of its own (CAP_SYS_ADMIN), to show a cgroup quota")
    if not any(eval(_GROUPS[version])):
        pytest.skip(f"this kernel puts the process into no version {version} cpu control group")
    here = len(os.sched_getaffinity(0))
    quotas = {"100000 100000": 1, "50000 100000": 1, "150000 100000": 2, "max 100000": here, "": here, "1": here}
    jobs = []
    for quota in quotas:
        limit, _, period = quota.replace("max", "-1" if version == 1 else "max").partition(" ")
        v1 = {"cpu.cfs_quota_us": limit + "\n", "cpu.cfs_period_us": period + "\n"}
        files = v1 if version == 1 else {"cpu.max": quota + "\n"}
        jobs.append(({}, _SET_QUOTA.format(group=_GROUPS[version], files=files) + WORKS))
    results = run_fresh(*jobs, prefix=("unshare", "-m", "sh", "-c", _HIDE, "sh"))
    for (quota, cpus), result in zip(quotas.items(), results, strict=True):
        expected = str(min(cpus, here))
        assert (result.status, result.output.split()) == (0, [expected, expected, "True"]), (quota, result.output)


def test_exit_while_workers_spin() -> None:
    """The interpreter ends right after a call, with workers awake, and calls once more on its way."""
    code = """
import atexit, sys, torch, tilewright
tilewright.set_num_threads({})
q = torch.ones(1, 8, 100, 32)
out = tilewright.attention(q, q, q)
atexit.register(lambda: print(torch.equal(tilewright.attention(q, q, q), out), flush=True))
sys.exit(0)
"""
    for result in run_fresh(*(({}, code.format(threads)) for threads in (1, 2, 8))):
        assert (result.status, result.output.strip()) == (0, "True")


def test_bits_of_a_decode_step_beside_a_busy_machine() -> None:
    """More callers and threads than cores: timing decides who computes what, never what is computed."""
    q, k = torch.randn(3, 6, 1, 64), torch.randn(3, 2, 900, 64)
    tilewright.set_num_threads(1)
    expected = attention(q, k, k)
    tilewright.set_num_threads(8)
    stop = threading.Event()
    other = threading.Thread(
        target=lambda: [torch.ones(200, 200) @ torch.ones(200, 200) for _ in iter(stop.is_set, True)]
    )
    other.start()
    try:
        for _ in range(100):
            assert_same_bits(attention(q, k, k), expected)
    finally:
        stop.set()
        other.join()
