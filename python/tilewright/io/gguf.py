"""GGUF files (versions 2 and 3, little endian), memory-mapped.

Layout: magic, version, tensor count, key count; the metadata; one record per tensor (name, shape, type,
offset); padding to the alignment; the data. Specification: docs/gguf.md in the ggml repository. Every length
in the file is checked against what is left of the file before it is used, so a truncated or lying file costs
one FormatError and no memory.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tilewright import _C

from .errors import FormatError
from .mapped import MappedFile

# id -> (name, elements per block, bytes per block). Ids 4, 5, 31 to 33 and 36 to 38 were withdrawn.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# value type id -> struct code; 7 is bool, 8 string, 9 array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMS = 4
_MAX_DEPTH = 4  # arrays inside arrays; no known writer nests at all
# Elements of all metadata arrays together, and bytes of one string. The largest vocabularies have 0.3 M
# tokens and 0.6 M merges; without bounds a flipped bit could turn gigabytes of weights into Python objects.
_MAX_ELEMENTS = 1 << 23
_MAX_STRING = 1 << 24
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor record. shape: outermost first, as in torch; offset: in bytes from the start of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file: `version`, `metadata` (int, float, bool, str or list by key), `tensors` (by name).

    Raises FormatError for a file that breaks the format, OSError for one that cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: MappedFile | None = MappedFile(path)
        self.path = self._file.path
        parser = _Parser(self._file)
        self.version, self.metadata, self.tensors = parser.parse()
        self._file.drop(0, parser.pos)

    def raw(self, name: str) -> torch.Tensor:
        """The tensor's bytes as they stand in the file: uint8 (rows, row_bytes), without a copy.

        A row is the last dimension of the shape; what its bytes mean is the business of `tilewright.quant`.
        """
        tensor = self._tensor(name)
        rows = math.prod(tensor.shape[:-1])
        return self._mapped().view(tensor.offset, tensor.nbytes).view(rows, -1)

    def expect(self, name: str) -> None:
        """Have the kernel read the tensor ahead."""
        tensor = self._tensor(name)
        self._mapped().expect(tensor.offset, tensor.nbytes)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system. Its views stay valid and load them again when read."""
        tensor = self._tensor(name)
        self._mapped().drop(tensor.offset, tensor.nbytes)

    def release_all(self) -> None:
        """Give every page of the file back, those that the kernel mapped around what was read included."""
        mapped = self._mapped()
        mapped.drop(0, mapped.size)

    def close(self) -> None:
        """Let go of the file. The mapping itself goes when the last view of it does."""
        self._file = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _mapped(self) -> MappedFile:
        if self._file is None:
            raise ValueError(f"{self.path}: the file is closed; open GGUFFile again")
        return self._file

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise FormatError(
                self.path, name, f"expected a tensor of that name, the file's {len(self.tensors)} lack it"
            )
        return self.tensors[name]


