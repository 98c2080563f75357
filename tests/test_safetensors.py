"""The safetensors reader and the model folder: agreement with the safetensors package, and files that lie."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tilewright.io.errors import FormatError
from tilewright.io.folder import HFFolder
from tilewright.io.safetensors import DTYPES, SafetensorsFile


def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    tensors |= {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "odd": torch.tensor([1], dtype=torch.int8),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert file.tensors.keys() == tensors.keys()
        for name, theirs in load_file(path).items():
            mine = file.tensor(name)
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape) == (tensors[name].dtype, theirs.shape)
            assert as_bytes(mine) == as_bytes(theirs), name
            assert (file.tensors[name].dtype, file.tensors[name].shape) == (mine.dtype, tuple(mine.shape))
            file.release(name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_also_where_it_is_misaligned(tmp_path: Path, dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    payload = bytes(size) + b"\1" * size if dtype == "BOOL" else bytes(range(1, 2 * size + 1))
    for pad in range(8):  # padded with spaces, as the format allows: moves the data to every alignment
        text = json.dumps({"w": entry(dtype, (2,), (0, 2 * size))}).encode() + b" " * pad
        (tmp_path / "m.safetensors").write_bytes(build(text, payload))
        with SafetensorsFile(tmp_path / "m.safetensors") as file:
            assert file.tensor("w").dtype == DTYPES[dtype]
            assert as_bytes(file.tensor("w")) == payload


LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"file: expected a header, the file is empty"),
    "no length": (b"\1\0\0", r"header length: expected 8 bytes, the file has 3"),
    "long header": (
        build({}, length=100_000_001),
        r"header length: expected at most 100000000, got 100000001",
    ),
    "endless header": (build({}, length=2**64 - 1), r"header length: expected at most"),
    "truncated header": (
        build({}, length=3),
        r"header length: expected a header inside the file of 10 bytes",
    ),
    "empty header": (build(b""), r"header: expected JSON that begins with '{'"),
    "leading space": (build(b" {}"), r"header: expected JSON that begins with '{'"),
    "not JSON": (build(b"{nothing"), r"header: expected valid JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), r"header: expected valid JSON"),
    "two values": (build(b"{}{}"), r"header: expected valid JSON"),
    "deep JSON": (build(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), r"header: expected valid JSON"),
    "huge number": (build(b'{"a":' + b"9" * 5000 + b"}"), r"header: expected valid JSON"),
    "name twice": (
        build(
            b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],'
            b'"data_offsets":[0,1]}}',
            b"\0",
        ),
        r"'w': expected each name once",
    ),
    "field twice": (
        build(b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"\0"),
        r"'dtype': expected each name once",
    ),
    "metadata": (build({"__metadata__": {"a": 1}}), r"__metadata__: expected an object of strings"),
    "metadata list": (build({"__metadata__": []}), r"__metadata__: expected an object of strings"),
    "entry": (build({"w": 3}), r"w: expected an object with"),
    "entry fields": (build({"w": {"dtype": "U8", "shape": []}}), r"w: expected an object with"),
    "dtype": (build({"w": entry("Q4")}, bytes(8)), r"w: expected a dtype among F64, .*got 'Q4'"),
    "dtype list": (build({"w": {**entry(), "dtype": []}}, bytes(8)), r"w: expected a dtype among"),
    "negative": (build({"w": entry(shape=(-2,))}, bytes(8)), r"w: expected a shape of integers from 0"),
    "fraction": (
        build({"w": entry(shape=(2.0,))}, bytes(8)),
        r"w: expected a shape of integers from 0",
    ),
    "boolean size": (build({"w": entry(shape=(True, 2))}, bytes(8)), r"w: expected a shape of integers"),
    "shape text": (build({"w": {**entry(), "shape": "2"}}, bytes(8)), r"w: expected a shape of integers"),
    "overflow": (build({"w": entry(shape=(2**40, 2**40))}, bytes(8)), r"w: expected a shape within int64"),
    "overflow with 0": (
        build({"w": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
        r"w: expected a shape within int64",
    ),
    "dimensions": (
        build({"w": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)),
        r"w: expected a shape within",
    ),
    "three offsets": (
        build({"w": entry(offsets=(0, 4, 8))}, bytes(8)),
        r"w: expected data_offsets \[begin, end\]",
    ),
    "backwards": (build({"w": entry(offsets=(8, 0))}, bytes(8)), r"w: expected data_offsets \[begin, end\]"),
    "negative offset": (build({"w": entry(offsets=(-8, 0))}, bytes(8)), r"w: expected data_offsets"),
    "past the end": (build({"w": entry()}, bytes(7)), r"w: expected data inside the file of .* truncated"),
    "far past the end": (
        build({"w": entry(offsets=(0, 2**62))}, bytes(8)),
        r"w: expected data inside the file",
    ),
    "length": (build({"w": entry(shape=(3,))}, bytes(8)), r"w: expected 12 bytes for F32 \[3\], got 8"),
    "hole": (
        build({"w": entry(offsets=(4, 12))}, bytes(12)),
        r"w: expected its data at byte 0 of the data, got 4",
    ),
    "overlap": (
        build({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        r"b: expected its data at byte 8",
    ),
    "same data": (build({"a": entry(), "b": entry()}, bytes(8)), r"b: expected its data at byte 8"),
    "left over": (build({"w": entry()}, bytes(9)), r"data: expected the tensors to fill the file"),
    "left over, no tensors": (build({}, bytes(1)), r"data: expected the tensors to fill the file"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_error_that_names_file_and_field(tmp_path: Path, lie: str) -> None:
    content, message = LIES[lie]
    path = tmp_path / "lying.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# What their reader lets pass although the specification forbids it or torch cannot hold it.
LENIENT = {"name twice", "field twice", "leading space", "dimensions", "overflow with 0"}


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie not in LENIENT])
def test_the_safetensors_package_refuses_the_same(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lying.safetensors"
    path.write_bytes(LIES[lie][0])
    with pytest.raises((SafetensorError, OSError, ValueError)), safe_open(path, framework="pt"):
        pass


def test_a_lying_length_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "lying.safetensors"
    tracemalloc.start()
    try:
        for lie in ("endless header", "far past the end", "overflow"):
            path.write_bytes(LIES[lie][0])
            with pytest.raises(FormatError):
                SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


SMALL = build(
    {
        "__metadata__": {"a": "b"},
        "w": entry("F16", (2, 2), (0, 8)),
        "e": entry("F32", (0,), (8, 8)),
        "s": entry("I64", (), (8, 16)),
    },
    bytes(range(16)),
)


def survives(path: Path, data: bytes) -> bool:
    """True when the file opens and every tensor can be read; FormatError is the only other outcome."""
    path.write_bytes(data)
    try:
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                file.tensor(name).clone()
    except FormatError as err:
        assert str(err).startswith(f"{path}: ")
        return False
    return True


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert survives(path, SMALL)
    for length in range(len(SMALL)):
        assert not survives(path, SMALL[:length]), length


def test_every_byte_changed(tmp_path: Path) -> None:
    """What still opens here after a change also opens with the safetensors package."""
    path = tmp_path / "m.safetensors"
    for position, value in itertools.product(range(len(SMALL) - 16), b'\0\xff"},-9'):
        if survives(path, SMALL[:position] + bytes([value]) + SMALL[position + 1 :]):
            with safe_open(path, framework="pt"):
                pass


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        if data.draw(st.booleans()):
            content[start : start + len(piece)] = piece
        else:
            del content[start : start + len(piece)]
    survives(tmp_path_factory.getbasetemp() / "damaged.safetensors", bytes(content))


def test_views_outlive_the_file_and_no_warning_comes(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.arange(5000.0)}, path)
    file = SafetensorsFile(path)
    view = file.tensor("w")
    file.release("w")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.tensor("w")
    del file
    path.unlink()
    assert torch.equal(view, torch.arange(5000.0))
    assert not recwarn.list


# --- folders ---


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2), "c": torch.ones(4, dtype=torch.bfloat16)}
    save_file({"a": tensors["a"], "b": tensors["b"]}, folder / "model-1.safetensors")
    save_file({"c": tensors["c"]}, folder / "model-2.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    index(folder, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    return tensors


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_folder_with_shards(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    with HFFolder(tmp_path) as folder:
        assert folder.config == {"model_type": "llama"}
        assert folder.generation_config == {}
        assert folder.names() == ["a", "b", "c"]
        assert folder.info("c") == (torch.bfloat16, (4,))
        for name, tensor in tensors.items():
            assert torch.equal(folder.tensor(name), tensor)
            folder.release(name)
    with pytest.raises(ValueError, match="closed"):
        folder.tensor("a")


def test_folder_with_one_file_which_goes_before_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"only": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    folder = HFFolder(tmp_path)
    assert folder.names() == ["only"]
    assert folder.generation_config == {"eos_token_id": [1, 2]}
    with pytest.raises(FormatError, match="a: expected a tensor of that name"):
        folder.info("a")


def test_a_link_into_a_cache_is_followed(tmp_path: Path) -> None:
    """The hub's cache keeps its files elsewhere and links to them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "blobs" / "0123")
    (tmp_path / "model" / "shard.safetensors").symlink_to("../blobs/0123")
    (tmp_path / "model" / "config.json").write_text("{}")
    index(tmp_path / "model", {"a": "shard.safetensors"})
    assert HFFolder(tmp_path / "model").names() == ["a"]


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "no config": (
        {"config.json": None},
        r"config.json: expected the model's configuration, the file is missing",
    ),
    "config not JSON": ({"config.json": "{"}, r"config.json: file: expected valid JSON"),
    "config not an object": ({"config.json": "[1]"}, r"config.json: file: expected a JSON object"),
    "no weights": ({"model.safetensors.index.json": None}, r"model.safetensors: expected this file or"),
    "pickle": (
        {"model.safetensors.index.json": None, "pytorch_model.bin": "x"},
        r"pytorch_model.bin: expected safetensors, got a pickle file.* never loaded",
    ),
    "index not JSON": ({"model.safetensors.index.json": "x"}, r"index.json: file: expected valid JSON"),
    "index without map": (
        {"model.safetensors.index.json": "{}"},
        r"index.json: weight_map: expected an object",
    ),
    "missing shard": (
        {"model-2.safetensors": None},
        r"index.json: c: expected the shard model-2.safetensors",
    ),
    "truncated shard": (
        {"model-2.safetensors": "1234"},
        r"model-2.safetensors: header length: expected 8 bytes",
    ),
    "shard lacks it": (
        {"map": {"z": "model-1.safetensors"}},
        r"z: expected the tensor in model-1.safetensors",
    ),
    "shard above": (
        {"map": {"a": "../model-1.safetensors"}},
        r"a: expected the name of a file in the folder",
    ),
    "shard elsewhere": ({"map": {"a": "/etc/passwd"}}, r"a: expected the name of a file in the folder"),
    "shard in a folder": ({"map": {"a": "x/model-1.safetensors"}}, r"a: expected the name of a file in the"),
    "shard is the folder": ({"map": {"a": ".."}}, r"a: expected the shard \.\., the file is missing"),
    "shard nameless": ({"map": {"a": ""}}, r"a: expected the shard , the file is missing"),
    "shard a number": ({"map": {"a": 3}}, r"a: expected the name of a file in the folder, got 3"),
    "shard endless": ({"map": {"a": "x" * 5000}}, r"a: expected the name of a file in the folder"),
    "shard with NUL": ({"map": {"a": "x\0"}}, r"a: expected the shard"),
    "shard no text": ({"map": {"a": "\ud800"}}, r"a: expected the shard"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_broken_folder_is_one_error(tmp_path: Path, case: str) -> None:
    sharded(tmp_path)
    changes, message = FOLDERS[case]
    for name, content in changes.items():
        if name == "map":
            index(tmp_path, content)
        elif content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(FormatError, match=message) as caught:
        HFFolder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="folder: expected a folder with config"):
        HFFolder(tmp_path / "absent")
