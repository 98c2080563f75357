"""The GGUF reader: agreement with the gguf package, every lie a file can tell, and memory."""

from __future__ import annotations

import itertools
import os
import struct
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.io.errors import FormatError
from tilewright.io.gguf import GGML_TYPES, GGUFFile
from tilewright.io.pull import pull

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


@dataclass
class File:
    """The parts of a small valid file; a test replaces the part that lies."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: list[bytes] = field(
        default_factory=lambda: [
            key("general.architecture", STR, string("llama")),
            key("a.bool", BOOL, b"\1"),
            key("a.float", F64, struct.pack("<d", 0.5)),
            key("a.list", ARR, array(I16, 3, struct.pack("<3h", -1, 0, 7))),
            key("a.strings", ARR, array(STR, 2, string("ä") + string(""))),
            key("a.nested", ARR, array(ARR, 2, array(U8, 1, b"\5") + array(STR, 1, string("x")))),
        ]
    )
    tensors: list[bytes] = field(
        default_factory=lambda: [
            tensor("w", (64, 2), 2, 0),
            tensor("v", (3,), 0, 96),
            tensor("s", (), 0, 128),
        ]
    )
    data: bytes = bytes(range(72)) + bytes(24) + struct.pack("<3f", 1, 2, 3) + bytes(20) + struct.pack("<f", 9)
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32

    def build(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(self.keys + self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


def opened(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return GGUFFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_part(tmp_path: Path, version: int) -> None:
    with opened(tmp_path / "m.gguf", File(version=version).build()) as file:
        assert file.version == version
        assert file.metadata == {
            "general.architecture": "llama",
            "a.bool": True,
            "a.float": 0.5,
            "a.list": [-1, 0, 7],
            "a.strings": ["ä", ""],
            "a.nested": [[5], ["x"]],
        }
        assert file.metadata["a.bool"] is True
        w = file.tensors["w"]
        assert (w.type_name, w.shape, w.nbytes) == ("Q4_0", (2, 64), 72)
        assert file.raw("w").shape == (2, 36)
        assert file.raw("w").dtype == torch.uint8
        assert file.raw("w").flatten().tolist() == list(range(72))
        assert file.raw("v").view(torch.float32).tolist() == [[1.0, 2.0, 3.0]]
        assert file.raw("s").view(torch.float32).tolist() == [[9.0]]


def test_types_are_those_of_the_gguf_package() -> None:
    theirs = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: GGML_TYPES[kind] for kind in theirs} == theirs


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("t.tokens", ["a", "日本", ""])
    writer.add_array("t.scores", [0.5, -1.0])
    writer.add_int64("t.big", -(2**40))
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((3, 1, 5), np.float16)}
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile(path) as file:
        assert file.metadata["t.tokens"] == ["a", "日本", ""]
        assert file.metadata["t.scores"] == [0.5, -1.0]
        assert file.metadata["t.big"] == -(2**40)
        for name, value in weights.items():
            assert file.tensors[name].shape == value.shape
            assert file.raw(name).numpy().tobytes() == value.tobytes()


def test_smollm2_as_the_gguf_package_reads_it() -> None:
    path = pull("smollm2", progress=False)
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        for name, entry in reader.fields.items():
            if not name.startswith("GGUF.") and "merges" not in name:  # their reader takes 1 s for the merges
                assert file.metadata[name] == entry.contents(), name
        assert len(file.tensors) == len(reader.tensors) == 272
        for theirs in reader.tensors:
            mine = file.tensors[theirs.name]
            assert mine.type_name == theirs.tensor_type.name
            assert mine.shape == tuple(reversed(theirs.shape.tolist()))
            assert (mine.offset, mine.nbytes) == (theirs.data_offset, theirs.n_bytes)
            assert file.raw(theirs.name).numpy().tobytes() == theirs.data.tobytes()


@pytest.mark.measures
def test_parses_smollm2_in_well_under_a_tenth_of_a_second() -> None:
    path = pull("smollm2", progress=False)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        GGUFFile(path).close()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1, times  # 0.03 s on the reference machine


# --- files that lie ---

LIES: dict[str, tuple[File | bytes, str]] = {
    "empty": (b"", r"file: expected a header"),
    "magic": (File(magic=b"GGML"), r"header: expected the magic b'GGUF', got b'GGML'"),
    "version 1": (File(version=1), r"header: expected version 2 or 3, got 1"),
    "version 4": (File(version=4), r"header: expected version 2 or 3, got 4"),
    "version 0": (File(version=0), r"header: expected version 2 or 3, got 0"),
    "big endian": (File(version=3 << 24), r"header: .*big-endian"),
    "tensor count": (File(tensor_count=2**63), r"header: expected counts that fit"),
    "key count": (File(key_count=2**40), r"header: expected counts that fit"),
    "one key too many": (File(key_count=7), r": expected"),
    "one tensor too many": (File(tensor_count=4), r": expected"),
    "key length": (
        File(keys=[struct.pack("<Q", 2**62)]),
        r"metadata key 0: expected 4611686018427387904 more",
    ),
    "key text": (File(keys=[key(b"\xff", BOOL, b"\0")]), r"metadata key 0: expected UTF-8 text"),
    "key twice": (File(keys=[key("k", BOOL, b"\0")] * 2), r"k: expected each metadata key once"),
    "value type": (File(keys=[key("k", 13, b"\0")]), r"k: expected a value type from 0 to 12, got 13"),
    "boolean": (File(keys=[key("k", BOOL, b"\2")]), r"k: expected a boolean of 0 or 1, got 2"),
    "text": (File(keys=[key("k", STR, string(b"\xc3"))]), r"k: expected UTF-8 text"),
    "text in array": (
        File(keys=[key("k", ARR, array(STR, 2, string("a") + string(b"\xff")))]),
        r"k\[1\]: expected UTF-8 text",
    ),
    "text length": (
        File(keys=[key("k", STR, struct.pack("<Q", 2**40))]),
        r"k: expected 1099511627776 more bytes",
    ),
    "text length in array": (
        File(keys=[key("k", ARR, array(STR, 1, struct.pack("<Q", 2**63)))]),
        r"k\[0\]: expected 9223372036854775808 more bytes",
    ),
    "array count": (
        File(keys=[key("k", ARR, array(U8, 2**62, b""))]),
        r"k: expected at most 8388608 array elem",
    ),
    "small array count": (
        File(keys=[key("k", ARR, array(F64, 10**6, b""))]),
        r"k: expected 8000000 more bytes",
    ),
    "string array count": (
        File(keys=[key("k", ARR, array(STR, 10**6, b""))]),
        r"k: expected 8000000 more bytes",
    ),
    "nested array count": (
        File(keys=[key("k", ARR, array(ARR, 10**6, b""))]),
        r"k: expected 12000000 more bytes",
    ),
    "array type": (File(keys=[key("k", ARR, array(99, 1, b"\0"))]), r"k: expected an element type .* got 99"),
    "depth": (
        File(keys=[key("k", ARR, array(ARR, 1, b"") * 50)]),
        r"k: expected arrays nested at most 4 deep",
    ),
    "alignment 0": (
        File(keys=[key("general.alignment", U32, struct.pack("<I", 0))]),
        r"general.alignment: expected a power of two of at least 8, got 0",
    ),
    "alignment 48": (
        File(keys=[key("general.alignment", U32, struct.pack("<I", 48))]),
        r"power of two .* got 48",
    ),
    "alignment type": (File(keys=[key("general.alignment", STR, string("32"))]), r"power of two .* got '32'"),
    "tensor name": (File(tensors=[struct.pack("<Q", 2**63)]), r"tensor record 0: expected"),
    "tensor twice": (File(tensors=[tensor("v", (3,), 0, 96)] * 2), r"v: expected each tensor once"),
    "dimensions": (File(tensors=[tensor("v", (1,) * 5, 0, 0)]), r"v: expected at most 4 dimensions, got 5"),
    "dimension count": (
        File(tensors=[string("v") + struct.pack("<I", 2**32 - 1)]),
        r"v: expected at most 4 dimensions, got 4294967295",
    ),
    "dimension 0": (File(tensors=[tensor("v", (4, 0), 0, 0)]), r"v: expected dimensions of at least 1"),
    "overflow": (File(tensors=[tensor("v", (2**32, 2**32), 24, 0)]), r"v: expected its data inside the file"),
    "large overflow": (
        File(tensors=[tensor("v", (2**64 - 1,) * 4, 24, 0)]),
        r"v: expected its data inside the",
    ),
    "tensor type": (File(tensors=[tensor("v", (4,), 4, 0)]), r"v: expected a tensor type among F32.*type 4$"),
    "row length": (
        File(tensors=[tensor("v", (33,), 2, 0)]),
        r"v: expected rows of a multiple of 32 .*got 33",
    ),
    "offset alignment": (
        File(tensors=[tensor("v", (3,), 0, 4)]),
        r"v: expected an offset that is a multiple of 32",
    ),
    "offset": (File(tensors=[tensor("v", (3,), 0, 160)]), r"v: expected its data inside the file"),
    "offset overflow": (
        File(tensors=[tensor("v", (3,), 0, 2**64 - 32)]),
        r"v: expected its data inside the file",
    ),
    "overlap": (
        File(tensors=[tensor("w", (64, 2), 2, 0), tensor("v", (3,), 0, 64)]),
        r"v: expected data of its own, it overlaps that of w",
    ),
    "truncated data": (File(data=bytes(96)), r"v: expected its data inside the file of .* truncated"),
    "a name to shorten": (File(keys=[key("k" * 500, 13, b"")]), r": k{77}\.\.\.: expected"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_error_that_names_file_and_field(tmp_path: Path, lie: str) -> None:
    content, message = LIES[lie]
    path = tmp_path / "lying.gguf"
    with pytest.raises(FormatError, match=message) as caught:
        opened(path, content if isinstance(content, bytes) else content.build())
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lie", ["array count", "tensor count", "text length in array", "overflow"])
def test_a_lying_count_costs_no_memory(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lying.gguf"
    path.write_bytes(LIES[lie][0].build())
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def survives(path: Path, data: bytes) -> bool:
    """True when the file opens and every tensor can be read; FormatError is the only other outcome."""
    path.write_bytes(data)
    try:
        with GGUFFile(path) as file:
            for name in file.tensors:
                file.raw(name).sum()
                file.release(name)
    except FormatError as err:
        assert str(err).startswith(f"{path}: ")
        return False
    return True


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    data = File().build()
    for length in range(len(data)):
        assert not survives(tmp_path / "m.gguf", data[:length]), length
    assert survives(tmp_path / "m.gguf", data)


def test_every_byte_changed(tmp_path: Path) -> None:
    data = File().build()
    for position, value in itertools.product(range(len(data) - len(File().data)), (0x00, 0x7F, 0xFF)):
        survives(tmp_path / "m.gguf", data[:position] + bytes([value]) + data[position + 1 :])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(File().build())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        if data.draw(st.booleans()):
            content[start : start + len(piece)] = piece
        else:
            del content[start : start + len(piece)]
    survives(tmp_path_factory.getbasetemp() / "damaged.gguf", bytes(content))


# --- memory ---


def test_views_outlive_the_file_and_no_warning_comes(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = opened(tmp_path / "m.gguf", File().build())
    view = file.raw("v").view(torch.float32)
    file.release("v")
    file.close()
    (tmp_path / "m.gguf").unlink()
    del file
    assert view.tolist() == [[1.0, 2.0, 3.0]]
    assert not recwarn.list


def test_a_write_never_reaches_the_file(tmp_path: Path) -> None:
    data = File().build()
    with opened(tmp_path / "m.gguf", data) as file:
        file.raw("v").zero_()
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_closed_and_missing(tmp_path: Path) -> None:
    file = opened(tmp_path / "m.gguf", File().build())
    with pytest.raises(FormatError, match="nothing: expected a tensor of that name"):
        file.raw("nothing")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.raw("w")
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "absent.gguf")


def resident(kind: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def test_release_gives_the_pages_back(tmp_path: Path) -> None:
    size = 32 << 20
    file = File(tensors=[tensor("w", (size,), 24, 0)], data=bytes(range(256)) * (size // 256))
    with opened(tmp_path / "m.gguf", file.build()) as opened_file:
        before = resident("RssFile:")
        view = opened_file.raw("w")
        total = view.sum()
        assert resident("RssFile:") - before > size // 2
        opened_file.release("w")
        assert resident("RssFile:") - before < size // 8
        assert view.sum() == total


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    content = File(tensors=[tensor("w", (size,), 24, 0)], data=b"").build()
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    try:
        os.truncate(path, len(content) + size)
    except OSError as err:
        pytest.skip(f"this file system holds no sparse file of {size} bytes: {err}")
    with GGUFFile(path) as file:
        assert file.raw("w")[0, -4:].tolist() == [0, 0, 0, 0]


def test_the_error_can_cross_processes() -> None:
    import pickle

    err = pickle.loads(pickle.dumps(FormatError("m.gguf", "version", "expected 3, got 9")))
    assert (err.path, err.field, str(err)) == ("m.gguf", "version", "m.gguf: version: expected 3, got 9")
