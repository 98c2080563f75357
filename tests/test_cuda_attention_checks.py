"""What the interpreter says of the CUDA kernels of attention beside their results: needed barriers, code that no test
reaches."""

from __future__ import annotations

from collections.abc import Callable

import cuda_device
import pytest
import test_cuda_attention as forward
import test_cuda_attention_gradients as backward
import test_cuda_attention_quantized as quantized
from cases import AttentionCase as Case
from cuda_attention import BF16, FP16, run
from gpu_attention import grad_case, rand
from ptx.compilers import needs_nvcc

from tilewright.ops.attention_reference import Options

pytestmark = needs_nvcc
BOTTOM = "bottom_right"


def tiles() -> None:
    run(Case("f", 60, 300, 64, heads=3, kv_heads=1, causal=BOTTOM), FP16)
    forward.test_sequences("paged prefill", FP16)


def tiles_general() -> None:
    run(Case("g", 40, 200, 64, heads=3, kv_heads=1, causal=BOTTOM, mask="b1qk"), FP16)
    forward.test_sequences("paged prefill, general", FP16)


def few() -> None:
    run(Case("s", 1, 600, 64, heads=8, kv_heads=1, causal=BOTTOM), FP16)
    run(Case("n", 1, 200, 64, heads=8, kv_heads=1, causal=BOTTOM), FP16)
    forward.test_sequences("paged decode", FP16)


def few_wide() -> None:
    run(Case("w", 1, 200, 256, heads=8, kv_heads=1, causal=BOTTOM), FP16)


def codes(bits: int, dim: int = 64) -> Callable[[], None]:
    return lambda: quantized.test_error_rule(quantized.Case(f"i{bits}", bits, 1, 200, dim, 3), BF16)


def gradients() -> None:
    backward.check(grad_case(BF16, 3, 1, 60, 200, 64), Options(0.125, 0.0, 2))


def gradients_wide() -> None:
    backward.check(grad_case(BF16, 1, 1, 80, 100, 256), Options(0.06, 0.0, 2))


def gradients_general() -> None:
    more = {"alibi": rand("a", 2).abs(), "sinks": rand("s", 2)}
    for shape in ((1, 72, 100), (1, 1, 72, 1)):
        t = grad_case(BF16, 2, 2, 72, 100, 64, bias=rand("b", *shape, dtype=BF16), **more)
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


def everything() -> None:
    for case, dtype in forward.SHAPES + forward.DECODE + forward.FEATURES:
        run(case, dtype)
    for name in forward.CALLS:
        forward.test_sequences(name, FP16)
    for seq_q in (1, 40):
        forward.test_what_does_not_exist_gives_nan(seq_q)
    for case, dtype in quantized.CASES:
        quantized.test_error_rule(case, dtype)
    for feature in quantized.FEATURES:
        quantized.test_features(8, FP16, feature)
        quantized.test_features(4, BF16, feature)
    for name in backward.GRADIENTS:
        backward.test_error_rule(name)
    for group in (1, 3):
        backward.test_packed_sequences(group)


SOURCES = tuple(f"attention{part}" for part in (
    "", "_backward", "_decode", "_forward", "_grad_bias", "_grad_keys", "_grad_queries"
))  # fmt: skip


def test_every_kernel_runs_everywhere() -> None:
    cuda = cuda_device.module()
    with cuda.watched() as launches:
        everything()
    left = cuda_device.unexecuted(launches, *SOURCES, merged=True)
    assert left == [], "\n".join(left)
