"""RMS norm and layer norm, with and without the fused residual, beside torch's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewright
from tilewright.ops.norm import norm_reference

from . import main
from .harness import COLD_BYTES, CPU, OURS, SMALL_COLD_BYTES, Candidate, Case, Work, relative_error, under_pytest

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """x (rows, n), with a residual of that shape where `residual` is set; layer norm where `centred` is."""

    name: str
    rows: int
    n: int
    dtype: torch.dtype = F32
    residual: bool = True
    centred: bool = False
    cold_bytes: int = SMALL_COLD_BYTES


SHAPES = (
    Shape("rms+res 1x576 fp32", 1, 576),  # SmolLM2 135M
    Shape("rms+res 512x576 fp32", 512, 576),
    Shape("rms+res 1x4096 fp32", 1, 4096),  # Llama 3 8B
    Shape("rms+res 2048x4096 fp32", 2048, 4096, cold_bytes=COLD_BYTES),
    Shape("rms+res 2048x4096 bf16", 2048, 4096, BF16, cold_bytes=COLD_BYTES),
    Shape("rms 2048x4096 bf16", 2048, 4096, BF16, residual=False, cold_bytes=COLD_BYTES),
    Shape("layer 4096x768 fp32", 4096, 768, residual=False, centred=True, cold_bytes=COLD_BYTES),  # BERT base
)
GPU_SHAPES = SHAPES


def case(shape: Shape, peers: Sequence[str], device: torch.device = CPU) -> Case:
    """Inputs, candidates and check for one shape."""
    torch.manual_seed(0)
    x = torch.randn(shape.rows, shape.n).to(shape.dtype)
    residual = torch.randn(shape.rows, shape.n).to(shape.dtype) if shape.residual else None
    weight = torch.rand(shape.n).to(shape.dtype)
    bias = torch.randn(shape.n).to(shape.dtype) if shape.centred else None

    def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Any:
        if bias is not None:
            return tilewright.layer_norm(x, weight, bias, EPS, residual=residual)
        return tilewright.rms_norm(x, weight, EPS, residual=residual)

    def torch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Any:
        total = x if residual is None else x + residual
        if bias is not None:
            out = F.layer_norm(total, (shape.n,), weight, bias, EPS)
        else:
            out = F.rms_norm(total, (shape.n,), weight, EPS)
        return out if residual is None else (out, total)

    # x and residual in, normalised and sum out; about five operations an element.
    passes = 4 if shape.residual else 2
    work = Work(passes * x.nbytes + weight.nbytes, 5 * x.numel(), "fp32")
    operands = tuple(t if t is None else t.to(device) for t in (x, residual, weight, bias))
    candidates = [Candidate(OURS, OURS, ours, operands, work)]
    if "torch" in peers:
        candidates.append(Candidate("torch", "torch", torch_norm, operands, work))
    expected, _ = norm_reference(x, residual, weight, bias, EPS, shape.centred)
    return Case(
        "norm",
        shape.name,
        candidates,
        lambda out: relative_error(out[0] if shape.residual else out, expected),
        tolerance=1e-5 if shape.dtype == F32 else 0.01,
        cold_bytes=shape.cold_bytes,
    )


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def test_norm(benchmark: Any, shape: Shape) -> None:
    under_pytest(benchmark, case(shape, ()))


if __name__ == "__main__":
    sys.exit(main(["norm", *sys.argv[1:]]))
