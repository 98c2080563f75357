"""Quantised linear layers beside torch's int4pack and int8pack kernels, its bf16 linear, and ggml's mul_mat."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewright
from tilewright.ops.linear import quantized_linear_reference
from tilewright.quant import QuantizedWeight, from_gguf, quantize_weight
from tilewright.quant.weight import pack_bf16

from . import main
from .ggml import MulMat
from .harness import COLD_BYTES, CPU, OURS, SMALL_COLD_BYTES, Candidate, Case, Work, relative_error, under_pytest

BF16 = torch.bfloat16
_CHECKED_ROWS = 4
_UNITS = {"int8": "int8", "int8_token": "int8", "bf16": "bf16", "fp32": "fp32"}
# Columns and bytes of a block, and where in it the fp16 scale and minimum stand.
_GGUF_BLOCKS = {
    "Q4_0": (32, 18, (0,)), "Q4_1": (32, 20, (0, 2)), "Q8_0": (32, 34, (0,)), "Q4_K": (256, 144, (0, 2)),
    "Q6_K": (256, 210, (208,)),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """x (m, k) times a weight (n, k) of `bits` (16: dense bf16) and `group` columns a scale, or of a GGUF type."""

    name: str
    m: int
    n: int
    k: int
    bits: int = 4
    group: int = 32
    activation: str = "int8"
    gguf: str = ""
    cold_bytes: int = COLD_BYTES


SHAPES = (
    # Llama 2 7B: the MLP's 11008 x 4096, attention's 4096 x 4096
    *(Shape(f"int4 g32 M={m} 11008x4096", m, 11008, 4096) for m in (1, 4, 8, 16)),
    Shape("int8 row M=1 11008x4096", 1, 11008, 4096, 8, -1),
    Shape("int4 g32 M=128 4096x4096", 128, 4096, 4096),
    Shape("int4 g32 M=512 4096x4096", 512, 4096, 4096),
    Shape("int4 g128 token M=512 4096x4096", 512, 4096, 4096, 4, 128, "int8_token"),
    Shape("int8 row token M=512 4096x4096", 512, 4096, 4096, 8, -1, "int8_token"),
    Shape("int4 g32 bf16 M=512 4096x4096", 512, 4096, 4096, activation="bf16"),
    *(Shape(f"bf16 M={m} 4096x4096", m, 4096, 4096, 16, activation="bf16") for m in (1, 8, 512)),
    *(Shape(f"{t} M={m} 4096x4096", m, 4096, 4096, gguf=t) for t in ("Q4_0", "Q8_0", "Q4_K", "Q6_K") for m in (1, 512)),
    # SmolLM2 135M
    Shape("Q4_1 M=1 576x576", 1, 576, 576, gguf="Q4_1", cold_bytes=SMALL_COLD_BYTES),
    Shape("Q4_1 M=1 576x1536", 1, 576, 1536, gguf="Q4_1", cold_bytes=SMALL_COLD_BYTES),
    Shape("Q4_1 M=1 3072x576", 1, 3072, 576, gguf="Q4_1", cold_bytes=SMALL_COLD_BYTES),
    Shape("Q4_1 M=512 3072x576", 512, 3072, 576, gguf="Q4_1", cold_bytes=SMALL_COLD_BYTES),
    Shape("Q8_0 M=1 49152x576", 1, 49152, 576, gguf="Q8_0"),
)
GPU_SHAPES = tuple(shape for shape in SHAPES if shape.bits != 16)  # a GPU's dense products are torch's


def case(shape: Shape, peers: Sequence[str], device: torch.device = CPU) -> Case:
    """Inputs, candidates and check for one shape. x is float32, on a GPU bfloat16."""
    torch.manual_seed(0)
    weight, scales, raw = _weight(shape)
    on_gpu = device.type != "cpu"
    x = torch.randn(shape.m, shape.k).to(BF16 if on_gpu else torch.float32)
    dense = weight.dequantize()
    operations = 2 * shape.m * shape.n * shape.k

    def ours(x: Tensor, weight: QuantizedWeight) -> Tensor:
        return tilewright.quantized_linear(x, weight, activation=shape.activation)

    def work(weight_bytes: int, unit: str, itemsize: int) -> Work:
        return Work(weight_bytes + shape.m * (shape.n + shape.k) * itemsize, operations, unit)

    our_work = work(weight.nbytes, _UNITS[shape.activation], x.element_size())
    candidates = [Candidate(OURS, OURS, ours, (x.to(device), weight.to(device)), our_work)]
    if "torch" in peers:
        for name, run, operands, weight_bytes in _torch(shape, x.to(device, BF16), dense, scales):
            candidates.append(Candidate(name, "torch", run, operands, work(weight_bytes, "bf16", 2)))
    if "llama_cpp" in peers and raw is not None and importlib.util.find_spec("llama_cpp"):
        product = MulMat(x, raw, shape.gguf)
        name = f"ggml mul_mat ({product.buffer_type})"
        candidates.append(Candidate(name, "llama_cpp", MulMat.run, (product,), work(raw.nbytes, "int8", 4)))
    # The rows are independent, so a few of them stand for all.
    rows = sorted({0, shape.m - 1, *range(0, shape.m, max(1, shape.m // _CHECKED_ROWS))})
    expected = quantized_linear_reference(x[rows], weight, activation="fp32")
    del dense
    return Case(
        "linear",
        shape.name,
        candidates,
        lambda out: relative_error((out.result() if isinstance(out, MulMat) else out)[rows], expected),
        tolerance=0.03,  # what int8 activations and torch's bf16 scales lose
        cold_bytes=shape.cold_bytes,
    )


def _weight(shape: Shape) -> tuple[QuantizedWeight, Tensor, Tensor | None]:
    """The weight, for what torch's kernels can represent its scales (n, groups), and its bytes of a GGUF type."""
    if shape.bits == 16:
        return pack_bf16(torch.randn(shape.n, shape.k) * 0.02), torch.ones(shape.n, 1), None
    if not shape.gguf:
        weight = quantize_weight(torch.randn(shape.n, shape.k) * 0.02, shape.bits, shape.group)
        groups = weight.dequantize().view(shape.n, -1, shape.k if shape.group == -1 else shape.group)
        return weight, groups.abs().amax(-1) / (2 ** (shape.bits - 1) - 1), None
    columns, size, halves = _GGUF_BLOCKS[shape.gguf]
    blocks = torch.randint(0, 256, (shape.n, shape.k // columns, size), dtype=torch.uint8)
    scales = torch.rand(shape.n, shape.k // columns, len(halves)) * 0.01 + 0.001
    if shape.gguf == "Q4_1":
        scales[..., 1] *= -7.5  # the minimum, so that the weights centre on zero
    if shape.gguf == "Q4_K":
        scales[..., 1] = scales[..., 0] * 7.5
    for i, at in enumerate(halves):
        blocks[..., at : at + 2] = scales[..., i : i + 1].half().view(torch.uint8)
    raw = blocks.flatten(1)
    return from_gguf(raw, shape.gguf, (shape.n, shape.k)), scales[..., 0].half().float(), raw


def _torch(shape: Shape, x: Tensor, dense: Tensor, scales: Tensor) -> list[tuple[str, Any, tuple[Any, ...], int]]:
    """(name, run, operands, bytes of the weight). The packed kernels, for a CPU, get the grid of `dense`."""
    n, k, aten = shape.n, shape.k, torch.ops.aten
    bf16 = dense.to(x.device, BF16)
    found: list[tuple[str, Any, tuple[Any, ...], int]] = [("torch bf16 linear", F.linear, (x, bf16), bf16.nbytes)]
    if shape.bits == 16 or not x.is_cpu:
        return found
    codes = (dense.view(n, scales.shape[1], -1) / scales.unsqueeze(-1)).round().view(n, k)
    if shape.bits == 4 and shape.gguf in ("", "Q4_0"):
        packed = aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), 1)
        # (k / group, n, 2): scales and the zeros that none of these formats has
        grid = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous().to(BF16)

        def int4pack(x: Tensor, packed: Tensor, grid: Tensor) -> Tensor:
            return aten._weight_int4pack_mm_for_cpu(x, packed, shape.group, grid)

        found.append(("torch int4pack", int4pack, (x, packed, grid), packed.nbytes + grid.nbytes))
    if shape.bits == 8 and shape.group == -1 and not shape.gguf:
        operands = (x, codes.to(torch.int8), scales.squeeze(-1).to(BF16))
        found.append(("torch int8pack", torch._weight_int8pack_mm, operands, n * k + 2 * n))
    return found


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def test_linear(benchmark: Any, shape: Shape) -> None:
    under_pytest(benchmark, case(shape, ()))


if __name__ == "__main__":
    sys.exit(main(["linear", *sys.argv[1:]]))
