"""Fixtures that several test files share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compare import assert_same_bits
from smollm2 import shared_smollm2
from torch import Tensor

import tilewright
from tilewright import _C, AutoModelForCausalLM
from tilewright.io.tokenizer import Tokenizer

THREADS = (1, 2, 3, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=int, default=1, metavar="N", help="run every Nth case of each test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every, seen = config.getoption("--share"), Counter()
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left if seen[test] % every else kept).append(item)
        seen[test] += 1
    if left:
        items[:] = kept
        config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def one_thread_for_torch() -> Iterator[None]:
    """One thread for torch's side of a comparison, two for ours: small operations wait for each other with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tilewright.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    _C.set_num_threads(0)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def same_bits() -> Iterator[Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]]:
    """Runs a function that returns tensors with 1, 2, 3 and 8 threads and asserts that the bits are equal."""

    def run(make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        first = None
        for threads in THREADS:
            tilewright.set_num_threads(threads)
            results = make()
            first = results if first is None else first
            for a, b in zip(first, results, strict=True):
                assert_same_bits(a, b)
        return first

    yield run
    _C.set_num_threads(0)  # follow torch again


@pytest.fixture
def kernel_impl() -> str:
    """What last_impl must say of an op that has scalar, avx2 and avx512 kernels."""
    order = ("scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx")
    level = order.index(tilewright.isa())
    return max((x for x in ("scalar", "avx2", "avx512") if order.index(x) <= level), key=order.index)


@pytest.fixture
def smollm2() -> Tokenizer:
    """The default model's tokenizer."""
    return shared_smollm2()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, transformers') of one tiny llama."""
    folder = tmp_path_factory.mktemp("llama")
    reference = tiny.save(folder, "llama")
    return AutoModelForCausalLM.from_pretrained(folder), reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny.save(path, "llama")
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder for a test to break."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path
