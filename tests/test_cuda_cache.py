"""The CUDA kernels that fill quantised caches and that gather rows, executed through their PTX: the CPU's bits."""

from __future__ import annotations

import copy

import cuda_device
import pytest
import torch
from cases import seeded
from compare import assert_same_bits
from ptx.compilers import needs_nvcc
from torch import Tensor

import tilewright
from tilewright import QuantizedKV

pytestmark = needs_nvcc
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tokens(name: str, *shape: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(shape, generator=seeded(f"{name} {n}")).to(dtype) for n in "kv")


def check_appends(kv: QuantizedKV, pieces: list[tuple[Tensor, Tensor]]) -> None:
    """Piece by piece, every tensor of the cache is what the CPU makes of it."""
    expected = copy.deepcopy(kv)
    for k, v in pieces:
        tilewright.kv_append(expected, k, v)
        cuda_device.module().kv_append_quantized(*kv.tensors(), *kv.spec(), k, v)
        for found, wanted in zip(kv.tensors(), expected.tensors(), strict=True):
            assert_same_bits(found, wanted)


@pytest.mark.parametrize("dim", [1, 7, 64, 80, 130])
def test_8_bits(dim: int) -> None:
    dtype = {7: FP16, 80: FP32}.get(dim, BF16)
    pieces = [tokens(f"{dim} {n}", 2, 2, n, dim, dtype=dtype) for n in (1, 33, 0, 5)]
    pieces[1][0][0, 1, 3] = 0
    pieces[1][1][1, 0, 4, 0] = torch.nan
    pieces[3][0][1, 1, 0, 0] = torch.inf
    check_appends(QuantizedKV.empty(2, 2, 70, dim, 8), pieces)


@pytest.mark.parametrize(
    ("dim", "group", "residual"), [(64, 32, 32), (7, 32, 0), (80, 64, 5), (130, 128, 1), (48, 32, 100)]
)
def test_4_bits(dim: int, group: int, residual: int) -> None:
    """Groups fill from the tail, from new tokens and from both; the tail moves by one group and by several."""
    dtype = {80: FP16, 48: FP32}.get(dim, BF16)
    pieces = [tokens(f"{dim} {n}", 1, 2, n, dim, dtype=dtype) for n in (1, 40, 150, 1, 31)]
    pieces[2][0][0, 1, 3, 0], pieces[2][1][0, 0, 70, 0] = torch.nan, torch.inf
    check_appends(QuantizedKV.empty(1, 2, 260, dim, 4, group_size=group, residual=residual), pieces)


def test_strided_tokens_and_those_without_room() -> None:
    for bits in (4, 8):
        fused = torch.randn(1, 40, 3, 2, 32, generator=seeded("fused")).to(BF16)
        k, v = (fused[:, :, i].transpose(1, 2) for i in (0, 2))
        kv = QuantizedKV.empty(1, 2, 64, 32, bits)
        check_appends(kv, [(k, v)])
        before = copy.deepcopy(kv)
        cuda_device.module().kv_append_quantized(*kv.tensors(), *kv.spec(), k, v)
        for found, wanted in zip(kv.tensors(), before.tensors(), strict=True):
            assert_same_bits(found, wanted)
        with pytest.raises(ValueError, match="has room for max_len"):
            cuda_device.module().kv_append_quantized(*kv.tensors(), *kv.spec(), *tokens("many", 1, 2, 65, 32))
        with pytest.raises(ValueError, match="codes must be"):
            cuda_device.module().kv_append_quantized(kv.v_codes[:, :1], *kv.tensors()[1:], *kv.spec(), k, v)


def test_every_barrier_is_needed() -> None:
    pieces = [tokens(f"mutant {n}", 1, 1, n, 32) for n in (130, 40)]
    survivors = cuda_device.surviving_mutants(
        lambda: check_appends(QuantizedKV.empty(1, 1, 260, 32, 4, residual=130), pieces)
    )
    assert survivors == {}, survivors


def gathered(source: Tensor, from_index: Tensor | None, to_index: Tensor | None, target: Tensor) -> Tensor:
    cuda_device.module().gather(source, from_index, to_index, target)
    return target


@pytest.mark.parametrize(("dim", "dtype"), [(64, BF16), (7, FP16), (12, FP32), (16, torch.int8), (5, torch.uint8)])
def test_gather(dim: int, dtype: torch.dtype) -> None:
    source = (torch.randn(5, 3, 9, dim, generator=seeded("gather")) * 50).to(dtype)
    beams, target = torch.tensor([3, 3, 0, 4]), torch.zeros(4, 3, 9, dim, dtype=dtype)
    assert torch.equal(gathered(source, beams, None, target), source[beams])
    # Pages: 2 -> 0, 0 -> 3; 9 and -1 do not exist.
    pages, kept = torch.tensor([2, 0, 9, 1, -1]), target.clone()
    kept[0], kept[3] = source[2], source[0]
    assert torch.equal(gathered(source, pages, torch.tensor([0, 3, 1, 4, 2]), target), kept)
    part = torch.zeros(5, 3, 4, dim, dtype=dtype)
    assert torch.equal(gathered(source[:, :, 2:6], None, None, part), source[:, :, 2:6])
    heads = source.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gathered(heads, beams, None, torch.zeros_like(target)), source[beams])


def test_gather_refuses() -> None:
    source = torch.randn(4, 2, 8, 64, generator=seeded("gather")).to(BF16)
    with pytest.raises(ValueError, match="must not share memory"):
        gathered(source, torch.tensor([1, 0]), None, source[:2])
    with pytest.raises(ValueError, match="agree in dtype"):
        gathered(source, None, None, torch.zeros(4, 2, 8, 32, dtype=BF16))
    with pytest.raises(ValueError, match="indices must be"):
        gathered(source, torch.tensor([1, 0], dtype=torch.int32), None, torch.zeros(2, 2, 8, 64, dtype=BF16))


def test_runs_everywhere() -> None:
    with cuda_device.module().watched() as launches:
        for dtype in (BF16, FP16, FP32):
            for bits in (4, 8):
                pieces = [tokens(f"everywhere {n}", 1, 2, n, 80, dtype=dtype) for n in (70, 40, 1, 35)]
                pieces[0][0][0, 0, 0, 0] = torch.inf
                check_appends(QuantizedKV.empty(1, 2, 150, 80, bits, residual=20), pieces)
        for case in ((64, BF16), (7, FP16), (3, FP32), (5, torch.uint8)):
            test_gather(*case)
    left = cuda_device.unexecuted(launches, "kv_quant", "gather")
    assert left == [], "\n".join(left)
