"""What the interpreter says of the CUDA kernels of attention beside their results: needed barriers, traffic, code that
no test reaches."""

from __future__ import annotations

from collections.abc import Callable

import cuda_device
import pytest
import test_cuda_attention as forward
import test_cuda_attention_gradients as backward
import test_cuda_attention_quantized as quantized
from cases import AttentionCase as Case
from cuda_attention import BF16, FP16, rand, run
from ptx.compilers import needs_nvcc

from tilewright.ops.attention_reference import Options

pytestmark = needs_nvcc
BOTTOM = "bottom_right"


def tiles() -> None:
    run(Case("f", 60, 300, 64, heads=3, kv_heads=1, causal=BOTTOM), FP16)
    forward.test_sequences("paged prefill")


def tiles_general() -> None:
    run(Case("g", 40, 200, 64, heads=3, kv_heads=1, causal=BOTTOM, mask="b1qk"), FP16)
    forward.test_sequences("paged prefill, general")


def few() -> None:
    run(Case("s", 1, 600, 64, heads=8, kv_heads=1, causal=BOTTOM), FP16)
    run(Case("n", 1, 200, 64, heads=8, kv_heads=1, causal=BOTTOM), FP16)
    forward.test_sequences("paged decode")


def few_wide() -> None:
    run(Case("w", 1, 200, 256, heads=8, kv_heads=1, causal=BOTTOM), FP16)


def codes(bits: int, dim: int = 64) -> Callable[[], None]:
    return lambda: quantized.test_error_rule(quantized.Case(f"i{bits}", bits, 1, 200, dim, 3), BF16)


def gradients() -> None:
    backward.check(backward.case(BF16, 3, 1, 60, 200, 64), Options(0.125, 0.0, 2))


def gradients_wide() -> None:
    backward.check(backward.case(BF16, 1, 1, 80, 100, 256), Options(0.06, 0.0, 2))


def gradients_general() -> None:
    more = {"alibi": rand("a", 2).abs(), "sinks": rand("s", 2)}
    for shape in ((1, 70, 100), (1, 1, 70, 1)):
        t = backward.case(BF16, 2, 2, 70, 100, 64, bias=rand("b", *shape, dtype=BF16), **more)
        backward.check(t, Options(0.06, 0.0, 2))


# What runs each kernel; barriers that may be deleted unnoticed, by a part of their text, with the reason.
PAGED_ONLY = {"bar.red": "says that a page was missing; only cases with pages get there"}
MUTANTS = {
    "tiles": (tiles, {}),
    "tiles general": (tiles_general, {}),
    "few": (few, {}),
    "few wide": (few_wide, PAGED_ONLY),
    "int8": (codes(8), PAGED_ONLY),
    "int4": (codes(4), PAGED_ONLY),
    "gradients": (gradients, PAGED_ONLY),
    "gradients wide": (gradients_wide, PAGED_ONLY),
    "gradients general": (gradients_general, PAGED_ONLY),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_barrier_is_needed(name: str) -> None:
    check, listed = MUTANTS[name]
    survivors = cuda_device.surviving_mutants(check)
    unlisted = [str(i) for found in survivors.values() for i in found if not any(text in i.text for text in listed)]
    assert not unlisted, unlisted