class _Parser:
    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.buffer = file.buffer
        self.size = file.size
        self.pos = 0
        self.field = "header"
        self.elements = 0

    def parse(self) -> tuple[int, dict[str, Any], dict[str, GGUFTensor]]:
        magic = bytes(self.buffer[:4])
        if magic != b"GGUF":
            raise self.error(f"expected the magic b'GGUF', got {magic!r}; this is not a GGUF file")
        self.pos = 4
        version = self.unpack(_U32)
        if version & 0xFFFF == 0 and version != 0:
            raise self.error("expected a little-endian file, this one is big-endian; convert it with gguf-py first")
        if version not in (2, 3):
            raise self.error(f"expected version 2 or 3, got {version}; convert the file with a current llama.cpp")
        tensor_count, key_count = self.unpack(_U64), self.unpack(_U64)
        # The shortest tensor record takes 24 bytes, the shortest key 13.
        if tensor_count * 24 + key_count * 13 > self.size - self.pos:
            raise self.error(
                f"expected counts that fit a file of {self.size} bytes, got {tensor_count} tensors and "
                f"{key_count} metadata keys"
            )
        metadata = self.metadata(key_count)
        return version, metadata, self.records(tensor_count, metadata)

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self.field = f"metadata key {index}"
            key = self.string()
            self.field = _short(key)
            if key in metadata:
                raise self.error("expected each metadata key once, got it twice")
            metadata[key] = self.value(self.unpack(_U32))
        return metadata

    def records(self, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        self.field = "general.alignment"
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        # At least 8, as the specification says, so that a view of any element type is aligned.
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise self.error(f"expected a power of two of at least 8, got {alignment!r}")

        records: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(count):
            self.field = f"tensor record {index}"
            name = self.string()
            self.field = _short(name)
            if name in records:
                raise self.error("expected each tensor once, got the name twice")
            records[name] = self.record(alignment)

        start = -(-self.pos // alignment) * alignment
        tensors = {}
        for name, (type_name, shape, offset, nbytes) in records.items():
            if start + offset + nbytes > self.size:
                self.field = _short(name)
                raise self.error(
                    f"expected its data inside the file of {self.size} bytes, got bytes {start + offset} to "
                    f"{start + offset + nbytes}; the file is truncated or its header is wrong"
                )
            tensors[name] = GGUFTensor(name, type_name, shape, start + offset, nbytes)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self.field = _short(after.name)
                raise self.error(f"expected data of its own, it overlaps that of {_short(before.name)}")
        return tensors

    def record(self, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        """One tensor record after its name: (type name, shape, offset into the data section, bytes)."""
        n_dims = self.unpack(_U32)
        if n_dims > _MAX_DIMS:
            raise self.error(f"expected at most {_MAX_DIMS} dimensions, got {n_dims}")
        dims = [self.unpack(_U64) for _ in range(n_dims)]
        if 0 in dims:
            raise self.error(f"expected dimensions of at least 1, got {dims}")
        type_id = self.unpack(_U32)
        if type_id not in GGML_TYPES:
            known = ", ".join(name for name, _, _ in GGML_TYPES.values())
            raise self.error(f"expected a tensor type among {known}, got the unknown type {type_id}")
        type_name, block, block_bytes = GGML_TYPES[type_id]
        row = dims[0] if dims else 1
        if row % block:
            raise self.error(f"expected rows of a multiple of {block} elements for {type_name}, got {row}")
        offset = self.unpack(_U64)
        if offset % alignment:
            raise self.error(f"expected an offset that is a multiple of {alignment}, got {offset}")
        return type_name, tuple(reversed(dims)), offset, math.prod(dims) // block * block_bytes

    def unpack(self, code: struct.Struct) -> int:
        self.need(code.size)
        (value,) = code.unpack_from(self.buffer, self.pos)
        self.pos += code.size
        return value

    def string(self) -> str:
        length = self.unpack(_U64)
        self.need(length)
        if length > _MAX_STRING:
            raise self.error(f"expected strings of at most {_MAX_STRING} bytes, got one of {length}")
        data = self.buffer[self.pos : self.pos + length]
        self.pos += length
        try:
            return data.decode()
        except UnicodeDecodeError as err:
            raise self.error(f"expected UTF-8 text, got {_short(data)} ({err.reason} at byte {err.start})") from None

    def value(self, type_id: int, depth: int = 0) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array(depth + 1)
        if type_id not in _SCALARS:
            raise self.error(f"expected a value type from 0 to 12, got {type_id}")
        return self.scalars(type_id, 1)[0]

    def array(self, depth: int) -> list[Any]:
        if depth > _MAX_DEPTH:
            raise self.error(f"expected arrays nested at most {_MAX_DEPTH} deep, got more")
        item_type, count = self.unpack(_U32), self.unpack(_U64)
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            raise self.error(f"expected at most {_MAX_ELEMENTS} array elements in all, got an array of {count}")
        if item_type == _STRING:
            return self.strings(count)
        if item_type == _ARRAY:
            self.need(count * 12)
            return [self.array(depth + 1) for _ in range(count)]
        if item_type not in _SCALARS:
            raise self.error(f"expected an element type from 0 to 12, got {item_type}")
        return self.scalars(item_type, count)

    def strings(self, count: int) -> list[str]:
        """An array of strings: the vocabulary's 100,000 are most of the parse, hence in C++."""
        self.need(count * 8)
        out, self.pos = _C.read_strings(self.buffer, self.pos, count, _MAX_STRING)
        if len(out) < count:
            self.field = f"{self.field}[{len(out)}]"
            self.string()  # raises the right error
        return out

    def scalars(self, type_id: int, count: int) -> list[Any]:
        code = struct.Struct(f"<{count}{_SCALARS[type_id]}")
        self.need(code.size)
        values = list(code.unpack_from(self.buffer, self.pos))
        self.pos += code.size
        if type_id == _BOOL:
            if not {0, 1}.issuperset(values):
                raise self.error(f"expected a boolean of 0 or 1, got {max(values)}")
            return [value == 1 for value in values]
        return values

    def need(self, nbytes: int) -> None:
        if nbytes > self.size - self.pos:
            raise self.error(
                f"expected {nbytes} more bytes at offset {self.pos}, the file ends at {self.size}; it is "
                "truncated or a length in it is wrong"
            )

    def error(self, problem: str) -> FormatError:
        return FormatError(self.path, self.field, problem)


def _short(value: str | bytes) -> str:
    """A name from the file, fit for one line of a message."""
    shown = value[:77]
    text = shown if isinstance(shown, str) and shown.isprintable() else repr(shown)
    return text if len(value) <= 77 else text + "..."
