"""safetensors files, memory-mapped.

Layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data,
which the tensors cover without holes or overlaps. Specification: the README of the safetensors repository.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import FormatError
from .mapped import MappedFile

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_MAX_NUMEL = 1 << 62  # torch sizes and strides are int64
_MAX_DIMS = 64  # what torch's iterators take


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor record. shape as in torch; offset: in bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file: `metadata` (str by str) and `tensors` (records by name).

    Raises FormatError for a file that breaks the format, OSError for one that cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: MappedFile | None = MappedFile(path)
        self.path = self._file.path
        header, start = _read_header(self._file)
        self._file.drop(0, start)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise FormatError(self.path, "__metadata__", "expected an object of strings, got something else")
        self.metadata: dict[str, str] = metadata
        self.tensors = {name: self._record(name, entry, start) for name, entry in header.items()}
        self._check_cover(start)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its dtype: a view of the file, or a copy where its offset does not suit the dtype."""
        record = self._tensor(name)
        data = self._mapped().view(record.offset, record.nbytes)
        if record.offset % record.dtype.itemsize:
            data = data.clone()
        return data.view(record.dtype).view(record.shape)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system. Its views stay valid and load them again when read."""
        record = self._tensor(name)
        self._mapped().drop(record.offset, record.nbytes)

    def release_all(self) -> None:
        """Give every page of the file back, those that the kernel mapped around what was read included."""
        mapped = self._mapped()
        mapped.drop(0, mapped.size)

    def close(self) -> None:
        """Let go of the file. The mapping itself goes when the last view of it does."""
        self._file = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _mapped(self) -> MappedFile:
        if self._file is None:
            raise ValueError(f"{self.path}: the file is closed; open SafetensorsFile again")
        return self._file

    def _tensor(self, name: str) -> SafetensorsTensor:
        if name not in self.tensors:
            raise FormatError(
                self.path,
                name,
                f"expected a tensor of that name, none of the file's {len(self.tensors)} has it",
            )
        return self.tensors[name]

    def _record(self, name: str, entry: Any, start: int) -> SafetensorsTensor:
        keys = {"dtype", "shape", "data_offsets"}
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise FormatError(self.path, name, f"expected an object with {sorted(keys)}, got {_brief(entry)}")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise FormatError(self.path, name, f"expected a dtype among {', '.join(DTYPES)}, got {_brief(code)}")
        if not _is_sizes(shape):
            raise FormatError(self.path, name, f"expected a shape of integers from 0, got {_brief(shape)}")
        # Empty tensors included: their strides are products of the other dimensions.
        if len(shape) > _MAX_DIMS or math.prod(size for size in shape if size) > _MAX_NUMEL:
            raise FormatError(self.path, name, f"expected a shape within int64, got {_brief(shape)}")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise FormatError(self.path, name, f"expected data_offsets [begin, end], got {_brief(offsets)}")
        begin, end = offsets
        if start + end > self._mapped().size:
            raise FormatError(
                self.path,
                name,
                f"expected data inside the file of {self._mapped().size} bytes, got bytes {start + begin} "
                f"to {start + end}; the file is truncated or its header is wrong",
            )
        dtype = DTYPES[code]
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes:
            raise FormatError(self.path, name, f"expected {nbytes} bytes for {code} {_brief(shape)}, got {end - begin}")
        return SafetensorsTensor(name, dtype, tuple(shape), start + begin, nbytes)

    def _check_cover(self, start: int) -> None:
        """The data must be covered from its first byte to the end of the file, each byte once."""
        position = start
        for record in sorted(self.tensors.values(), key=lambda record: (record.offset, record.nbytes)):
            if record.offset != position:
                raise FormatError(
                    self.path,
                    record.name,
                    f"expected its data at byte {position - start} of the data, got {record.offset - start}; "
                    "tensors must follow one another without holes or overlaps",
                )
            position += record.nbytes
        if position != self._mapped().size:
            raise FormatError(
                self.path,
                "data",
                f"expected the tensors to fill the file of {self._mapped().size} bytes, got {position}",
            )


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The parsed JSON header and the offset of the data."""
    if file.size < 8:
        raise FormatError(file.path, "header length", f"expected 8 bytes, the file has {file.size}")
    length = int.from_bytes(file.buffer[:8], "little")
    if length > _MAX_HEADER:
        raise FormatError(
            file.path,
            "header length",
            f"expected at most {_MAX_HEADER}, got {length}; not a safetensors file?",
        )
    if 8 + length > file.size:
        raise FormatError(
            file.path,
            "header length",
            f"expected a header inside the file of {file.size} bytes, got {length}; the file is truncated",
        )
    text = file.buffer[8 : 8 + length]
    if not text.startswith(b"{"):
        raise FormatError(file.path, "header", f"expected JSON that begins with '{{', got {text[:20]!r}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise FormatError(file.path, _brief(key), "expected each name once in the header, got it twice")
            result[key] = value
        return result

    return parse_json(text, file.path, "header", unique), 8 + length


def parse_json(
    text: bytes,
    path: str | os.PathLike[str],
    field: str,
    pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A JSON object from a file's bytes, FormatError for anything else. pairs_hook: as in json.loads."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=pairs_hook)
    except FormatError:
        raise
    except (ValueError, RecursionError) as err:
        raise FormatError(path, field, f"expected valid JSON in UTF-8, got an error: {err}") from None
    if not isinstance(value, dict):
        raise FormatError(path, field, f"expected a JSON object, got {_brief(value)}")
    return value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_NUMEL for item in value)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def join_safetensors(parts: Sequence[SafetensorsFile], path: str | os.PathLike[str]) -> None:
    """Write the tensors of several open files, all of different names, into one new file, in little memory."""
    code_of = {dtype: code for code, dtype in DTYPES.items()}
    # Wide types first, as the reference implementation has them: then every tensor lies aligned.
    pairs = sorted(
        ((part, record) for part in parts for record in part.tensors.values()),
        key=lambda pair: (-pair[1].dtype.itemsize, pair[1].name),
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for _, record in pairs:
        if record.name in header:
            raise ValueError(f"join_safetensors: expected each tensor in one file, got {record.name} in two")
        offsets = [position, position + record.nbytes]
        header[record.name] = {"dtype": code_of[record.dtype], "shape": list(record.shape), "data_offsets": offsets}
        position += record.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part, record in pairs:
            file.write(memoryview(part.tensor(record.name).flatten().view(torch.uint8).numpy()))
            part.release(record.name)
