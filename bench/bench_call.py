"""What a call costs beside the arithmetic: ops on tensors so small that nothing else is left, beside torch.add.

"binding" is the private entry with `out` given, the others are the public functions with their allocation. The
targets are 1 us and 3 us; "no call" is what the harness's own loop takes, part of every figure here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tilewright
from tilewright import _C
from tilewright.quant import quantize_weight

from . import main
from .harness import CPU, OURS, Candidate, Case, Work, under_pytest

_N = 32


@dataclass(frozen=True)
class Shape:
    """`make() -> (run, operands)` of our call."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


def _row() -> torch.Tensor:
    return torch.ones(1, _N)


def _binding() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    weight, bias = torch.ones(_N), torch.zeros(_N)
    return _C.norm, ("layer_norm", _row(), None, weight, bias, _row(), None, 1e-5, True)


def _rms_norm() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tilewright.rms_norm, (_row(), torch.ones(_N), 1e-5)


def _linear() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tilewright.quantized_linear, (_row(), quantize_weight(torch.ones(_N, _N)))


def _attention() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tilewright.attention, tuple(torch.ones(1, 1, 1, 16) for _ in "qkv")


def _sdpa() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tilewright.scaled_dot_product_attention, tuple(torch.ones(1, 1, 1, 16) for _ in "qkv")


SHAPES = (
    Shape("binding of 4 tensors with out", _binding),
    Shape("rms_norm", _rms_norm),
    Shape("quantized_linear", _linear),
    Shape("attention", _attention),
    Shape("scaled_dot_product_attention", _sdpa),
)
GPU_SHAPES = ()


def case(shape: Shape, peers: Sequence[str], device: torch.device = CPU) -> Case:
    """Our call, an empty one, and torch.add with and without `out`; on the CPU."""
    run, operands = shape.make()
    candidates = [
        Candidate(OURS, OURS, run, operands, Work()),
        Candidate("no call", "none", lambda: None, (), Work()),
    ]
    if "torch" in peers:
        a, b, out = _row(), _row(), _row()
        candidates.append(Candidate("torch.add", "torch", torch.add, (a, b), Work()))
        candidates.append(Candidate("torch.add out=", "torch", _add_out, (a, b, out), Work()))
    return Case("call", shape.name, candidates, cold_bytes=0)


def _add_out(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(a, b, out=out)


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def test_call(benchmark: Any, shape: Shape) -> None:
    under_pytest(benchmark, case(shape, ()))


if __name__ == "__main__":
    sys.exit(main(["call", *sys.argv[1:]]))
