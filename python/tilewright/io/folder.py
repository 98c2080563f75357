"""A Hugging Face model folder: config.json and one safetensors file, or several with an index."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .errors import FormatError
from .safetensors import SafetensorsFile, parse_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


class HFFolder:
    """An open model folder: `config` and `generation_config` (dicts; the latter empty without its file).

    Every shard is opened and checked against the index at once, so that a broken folder is refused before
    anything is loaded. Raises FormatError for a folder that breaks the layout. Pickle files are never read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FormatError(self.path, "folder", "expected a folder with config.json, there is none")
        if not (self.path / "config.json").is_file():
            raise FormatError(self.path, "config.json", "expected the model's configuration, the file is missing")
        self.config = read_json(self.path / "config.json")
        generation = self.path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._file_of: dict[str, SafetensorsFile] = self._open()

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._file_of)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape) of a tensor, without touching its data."""
        record = self._shard(name).tensors[name]
        return record.dtype, record.shape

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of its file (a copy where the file has it misaligned for its dtype)."""
        return self._shard(name).tensor(name)

    def expect(self, name: str) -> None:
        """Have the kernel read the tensor ahead."""
        self._shard(name).expect(name)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system. Its views stay valid and load them again when read."""
        self._shard(name).release(name)

    def release_all(self) -> None:
        """Give every page of every file back, those that the kernel mapped around what was read included."""
        for shard in set(self._file_of.values()):
            shard.release_all()

    def close(self) -> None:
        """Let go of the files. A mapping itself goes when the last view of it does."""
        for shard in set(self._file_of.values()):
            shard.close()

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise FormatError(
                self.path,
                name,
                f"expected a tensor of that name, none of the folder's {len(self._file_of)} has it",
            )
        return self._file_of[name]

    def _open(self) -> dict[str, SafetensorsFile]:
        if (self.path / _SINGLE).is_file():
            file = SafetensorsFile(self.path / _SINGLE)
            return dict.fromkeys(file.tensors, file)
        if (self.path / _INDEX).is_file():
            return self._open_shards()
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise FormatError(
                self.path,
                pickles[0],
                "expected safetensors, got a pickle file, which can run code and is never loaded; convert it "
                "with transformers: AutoModel.from_pretrained(...).save_pretrained(DIR)",
            )
        raise FormatError(self.path, _SINGLE, f"expected this file or {_INDEX}, neither exists")

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        index_path = self.path / _INDEX
        weight_map: Any = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(index_path, "weight_map", "expected an object of file names by tensor, got none")
        shards: dict[str, SafetensorsFile] = {}
        file_of: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            # A bare name only: anything with a folder in it could lead out of the model.
            if not isinstance(shard, str) or shard != PurePosixPath(shard).name or len(shard) > 255:
                raise FormatError(index_path, name, f"expected the name of a file in the folder, got {shard!r}")
            if shard not in shards:
                if not (self.path / shard).is_file():
                    raise FormatError(index_path, name, f"expected the shard {shard}, the file is missing")
                shards[shard] = SafetensorsFile(self.path / shard)
            if name not in shards[shard].tensors:
                raise FormatError(index_path, name, f"expected the tensor in {shard}, that file lacks it")
            file_of[name] = shards[shard]
        return file_of


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; FormatError names the file."""
    return parse_json(path.read_bytes(), path, "file")
