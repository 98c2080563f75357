"""The work of a long run in a folder: finished parts, taken up again after a kill, and put together at the end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tilewright.io.folder import read_json
from tilewright.io.safetensors import SafetensorsFile, join_safetensors

_NAME = ".partial"
_DESCRIPTION = "description.json"
_STATES = "states"


class PartialFolder:
    """TARGET/.partial, held by one process at a time.

    description: plain data that the parts depend on; a folder that was begun with another one is refused, as is a
    target that holds anything else. Raises ValueError that says so, OSError where nothing can be written.
    """

    def __init__(self, target: Path, description: Mapping[str, Any]) -> None:
        self.target, self.path = target, target / _NAME
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target}: expected a new or empty folder, got a file")
        if target.exists() and any(target.iterdir()) and not self.path.is_dir():
            raise ValueError(f"{target}: expected a new or empty folder, got one with files in it")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")  # noqa: SIM115 (held until close)
        try:
            self._acquire(description)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def done(self) -> int:
        """How many parts are finished."""
        count = 0
        while self._part(count).is_file():
            count += 1
        return count

    def commit(self, index: int, tensors: Mapping[str, Tensor], states: Tensor | None = None) -> None:
        """Store part `index`, and beside it the states from which the next one starts."""
        if states is not None:
            _save(self._states(index + 1), {_STATES: states})
        _save(self._part(index), tensors)
        self._states(index).unlink(missing_ok=True)

    def states(self, index: int) -> Tensor:
        """The states that were stored for part `index`."""
        with SafetensorsFile(self._states(index)) as file:
            return file.tensor(_STATES).clone()

    def assemble(self, max_shard_size: int, finish: Callable[[Path], None]) -> None:
        """Put the parts together as safetensors shards of the target, with an index if there are several.

        finish(folder) writes further files into a folder, from where they are moved into the target;
        config.json is the last file to appear there.
        """
        staging = self.path / "assembled"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        parts = [SafetensorsFile(self._part(index)) for index in range(self.done())]
        shards = _shards(parts, max_shard_size)
        count = len(shards)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            join_safetensors(shard, staging / name)
            weight_map |= {tensor: name for part in shard for tensor in part.tensors}
        if count > 1:
            total = sum(record.nbytes for part in parts for record in part.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(staging / "model.safetensors.index.json", index)
        finish(staging)
        for file in sorted(staging.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            place = self.target / file.name
            if place.is_dir():  # of an earlier attempt
                shutil.rmtree(place)
            file.replace(place)

    def remove(self) -> None:
        """Nothing of this is needed any more."""
        self.close()
        shutil.rmtree(self.path)

    def _acquire(self, description: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is at work there; wait for it") from None
        file, wanted = self.path / _DESCRIPTION, json.loads(json.dumps(description))
        if not file.is_file():
            _write_json(file, wanted)
            return
        begun = read_json(file)
        differing = [key for key in {**wanted, **begun} if wanted.get(key) != begun.get(key)]
        if differing:
            texts = [f"{key} {begun.get(key)!r:.60}, now {wanted.get(key)!r:.60}" for key in differing]
            raise ValueError(
                f"{self.path}: this run was begun differently ({'; '.join(texts)}); go on as it was begun, or delete "
                "that folder"
            )

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index:05}.safetensors"

    def _states(self, index: int) -> Path:
        return self.path / f"states-{index:05}.safetensors"


def _shards(parts: Sequence[SafetensorsFile], max_size: int) -> list[list[SafetensorsFile]]:
    """Consecutive parts that fit into a shard; a larger part is one alone."""
    shards: list[list[SafetensorsFile]] = [[]]
    size = 0
    for part in parts:
        nbytes = sum(record.nbytes for record in part.tensors.values())
        if shards[-1] and size + nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += nbytes
    return shards


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file(dict(tensors), unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
